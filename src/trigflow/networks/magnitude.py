"""Magnitude-preserving layers: a network of them keeps the root mean square of its activations near one.

Each takes inputs of unit magnitude (root mean square, over channels or over the batch) to an output of unit magnitude, so
that nothing grows over the depth of the network or over the training run, and no other normalization is needed.

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024 (EDM2), section 2.3
and appendix B.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.networks.embeddings import PositionalEmbedding

EPS = 1e-4
"""Added to every magnitude that is divided by."""


def unit_magnitude(x: Tensor, dim: int | tuple[int, ...] = 1) -> Tensor:
    """`x / (rms(x) + eps)`, the root mean square over `dim`: over channels (the default) this is pixel normalization.

    The magnitude is computed in float32 or higher. Source: Karras et al. 2024, appendix B.
    """
    dims = (dim,) if isinstance(dim, int) else dim
    count = math.prod([x.shape[d] for d in dims])
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (norm * (1 / math.sqrt(count)) + EPS).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """`silu(x) / 0.596`: unit magnitude for x ~ N(0, 1). Source: Karras et al. 2024, equation 81."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """`((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)`: a weighted sum that keeps the magnitude of uncorrelated terms.

    Source: Karras et al. 2024, equation 88.
    """
    norm = math.hypot(1 - t, t)
    return a * ((1 - t) / norm) + b * (t / norm)


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """`[w_a a, w_b b]` along the channels: unit magnitude, and a and b matter to what follows in the ratio (1 - t) : t.

    With `n_a` and `n_b` channels, `w_a = c (1 - t) / sqrt(n_a)`, `w_b = c t / sqrt(n_b)` and
    `c = sqrt((n_a + n_b) / ((1 - t)^2 + t^2))`. Source: Karras et al. 2024, equation 103.
    """
    n_a, n_b = a.shape[1], b.shape[1]
    c = math.sqrt(n_a + n_b) / math.hypot(1 - t, t)
    return torch.cat([a * (c * (1 - t) / math.sqrt(n_a)), b * (c * t / math.sqrt(n_b))], dim=1)


class MPFourier(nn.Module):
    """`sqrt(2) cos(w_i x + p_i)`, `w_i ~ 2 pi N(0, scale^2)`, `p_i ~ 2 pi U[0, 1]`, fixed at construction and saved.

    Shapes: `(b,)` to `(b, width)`. Source: Karras et al. 2024, equation 75.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * scale * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2) * torch.cos(x[:, None] * self.freqs + self.phases)


class MPPositional(PositionalEmbedding):
    """`sqrt(2) [cos(w_i x), sin(w_i x)]`, the positional features of `PositionalEmbedding` at unit magnitude."""

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2) * super().forward(x)


class MPConv(nn.Module):
    """A convolution (or linear layer) without bias whose filters act as unit vectors, whatever their length.

    The forward divides every filter by its length, so gradients are orthogonal to the filters and an optimizer step can only
    lengthen them, which would lower the effective learning rate step by step. `normalize_weight` takes that length out
    again (forced weight normalization). It leaves the function as it is, and belongs once before every training step.
    `kernel` is the side of the kernel, odd; None makes a linear layer.

    Shapes: `(b, c_in, h, w)` to `(b, c_out, h, w)`, or `(b, c_in)` to `(b, c_out)`. Source: Karras et al. 2024, equations 47
    and 66.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int | None = None) -> None:
        super().__init__()
        shape = (c_out, c_in) if kernel is None else (c_out, c_in, kernel, kernel)
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """The layer times `gain`; its filters are cast to the dtype of x."""
        return convolve(x, self.filters(gain).to(x.dtype))

    def filters(self, gain: Tensor | float = 1.0) -> Tensor:
        """The weight at unit length times `gain`, in float32 or higher."""
        w = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        length = torch.linalg.vector_norm(w.flatten(1), dim=1) + EPS * math.sqrt(w[0].numel())
        return w * (gain / length).reshape(-1, *[1] * (w.ndim - 1))

    @torch.no_grad()
    def normalize_weight(self) -> None:
        """Give every filter unit magnitude, in place."""
        self.weight.copy_(unit_magnitude(self.weight, tuple(range(1, self.weight.ndim))))


class FixedConv(nn.Module):
    """An `MPConv` whose filters are computed once and kept in `dtype`, None for float32 or higher: the same function, for
    sampling and not for training."""

    fixed: Tensor

    def __init__(self, layer: MPConv, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        filters = layer.filters().detach()
        self.register_buffer("fixed", filters if dtype is None else filters.to(dtype))

    def forward(self, x: Tensor, gain: Tensor | float | None = None) -> Tensor:
        y = convolve(x, self.fixed.to(x.dtype))
        return y if gain is None else y * gain


def convolve(x: Tensor, w: Tensor) -> Tensor:
    """A linear layer or a convolution of the same size, by the shape of its weight."""
    return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)
