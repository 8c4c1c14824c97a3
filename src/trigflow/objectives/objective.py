"""Objectives: what a network is trained for. Each is a class in a file of its own; this is what they share.

An objective has its settings as fields and says what a run with it needs, draws what is random in a step, computes its loss
from a batch, and knows how what it trained is drawn from. It is found by the name that is its `kind`; see
`trigflow.objectives.table`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from trigflow.conditions import takes
from trigflow.process import HALF_PI, Proposal, TrigFlow
from trigflow.samplers.guidance import Network, VelocityFunction
from trigflow.samplers.sampling import Sampling

Weight = Callable[[Tensor], Tensor]
"""`w(t)`, a log weight; shapes `(b,)` to `(b,)`."""

Check = tuple[bool, str, object, str]
"""Whether a setting makes sense, its name, its value, and what is expected."""

NEAREST = 1e-6
"""Distance that `AdaptiveWeight` keeps from the ends of the quarter circle."""


@dataclass
class Loss:
    """What an objective returns.

    Attributes:
        value: scalar to differentiate.
        figures: detached float32 tensors of shape `(b,)` to log, one number per sample; always has `t` and `loss`
            (unweighted mean squared error per element), for consistency also `tangent_norm`.
    """

    value: Tensor
    figures: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TangentConfig:
    """What happens to the tangent g before it becomes a target."""

    mode: Literal["normalize", "clip", "raw"] = "normalize"
    """g / (||g|| + c) over the sample; or g clipped to [-limit, limit]; or g as it is."""
    c: float = 0.1
    """Constant of the normalization."""
    limit: float = 1.0
    """Bound of the clipping."""
    warmup: int = 10_000
    """Iterations H over which the second term is brought in, r = min(1, iteration / H); 0 for none."""
    prior: float = 0.0
    """Power p of the weight cos(t)^p of the loss. Normalizing takes the factor cos(t) out of g, and 1 puts it back; with 0, as
    published, all times weigh the same. Where batches are small, it keeps what is uncertain at high noise from drowning the
    rest. In a segment that ends at s, cos(t - s)."""
    derivative: Literal["exact", "finite-difference"] = "exact"
    """dF-/dt by forward-mode differentiation in the same pass; or, for comparison, by a central difference of two more."""

    def warmup_factor(self, iteration: int | Tensor) -> float | Tensor:
        """`r = min(1, iteration / H)`."""
        if isinstance(iteration, Tensor) and self.warmup > 0:
            return (iteration / self.warmup).clamp(max=1.0)
        return 1.0 if self.warmup <= 0 else min(1.0, iteration / self.warmup)

    def prior_weight(self, t: Tensor) -> Tensor | None:
        """`cos(t)^prior`, like t, or None where all times weigh the same."""
        return None if self.prior == 0 else torch.cos(t).clamp_min(0) ** self.prior


class AdaptiveWeight(nn.Module):
    """Learned log weight `w(t)`: one linear layer on Fourier features of `log(sd tan t) / 4`, zero at the start.

    Minimizing `exp(w) e(t) - w` gives `w = -log e(t)`: every time then contributes equally to the gradient. Not part of
    the network: neither EMA nor sampling needs it. (EDM2 writes logvar = -w.)

    Times closer than 1e-6 to 0 or pi/2 count as that close, so `|log tan(t)|` stays below 13.9 and w finite: the float32
    number nearest to pi/2 lies beyond it, where the tangent is negative.

    Shapes: `(b,)` to `(b,)`. Source: Lu and Song 2025, section 4.2; Karras et al. 2024, section 2.3.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, process: TrigFlow, features: int = 64) -> None:
        super().__init__()
        self.process = process
        generator = torch.Generator().manual_seed(0)  # the same fixed features for every run
        self.register_buffer("frequencies", torch.randn(features, generator=generator, dtype=torch.float32), persistent=False)
        self.register_buffer("phases", torch.rand(features, generator=generator, dtype=torch.float32), persistent=False)
        self.linear = nn.Linear(features, 1, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        t = t.clamp(NEAREST, HALF_PI - NEAREST)
        c_noise = torch.log(self.process.sigma_from_time(t)) / 4
        angle = 2 * math.pi * (c_noise[:, None] * self.frequencies + self.phases)
        with torch.autocast(device_type=t.device.type, enabled=False):
            return self.linear(math.sqrt(2) * torch.cos(angle))[:, 0]


def weighted_mean(error: Tensor, t: Tensor, weight: Weight | None, prior: Tensor | None = None) -> Tensor:
    """`mean[ prior (exp(w(t)) error - w(t)) ]` over the batch; both weights are optional. error, t, prior: `(b,)`.

    The prior stands outside: a learned w evens out the errors as without it, and the prior is what times then weigh.
    """
    values = error
    if weight is not None:
        w = weight(t)
        values = torch.exp(w) * error - w
    return (values if prior is None else prior * values).mean()


def per_sample_mean_square(x: Tensor) -> Tensor:
    """`||x||^2 / D` of each sample, in float32 or higher: `(b, ...)` to `(b,)`."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().flatten(1).mean(1)


def as_figures(**figures: Tensor) -> dict[str, Tensor]:
    """Detached float32 copies."""
    return {name: value.detach().float() for name, value in figures.items()}


@dataclass(frozen=True)
class StepDraws:
    """Draws what is random in a step, for the samples that this process has of a batch.

    Attributes:
        n: samples of the whole batch; numbers are drawn for all of them, whatever the number of processes.
        process: the TrigFlow process.
        generator: on the CPU.
        iteration: of the run, from 0.
        share: from values of the whole batch `(n, ...)` to those of this process, on its device.
        noise: a new noise `N(0, sd^2 I)` of the samples of this process.
        latest: where the schedule of a bridged network ends; later times, of which it has learned nothing, count as this one.
    """

    n: int
    process: TrigFlow
    generator: torch.Generator
    iteration: int
    share: Callable[[Tensor], Tensor]
    noise: Callable[[], Tensor]
    latest: float = math.inf

    def times(self, proposal: Proposal) -> Tensor:
        """Times of a proposal, `(b,)`."""
        return self.share(self.known(proposal.sample(self.process, self.n, self.generator)))

    def known(self, t: Tensor) -> Tensor:
        """These times, none of them after the latest."""
        return t.clamp(max=self.latest)

    def uniform(self) -> Tensor:
        """Numbers in [0, 1) for the whole batch, `(n,)`."""
        return torch.rand(self.n, generator=self.generator, dtype=torch.float32)


@dataclass(frozen=True)
class Given:
    """What a loss is computed from.

    Attributes:
        network: that learns.
        process: the TrigFlow process.
        batch: `x0` and `noise` `(b, *shape)`, and what the objective has drawn, `t` among it.
        conditions: what the network is told, by name.
        iteration: of the run, from 0; as a float64 tensor where the loss is compiled.
        iterations: of the whole run.
        teacher: its velocity function for these conditions, guidance included, where there is a teacher.
        weight: `w(t)` that is learned beside the network; None for no weighting.
    """

    network: Network
    process: TrigFlow
    batch: Mapping[str, Tensor]
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    iteration: int | Tensor = 0
    iterations: int = 1
    teacher: VelocityFunction | None = None
    weight: Weight | None = None


@dataclass(frozen=True)
class Objective:
    """What is minimized. A subclass has at least `loss` and, for what is no diffusion model, `sampling`.

    One with a field `label_dropout`, or `condition_dropout` in students, has the conditions of that share of samples left out.
    """

    kind: str = "diffusion"
    """diffusion (a teacher); students: scd, scd-vsd, vsd, flow-map, meanflow-distill and cd of a teacher, sct, meanflow and ct
    from data. The other settings are those of the one that is named: `--objective.kind meanflow --help` shows MeanFlow's."""
    proposal: Proposal = field(default_factory=Proposal)
    """Distribution of training times."""
    adaptive_weight: bool = True
    """Learn the weighting w(t)."""

    fake: ClassVar[bool] = False
    """Whether a fake score network learns beside the student; see `trigflow.objectives.distribution`."""
    compiles: ClassVar[bool] = True
    """Whether the loss is one function in all steps, which can take the iteration as a tensor."""

    @property
    def distills(self) -> bool:
        """Whether there is a teacher whose velocity is followed."""
        return False

    @property
    def told(self) -> tuple[str, ...]:
        """Conditions of what is trained that are drawn here and not from data: guidance, end."""
        return ()

    @property
    def needs_end(self) -> bool:
        """Whether nothing can be learned by a network that is not told the end of its jumps."""
        return False

    @property
    def has_tangent(self) -> bool:
        """Whether a tangent passes through what is trained."""
        return False

    @property
    def probe(self) -> Literal["error", "tangent"] | None:
        """What instruments measure by time: the error of the velocity, the tangent of jumps to a fixed end, or nothing."""
        return None

    @property
    def learns_weight(self) -> bool:
        """Whether there is room for a learned weighting w(t)."""
        return self.adaptive_weight

    @property
    def sampling(self) -> Sampling:
        """How samples of what is trained are drawn."""
        return Sampling(guided=getattr(self, "label_dropout", 0.0) > 0)

    def checks(self, process: TrigFlow) -> list[Check]:
        """Settings that could make no sense. Errors name them as `objective.NAME`.

        Raises:
            UserError: for what these cannot say.
        """
        return []

    def draw(self, draws: StepDraws) -> dict[str, Tensor]:
        """Times `t` of a batch, `(b,)`, and what else is drawn before its conditions are."""
        return {"t": draws.times(self.proposal)}

    def draw_conditions(self, draws: StepDraws) -> dict[str, Tensor]:
        """Conditions that come from no data, such as guidance scales."""
        return {}

    def draw_more(self, draws: StepDraws) -> dict[str, Tensor]:
        """What is drawn after the conditions."""
        return {}

    def loss(self, given: Given) -> Loss:
        """The loss of a batch, and its figures."""
        raise NotImplementedError


@dataclass(frozen=True)
class StudentObjective(Objective):
    """What objectives of students share: whose velocity they follow, guidance, and the shape of the tangent."""

    velocity: Literal["data", "teacher", "self"] = "teacher"
    """Of the trajectory: cos(t) z - sin(t) x0, the teacher's, or (flow maps) the network's own F(x, t, t)."""
    guidance: float = 1.0
    """Of a distillation whose student takes no scale as input: the scale that the teacher is guided by; 1 for none."""
    guidance_max: float = 1.0
    """Of a distillation: scales are drawn uniformly from [1, guidance_max]; above 1 the student takes the scale as input."""
    condition_dropout: float | None = None
    """Share of samples whose class or text is left out, so that the student knows how to draw without."""
    guidance_interval: tuple[float, float] | None = None
    """The teacher is guided only at noise levels sigma in [low, high]; None for everywhere."""
    tangent: TangentConfig = field(default_factory=TangentConfig)
    """Shape of the consistency tangent."""

    @property
    def distills(self) -> bool:
        return self.velocity == "teacher"

    @property
    def told(self) -> tuple[str, ...]:
        return ("guidance",) if self.distills and self.guidance_max > 1 else ()

    @property
    def sampling(self) -> Sampling:
        return Sampling("flow_map", guidance_max=self.guidance_max if self.distills else 1.0)

    def checks(self, process: TrigFlow) -> list[Check]:
        tangent, interval = self.tangent, self.guidance_interval
        fine = interval is None or 0 <= interval[0] < interval[1] < math.inf
        return [
            (1 <= self.guidance_max < math.inf, "guidance_max", self.guidance_max, "at least 1"),
            (0 <= (self.condition_dropout or 0) <= 1, "condition_dropout", self.condition_dropout, "a share in [0, 1]"),
            (math.isfinite(self.guidance), "guidance", self.guidance, "a finite number"),
            (self.guidance == 1 or self.guidance_max == 1, "guidance", self.guidance, "1 with guidance_max above 1"),
            (fine, "guidance_interval", interval, "two finite numbers with 0 <= low < high"),
            (0 <= tangent.c < math.inf, "tangent.c", tangent.c, "0 or more"),
            (0 <= tangent.prior < math.inf, "tangent.prior", tangent.prior, "0 or more"),
            (tangent.limit > 0, "tangent.limit", tangent.limit, "a positive number"),
            (tangent.warmup >= 0, "tangent.warmup", tangent.warmup, "0 or more"),
        ]

    def draw_conditions(self, draws: StepDraws) -> dict[str, Tensor]:
        if "guidance" not in self.told:
            return {}
        return {"guidance": draws.share(1 + (self.guidance_max - 1) * draws.uniform())}


def evaluate(network: Network, x: Tensor, t: Tensor, end: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """`F(x, t, s)` of a network that is told the end, and `F(x, t)` of another. x has unit variance."""
    ends = {"end": end} if "end" in takes(network) else {}
    return network(x, t, **conditions, **ends)
