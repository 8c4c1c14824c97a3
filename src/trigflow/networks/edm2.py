"""EDM2's magnitude-preserving U-Net, as published and in the form of the sCM paper.

Karras et al. 2024 ("Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024) built it for diffusion;
Lu and Song 2025 changed what their section 4.1 found unstable under the consistency tangent::

                      as published                       the sCM paper's form
    time              c_noise = log(sd tan t) / 4        c_noise = t
    time embedding    Fourier features                   positional features
    modulation        y = x (1 + g s(emb))               y = norm(x) pnorm(1 + g s(emb))
                      (modulation = "gain")              (modulation = "double")

Both forms have the same parameters, with the names and shapes of NVIDIA's snapshots. The published form computes the raw
network `F_edm(x_t / sd, c_noise)` of the EDM preconditioning; as a TrigFlow network it is `-F_edm`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.conditions import check_told
from trigflow.networks.embeddings import EMBEDDINGS, ConditioningConfig, NetworkConfig, c_noise, check_conditioning, one_hot
from trigflow.networks.layers import check_at_least_one, check_images, check_setting, full_precision, largest_divisor
from trigflow.networks.levels import check_levels, steps
from trigflow.networks.magnitude import FixedConv, MPConv, MPFourier, MPPositional, mp_cat, mp_silu, mp_sum, unit_magnitude
from trigflow.networks.text import Context, TextEncoder, read_text
from trigflow.runtime.errors import UserError

Modulation = Literal["gain", "double"]

RESIDUAL = 0.3
"""Share of the new term in the residual sums."""


@dataclass(frozen=True)
class EDM2Config(NetworkConfig):
    """Configuration of `EDM2`. The defaults are the paper's form of size S on 64x64 latents or images."""

    axes: ClassVar[int | None] = 3
    reads: ClassVar[bool] = True

    channels: int = 4
    """Image or latent channels."""
    resolution: int = 64
    """Side of the images, from which levels and parameters take their names."""
    width: int = 192
    """Feature channels at the first level: 192, 256, 320, 384, 448 for S, M, L, XL, XXL."""
    mult: tuple[int, ...] = (1, 2, 3, 4)
    """Channel multiplier of each level; each level after the first halves the resolution."""
    blocks: int = 3
    """Residual blocks per level (the decoder has one more)."""
    attention: tuple[int, ...] = (16, 8)
    """Resolutions whose blocks are followed by self-attention, and by attention to a text."""
    head_width: int = 64
    """Channels of an attention head."""
    modulation: Modulation = "double"
    """EDM2's gain `1 + g s(emb)` as published, or adaptive double normalization."""
    shift: bool = False
    """double: also a normalized shift; the paper's parameter counts leave no room for it."""
    dropout: float = 0.0
    """Dropout inside the blocks, in [0, 1)."""
    dropout_up_to: int | None = None
    """Largest resolution with dropout; None for every resolution."""
    clip: float = 256.0
    """Bound on the activations at the end of each block."""
    log_variance_width: int = 128
    """Fourier features of the learned log variance."""
    conditioning: ConditioningConfig = field(default_factory=lambda: ConditioningConfig(width=192))
    """Time, label, guidance and end inputs; `width` is the number of raw time features (as published: that of the network)."""


SIZES = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
"""Feature channels of EDM2's sizes at the first level."""


def edm2_config(name: str, form: Literal["published", "paper"] = "paper") -> EDM2Config:
    """The ImageNet configuration of a size: `img64-s` ... `img64-xxl` on pixels, `img512-xs` ... `img512-xxl` on latents.

    Args:
        name: data set and size.
        form: `published` for NVIDIA's snapshots, `paper` for the form of Lu and Song 2025.

    Raises:
        UserError: for an unknown name or form.
    """
    channels = {"img64": 3, "img512": 4}
    data, _, size = name.partition("-")
    if data not in channels or size not in SIZES:
        raise UserError(
            f"unknown EDM2 network '{name}'; expected img64 or img512, a dash, and one of {', '.join(SIZES)}; correct the name"
        )
    check_setting(form in ("published", "paper"), "form", form, "published or paper")
    width = SIZES[size]
    conditioning = ConditioningConfig(width=width, num_classes=1000)
    if form == "paper":
        return EDM2Config(channels=channels[data], width=width, conditioning=conditioning)
    conditioning = ConditioningConfig("log", "fourier", fourier_scale=1.0, width=width, num_classes=1000)
    return EDM2Config(channels=channels[data], width=width, modulation="gain", conditioning=conditioning)


