"""How a network learns what time it is, which class is wanted, how strong the guidance is and where a jump ends.

The consistency tangent contains the time derivative of this path, so it decides whether training is stable (Lu and Song,
2025, section 4.1): with `c_noise(t) = log(sd tan t) / 4` the derivative grows like `1 / (sin t cos t)`, and with Fourier
features of scale 16 it is multiplied by about 100. Identity time with positional features keeps it below one. The whole
path runs in float32 or higher, also under autocast.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.conditions import check_told, in_order
from trigflow.networks.layers import ConditioningLinear, check_setting, full_precision, zero_bias
from trigflow.networks.text import Context, TextConfig, TextEncoder, read_text
from trigflow.process import HALF_PI

C = TypeVar("C", bound="NetworkConfig")

LOG_TIMES = (1e-4, HALF_PI - 1e-7)
"""Times between which `log(sd tan t)` says something: below are a trace of noise, above float32 has no number below pi/2."""


class PositionalEmbedding(nn.Module):
    """`[cos(w_i x), sin(w_i x)]` with `w_i = max_period^(-i/n)`, i = 0 ... n-1 and n = width / 2.

    Frequencies run from 1 down to `1 / max_period`, so the derivative in x is at most one everywhere. With `endpoint` the
    last frequency is `1 / max_period` itself, `w_i = max_period^(-i/(n-1))`, as in DDPM++.
    Shapes: `(b,)` to `(b, width)`. Source: Vaswani et al. 2017; Song et al. 2021 (DDPM++).
    """

    frequencies: Tensor

    def __init__(self, width: int, max_period: float = 10_000.0, endpoint: bool = False) -> None:
        super().__init__()
        half = width // 2
        exponent = torch.arange(half, dtype=torch.float64) / (half - 1 if endpoint else half)
        self.register_buffer("frequencies", (max_period**-exponent).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angle = x[:, None] * self.frequencies
        return torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)


class FourierEmbedding(nn.Module):
    """`sqrt(2) cos(2 pi (w_i x + p_i))`, `w_i ~ N(0, scale^2)`, `p_i ~ U[0, 1]`, fixed at construction.

    Shapes: `(b,)` to `(b, width)`. The derivative grows with `scale`: 16 is the usual choice for diffusion models and too
    much for consistency models; 0.02 is close to positional features. Frequencies and phases are saved with the weights.
    Source: Tancik et al. 2020; Lu and Song 2025, section 4.1.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int, scale: float = 16.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(width, generator=generator))
        self.register_buffer("phases", torch.rand(width, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2) * torch.cos(2 * math.pi * (x[:, None] * self.frequencies + self.phases))


def c_noise(t: Tensor, time_map: Literal["identity", "log"], sigma_data: float) -> Tensor:
    """What the network is told of the time t: t itself, or EDM's `log(sd tan t) / 4`. Shapes: `(b,)` to `(b,)`.

    The logarithm is that of the nearest time in `LOG_TIMES`: a jump may end at 0, and the float32 number nearest to pi/2 lies
    beyond it.
    """
    return t if time_map == "identity" else torch.log(sigma_data * torch.tan(t.clamp(*LOG_TIMES))) / 4


def one_hot(label: Tensor | None, like: Tensor, classes: int) -> Tensor:
    """`sqrt(n)` at the class of a sample and 0 elsewhere, `(b, n)`, in the dtype of `like` `(b, ...)`; all 0 for the null label
    n, and for None."""
    if label is None:
        return like.new_zeros(len(like), classes)
    return math.sqrt(classes) * (label[:, None] == torch.arange(classes, device=label.device)).to(like.dtype)


class ScalarEmbedding(ConditioningLinear):
    """`W p(y) + b` for one number y a sample, with positional features p. W and b start at zero: no effect.

    Shapes: t and the condition `(b,)` to `(b, width)`.
    """

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__(width, width, bias=bias)
        self.features = PositionalEmbedding(width, max_period=100.0)
        nn.init.zeros_(self.weight)
        zero_bias(self)

    @staticmethod
    def number(t: Tensor, value: Tensor) -> Tensor:
        """The y of a time and a condition."""
        raise NotImplementedError

    def forward(self, t: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(self.features(self.number(t, value)))


class GuidanceEmbedding(ScalarEmbedding):
    """Of guidance scales s: `y = s - 1`."""

    @staticmethod
    def number(t: Tensor, value: Tensor) -> Tensor:
        return value - 1.0


class EndTimeEmbedding(ScalarEmbedding):
    """Of jumps from t to their end s: `y = 8 (t - s)`, without bias.

    The length of the jump, not its end, so that a network of average velocities is told when it is zero.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, bias=False)

    @staticmethod
    def number(t: Tensor, value: Tensor) -> Tensor:
        return 8 * (t - value)


EMBEDDINGS: dict[str, tuple[str, type[ScalarEmbedding]]] = {
    "guidance": ("guidance", GuidanceEmbedding),
    "end": ("end_time", EndTimeEmbedding),
}
"""Conditions of one number a sample: by name, what their module is called in a network, and its class."""


@dataclass(frozen=True)
class ConditioningConfig:
    """What the network is told beside its noisy input, and in which form."""

    time_map: Literal["identity", "log"] = "identity"
    """c_noise(t) = t, or log(sd tan t) / 4 as in EDM (for ablations: unstable near pi/2)."""
    time_embedding: Literal["positional", "fourier"] = "positional"
    """Positional features (stable), or Fourier features of `fourier_scale`."""
    fourier_scale: float = 16.0
    """Bandwidth of the Fourier features; used with time_embedding = fourier."""
    width: int = 64
    """Features of the raw embedding; the embedding network has 4x as many."""
    num_classes: int = 0
    """Classes of a class-conditional network; 0 for an unconditional one. One more index is the null label."""
    takes: tuple[str, ...] = ()
    """Conditions beside the class: guidance, the scale (a guided student); end, where a jump ends (students of several
    segments or of any jump)."""
    text: TextConfig = field(default_factory=TextConfig)
    """How a text is read."""

    @property
    def takes_all(self) -> frozenset[str]:
        """`takes` of the network, the class included."""
        words = ("text", "text_mask") if self.text else ()
        return frozenset({*self.takes, *["label"] * (self.num_classes > 0), *words})

    @property
    def null(self) -> dict[str, Tensor]:
        """`null` of the network: of the class, one more index than there are classes; of the text, the empty one."""
        label = {"label": torch.tensor(self.num_classes, device="cpu")} if self.num_classes else {}
        return {**label, **self.text.null}


class NetworkConfig:
    """What configurations of networks have in common; each is a frozen dataclass of its own.

    Attributes:
        dropout: largest probability among its dropout layers, in [0, 1).
        conditioning: what the network is told.
        axes: of a sample that it takes, 1 for vectors and 3 for images; None where it does not say.
        reads: whether it can be told a text.
        own_precision: whether it sees itself to the precision of its weights.
    """

    dropout: float
    conditioning: ConditioningConfig
    axes: ClassVar[int | None] = None
    reads: ClassVar[bool] = False
    own_precision: ClassVar[bool] = False

    def as_teacher(self: C) -> C:
        """That of a network without the conditions that an objective draws, and of which nothing is trained."""
        return self.changed(conditioning=dataclasses.replace(self.conditioning, takes=()))

    def changed(self: C, **settings: Any) -> C:
        """The same with other settings."""
        return dataclasses.replace(self, **settings)  # type: ignore[type-var]


def check_conditioning(config: ConditioningConfig) -> None:
    """Raise a UserError for settings of the conditioning path that make no sense."""
    check_setting(config.width >= 2 and config.width % 2 == 0, "conditioning.width", config.width, "an even number >= 2")
    check_setting(config.num_classes >= 0, "num_classes", config.num_classes, "0 or more")
    known = config.takes == in_order(set(config.takes) & EMBEDDINGS.keys())
    check_setting(known, "conditioning.takes", config.takes, f"some of {', '.join(EMBEDDINGS)}, in this order")
    check_setting(config.time_map in ("identity", "log"), "time_map", config.time_map, "identity or log")
    embeddings = ("positional", "fourier")
    check_setting(config.time_embedding in embeddings, "time_embedding", config.time_embedding, " or ".join(embeddings))
    if config.text:
        config.text.check()


class Conditioning(nn.Module):
    """Time and conditions in, one vector out: `emb = silu(W2 silu(W1 (time + label + guidance + end + pooled text)))`.

    The branches of guidance and end start at zero, so a student initialized from its teacher begins as that teacher for every
    scale and end. The log time map needs `sigma_data`.

    Shapes: t `(b,)`; label int64 `(b,)` with values in [0, num_classes], of which num_classes itself, like no label, means
    "no class"; guidance and end `(b,)`; result `(b, out_width)`.

    Raises:
        UserError: for a condition that the network does not take, or one that it misses.
    """

    def __init__(self, config: ConditioningConfig, sigma_data: float = 0.5) -> None:
        super().__init__()
        check_conditioning(config)
        self.config = config
        self.takes, self.null = config.takes_all, config.null
        self.sigma_data = sigma_data
        width = config.width
        self.out_width = 4 * width
        self.time: nn.Module
        if config.time_embedding == "fourier":
            self.time = FourierEmbedding(width, config.fourier_scale)
        else:
            self.time = PositionalEmbedding(width)
        self.label = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.text: TextEncoder | None = None
        if config.text:
            self.text, self.pooled = TextEncoder(config.text), ConditioningLinear(config.text.width, width)
            nn.init.normal_(self.pooled.weight, std=3 / math.sqrt(config.text.width))  # about the size of the time features
        for name in config.takes:
            module, embedding = EMBEDDINGS[name]
            self.add_module(module, embedding(width))
        self.linear1 = nn.Linear(width, self.out_width)
        self.linear2 = nn.Linear(self.out_width, self.out_width)

    def context(self, conditions: Mapping[str, Tensor]) -> Context | None:
        """The text among the conditions as the network reads it; no text is the empty one. None for a network without words."""
        return read_text(self.text, conditions)

    def forward(self, t: Tensor, context: Context | None = None, **conditions: Tensor) -> Tensor:
        """The vector `(b, out_width)`, in float32 or higher, also under autocast; `context` as `context` gives it."""
        check_told(self, conditions)
        with full_precision(t):
            emb = self.time(c_noise(t, self.config.time_map, self.sigma_data))
            if context is not None:
                emb = emb + self.pooled(context.pooled.to(self.pooled.weight.dtype))
            if self.label is not None:
                label = conditions.get("label")
                if label is None:
                    label = torch.full(t.shape, self.config.num_classes, dtype=torch.int64, device=t.device)
                emb = emb + self.label(label)
            for name in self.config.takes:
                emb = emb + getattr(self, EMBEDDINGS[name][0])(t, conditions[name])
            return F.silu(self.linear2(F.silu(self.linear1(emb))))
