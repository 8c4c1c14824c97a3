"""What every objective shares: the result type, adaptive weighting, and the call of a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trigflow import tangent as tangent_engine
from trigflow.process import HALF_PI, TrigFlow

Network = Callable[..., Any]
"""`network(x_t / sd, t, label, guidance) -> F`, tensors of the batch; with a fifth argument `end` where it has the attribute
`takes_end`; see trigflow.networks."""

VelocityFunction = Callable[[Tensor, Tensor], Tensor]
"""`velocity(x_t, t) -> dx_t/dt`, t of shape `(b,)`."""


NEAREST = 1e-6
"""Distance that `AdaptiveWeight` keeps from the ends of the quarter circle."""


HEADROOM = 64.0
"""How much larger than float16 allows a tangent may be; see `derivative_along`."""


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
        self.register_buffer("frequencies", torch.randn(features, generator=generator), persistent=False)
        self.register_buffer("phases", torch.rand(features, generator=generator), persistent=False)
        self.linear = nn.Linear(features, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        t = t.clamp(NEAREST, HALF_PI - NEAREST)
        c_noise = torch.log(self.process.sigma_from_time(t)) / 4
        angle = 2 * math.pi * (c_noise[:, None] * self.frequencies + self.phases)
        with torch.autocast(device_type=t.device.type, enabled=False):
            return self.linear(math.sqrt(2) * torch.cos(angle))[:, 0]


def weighted_mean(
    error: Tensor, t: Tensor, weight: Callable[[Tensor], Tensor] | None, prior: Tensor | None = None
) -> Tensor:
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


def derivative_along(
    function: Callable[..., Tensor], point: tuple[Tensor, ...], directions: tuple[Tensor, ...], method: str = "exact"
) -> tuple[Tensor, Tensor]:
    """`function(*point)` and its derivative along the directions, by `trigflow.tangent.jvp`.

    Under float16 autocast the derivative of a steep network can exceed 65504, the largest number, where the values do not. But
    it is linear in the directions: these are made 64 times smaller, and the result, in float32, larger again. As 64 is a power
    of two, nothing is rounded by that but what is smaller than 4e-3, to multiples of 4e-6.

    Args:
        function: takes and returns tensors `(b, ...)`.
        point: its arguments.
        directions: like these.
        method: exact or finite-difference.

    Returns:
        The value on the autograd graph, and the derivative, detached.
    """
    device = point[0].device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    half = autocast and torch.get_autocast_dtype(device) == torch.float16
    if not half or method != "exact":
        return tangent_engine.jvp(function, point, directions, method=method)
    value, derivative = tangent_engine.jvp(function, point, tuple(direction / HEADROOM for direction in directions))
    return value, HEADROOM * derivative.float()