class EDM2Block(nn.Module):
    """A residual block, then self-attention where asked for, every sum and layer preserving magnitudes::

        x = norm(skip(resample(x)))                              encoder
        x = resample(x)                                          decoder
        y = conv1(drop(silu(modulate(conv0(silu(x)), emb))))
        x = sum(x, y)                                            encoder; sum(skip(x), y) in the decoder
        x = clip(sum(x, attention(x)))                           and sum(x, attention(x, text)) before clip, with a text

    with pixel normalization for `norm`, and 0.7 parts of the first term to 0.3 of the second in the sums. The modulation is
    that of the module docstring; a shift is added as `sum(y, pnorm(b(emb)))` with equal parts.

    Shapes: x `(b, c_in, h, w)`, emb `(b, e)`; result `(b, c_out, h', w')`, halved for "down", doubled for "up".
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb_width: int,
        config: EDM2Config,
        side: Literal["encoder", "decoder"],
        *,
        resample: Literal["keep", "down", "up"] = "keep",
        attention: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.side, self.resample, self.dropout = side, resample, dropout
        self.modulation, self.shift, self.clip = config.modulation, config.shift, config.clip
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(c_out if side == "encoder" else c_in, c_out, 3)
        self.emb_linear = MPConv(emb_width, 2 * c_out if config.shift else c_out)
        self.conv_res1 = MPConv(c_out, c_out, 3)
        self.conv_skip = MPConv(c_in, c_out, 1) if c_in != c_out else None
        self.heads = largest_divisor(c_out, c_out // config.head_width) if attention else 0
        if attention:
            self.attn_qkv = MPConv(c_out, 3 * c_out, 1)
            self.attn_proj = MPConv(c_out, c_out, 1)
        text = config.conditioning.text
        self.reads = bool(attention and text)
        if self.reads:
            self.text_q = MPConv(c_out, c_out, 1)
            self.text_kv = MPConv(text.width, 2 * c_out)
            self.text_proj = MPConv(c_out, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Context | None = None) -> Tensor:
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.side == "encoder":
            x = unit_magnitude(x if self.conv_skip is None else self.conv_skip(x))

        y = self.conv_res0(mp_silu(x))
        y = mp_silu(self.modulate(y, emb))
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        if self.side == "decoder" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, RESIDUAL)

        if self.heads:
            x = mp_sum(x, self.attend(x), RESIDUAL)
        if self.reads and context is not None:
            x = mp_sum(x, self.read(x, context), RESIDUAL)
        return x.clamp(-self.clip, self.clip)

    def modulate(self, y: Tensor, emb: Tensor) -> Tensor:
        """Scale (and shift) from the embedding, computed in float32 or higher, also under autocast."""
        with full_precision(y):
            scale, shift = self.emb_linear(emb), None
            if self.shift:
                scale, shift = scale.chunk(2, dim=1)
                shift = unit_magnitude(shift)
            scale = 1 + self.emb_gain * scale
            if self.modulation == "double":
                scale = unit_magnitude(scale)
        if self.modulation == "double":
            y = unit_magnitude(y)
        y = y * scale[:, :, None, None].to(y.dtype)
        return y if shift is None else mp_sum(y, shift[:, :, None, None].to(y.dtype))

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over positions; queries, keys and values have unit magnitude (cosine attention)."""
        b, c, h, w = x.shape
        qkv = self.attn_qkv(x).reshape(b, self.heads, c // self.heads, 3, h * w).permute(3, 0, 1, 4, 2)
        q, k, v = unit_magnitude(qkv.contiguous(), dim=-1).unbind(0)  # contiguous heads, as fused kernels want them
        y = F.scaled_dot_product_attention(q, k, v)  # scores q.k / sqrt(head width), at most the root of the head width
        return self.attn_proj(y.transpose(2, 3).reshape(b, c, h, w))

    def read(self, x: Tensor, context: Context) -> Tensor:
        """Attention of positions to a text; queries, keys, values and what comes of them have unit magnitude."""
        b, c, h, w = x.shape
        q = self.text_q(x).reshape(b, self.heads, c // self.heads, h * w).transpose(2, 3)
        states = unit_magnitude(context.states.to(x.dtype), dim=-1)
        k, v = self.text_kv(states).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = (unit_magnitude(part.contiguous(), dim=-1) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask[:, None, None, :])
        return self.text_proj(y.transpose(2, 3).reshape(b, c, h, w))


class EDM2UNet(nn.Module):
    """The network below `unet.`: time, label, guidance and end into one embedding, an encoder and a decoder of `EDM2Block`s."""

    def __init__(self, config: EDM2Config, sigma_data: float) -> None:
        super().__init__()
        self.config = conditioning = config.conditioning
        self.takes, self.null = conditioning.takes_all, conditioning.null
        self.sigma_data = sigma_data
        widths = [config.width * m for m in config.mult]
        emb_width = max(widths)
        self.out_gain = nn.Parameter(torch.zeros([]))

        # Embedding.
        if conditioning.time_embedding == "fourier":
            self.emb_fourier = MPFourier(conditioning.width, conditioning.fourier_scale)
        else:
            self.emb_positional = MPPositional(conditioning.width)
        self.emb_noise = MPConv(conditioning.width, emb_width)
        self.emb_label = MPConv(conditioning.num_classes, emb_width) if conditioning.num_classes else None
        self.text: TextEncoder | None = None
        if conditioning.text:
            self.text = TextEncoder(conditioning.text)
            self.emb_text = MPConv(conditioning.text.width, emb_width)
        for name in conditioning.takes:
            told = f"emb_{EMBEDDINGS[name][0]}"
            self.add_module(f"{told}_features", MPPositional(conditioning.width, max_period=100.0))
            self.add_module(told, MPConv(conditioning.width, emb_width))
            self.register_parameter(f"{told}_gain", nn.Parameter(torch.zeros([])))  # no effect at first

        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        side = config.resolution
        self.enc[f"{side}x{side}_conv"] = MPConv(config.channels + 1, widths[0], 3)
        for step in steps(widths[0], widths, config.blocks):
            kind, size = step.kind, side >> step.level
            attends = kind == "in0" or (kind in ("encoder", "decoder") and size in config.attention)
            drop = config.dropout_up_to is None or size <= config.dropout_up_to
            part = self.enc if kind in ("encoder", "down") else self.dec
            part[step.name(side)] = EDM2Block(
                step.c_in,
                step.c_out,
                emb_width,
                config,
                "encoder" if part is self.enc else "decoder",
                resample=kind if kind in ("down", "up") else "keep",
                attention=attends,
                dropout=config.dropout if drop else 0.0,
            )
        self.out_conv = MPConv(widths[0], config.channels, 3)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        context = read_text(self.text, conditions)
        with full_precision(x):
            emb = self.embed(t, context, **conditions)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # the constant channel takes the place of biases
        kept = []
        for name, stage in self.enc.items():
            x = stage(x) if name.endswith("_conv") else stage(x, emb, context)
            kept.append(x)
        for name, stage in self.dec.items():
            if "_block" in name:
                x = mp_cat(x, kept.pop())
            x = stage(x, emb, context)
        return self.out_conv(x, gain=self.out_gain)

    def embed(self, t: Tensor, context: Context | None = None, **conditions: Tensor) -> Tensor:
        """The embedding `(b, e)` of time and conditions, in float32 or higher."""
        config = self.config
        check_told(self, conditions)
        precision = torch.promote_types(self.out_gain.dtype, torch.float32)
        clock = c_noise(t, config.time_map, self.sigma_data)
        features = self.emb_fourier(clock) if config.time_embedding == "fourier" else self.emb_positional(clock)
        emb = self.emb_noise(features.to(precision))
        if self.emb_label is not None:
            emb = mp_sum(emb, self.emb_label(one_hot(conditions.get("label"), emb, config.num_classes)))
        if context is not None:
            emb = mp_sum(emb, self.emb_text(unit_magnitude(context.pooled.to(precision))))
        for name in config.takes:
            module, embedding = EMBEDDINGS[name]
            told, gain = f"emb_{module}", getattr(self, f"emb_{module}_gain")
            features = getattr(self, f"{told}_features")(embedding.number(t, conditions[name])).to(precision)
            emb = (emb + gain * getattr(self, told)(features)) / torch.sqrt(1 + gain**2)
        return mp_silu(emb)


class EDM2(nn.Module):
    """`F(x, t, **conditions)` for images or latents; see the module docstring for its two forms.

    The output gain starts at zero: zero velocity before training. `normalize_weights` belongs before every training step.

    Shapes: x `(b, channels, h, w)` of unit variance, h and w multiples of `2^(levels - 1)`, t `(b,)`, conditions as in
    `Conditioning`; result like x.

    Raises:
        UserError: for images of another channel count or of sides that the levels do not divide, conditions that are missing or
            superfluous, or a configuration that makes no sense.
    """

    def __init__(self, config: EDM2Config, sigma_data: float = 0.5) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.sigma_data = sigma_data
        self.takes, self.null = config.conditioning.takes_all, config.conditioning.null
        self.unet = EDM2UNet(config, sigma_data)
        self.logvar_fourier = MPFourier(config.log_variance_width)
        self.logvar_linear = MPConv(config.log_variance_width, 1)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        check_images(x, self.config.channels)
        step = 2 ** (len(self.config.mult) - 1)
        if x.shape[2] % step or x.shape[3] % step or 0 in x.shape[2:]:
            raise UserError(
                f"images of {x.shape[2]} x {x.shape[3]} for a network of {len(self.config.mult)} levels; expected sides that "
                f"are multiples of {step}; resize the images"
            )
        return self.unet(x, t, **conditions)

    def log_variance(self, t: Tensor) -> Tensor:
        """The learned log variance of the diffusion error at time t, `-w(t)`; shapes `(b,)` to `(b,)`.

        A function of `log(sd tan t) / 4` in both forms, because no tangent passes through it.
        Source: Karras et al. 2024 (the uncertainty u(sigma) of its training loss).
        """
        with full_precision(t):
            precision = torch.promote_types(self.unet.out_gain.dtype, torch.float32)
            features = self.logvar_fourier(c_noise(t, "log", self.sigma_data))
            return self.logvar_linear(features.to(precision))[:, 0]

    def normalize_weights(self) -> None:
        """Forced weight normalization: every filter to unit magnitude, in place; the function stays as it is.

        Source: Karras et al. 2024, equation 66.
        """
        for module in self.modules():
            if isinstance(module, MPConv):
                module.normalize_weight()

    def for_sampling(self, dtype: torch.dtype | None = None) -> EDM2:
        """A copy whose weights are normalized once instead of in every forward: the same function, not to be trained.

        Args:
            dtype: what convolutions are kept in, such as bfloat16; None for float32. All else stays as it is.
        """
        layers = [m for m in self.modules() if isinstance(m, MPConv)]
        fixed = {id(m): FixedConv(m, dtype if m.weight.ndim == 4 else None) for m in layers}
        return copy.deepcopy(self, fixed)  # type: ignore[arg-type]


def check_config(config: EDM2Config) -> None:
    """Raise a UserError for the first setting that makes no sense."""
    check_levels(config)
    check_at_least_one(config, "head_width", "log_variance_width")
    step = 2 ** (len(config.mult) - 1)
    fits = config.resolution >= step and config.resolution % step == 0
    check_setting(fits, "resolution", config.resolution, f"a multiple of {step}, for {len(config.mult)} levels")
    check_setting(config.modulation in get_args(Modulation), "modulation", config.modulation, "gain or double")
    check_setting(not config.shift or config.modulation == "double", "shift", config.shift, "False with modulation gain")
    check_setting(config.clip > 0, "clip", config.clip, "a positive number")
    check_conditioning(config.conditioning)
