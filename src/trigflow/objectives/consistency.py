"""The continuous-time consistency objective: sCT from data, sCD from a teacher.

The consistency function `f(x_t, t) = cos(t) x_t - sin(t) sd F(x_t / sd, t)` maps any point of a PF-ODE trajectory to its
beginning, so its total derivative along the trajectory is zero. The loss moves F against that derivative, the *tangent*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trigflow.objectives.common import (
    Loss,
    Network,
    VelocityFunction,
    as_figures,
    derivative_along,
    per_sample_mean_square,
    weighted_mean,
)
from trigflow.process import TrigFlow, trig
from trigflow.runtime.errors import UserError


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

    def warmup_factor(self, iteration: int) -> float:
        """`r = min(1, iteration / H)`."""
        return 1.0 if self.warmup <= 0 else min(1.0, iteration / self.warmup)

    def prior_weight(self, t: Tensor) -> Tensor | None:
        """`cos(t)^prior`, like t, or None where all times weigh the same."""
        return None if self.prior == 0 else torch.cos(t).clamp_min(0) ** self.prior


def shape_tangent(g: Tensor, config: TangentConfig) -> Tensor:
    """Normalize, clip or leave the tangent g `(b, ...)`; see `TangentConfig`. Source: Lu and Song 2025, section 4.2.

    Raises:
        UserError: for an unknown mode.
    """
    if config.mode == "normalize":
        return g / (_sample_norm(g) + config.c)
    if config.mode == "clip":
        return g.clamp(-config.limit, config.limit)
    if config.mode == "raw":
        return g
    raise UserError(f"unknown tangent mode '{config.mode}'; expected normalize, clip or raw; correct tangent.mode")


def consistency_tangent(
    network: Network,
    process: TrigFlow,
    x_t: Tensor,
    dxdt: Tensor,
    t: Tensor,
    *,
    label: Tensor | None = None,
    guidance: Tensor | None = None,
    end: Tensor | None = None,
    r: float = 1.0,
    derivative: str = "exact",
) -> tuple[Tensor, Tensor]:
    """`F` on the autograd graph and the tangent `g`, in one pass of the tangent engine::

        g = -cos^2(t) (sd F- - dx_t/dt) - r cos(t) sin(t) (x_t + sd dF-/dt)

    `cos(t) sin(t) dF-/dt` is a single Jacobian-vector product of F- at `(x_t / sd, t)` with tangents
    `(cos(t) sin(t) dx_t/dt / sd, cos(t) sin(t))`: nothing is divided by cos or sin, so half precision survives near 0 and
    pi/2. At `r = 1`, `g = cos(t) df/dt`: zero when f is constant along the trajectory.

    A multistep model jumps to the `end` s of its segment of the trajectory, not to its beginning, and s is the same for all t
    of the segment. The product rule gives::

        f(x_t, t -> s) = cos(t - s) x_t - sin(t - s) sd F
        df/dt = -sin(t - s) x_t + cos(t - s) dx_t/dt - cos(t - s) sd F - sin(t - s) sd dF/dt
        g     = cos(t - s) df/dt
              = -cos^2(t - s) (sd F - dx_t/dt) - cos(t - s) sin(t - s) (x_t + sd dF/dt)

    which is the tangent above with `t - s` for t in its cosines and sines, and nowhere else.

    Args:
        network: called once as `network(x_t / sd, t, label, guidance)`, with `end` as a fifth argument where it has the
            attribute `takes_end`.
        x_t: point of the trajectory, `(b, ...)`.
        dxdt: its velocity, like x_t.
        t: times `(b,)`.
        end: s of each sample, `(b,)`, at most t; None for 0.
        r: tangent warmup factor in [0, 1].
        derivative: method of `trigflow.tangent.jvp`, exact or finite-difference.

    Returns:
        `(F, g)`, both like x_t; g is detached.

    Source: Lu and Song 2025, section 4.2 and algorithm 1.
    """
    sd = process.sigma_data
    cos, sin = trig(t if end is None else t - end, x_t)
    cos_sin = cos * sin
    ends = (torch.zeros_like(t) if end is None else end,) if getattr(network, "takes_end", False) else ()

    def forward(x: Tensor, time: Tensor) -> Tensor:
        return network(x, time, label, guidance, *ends)

    directions = ((cos_sin * dxdt / sd).to(x_t.dtype), cos_sin.reshape(t.shape).to(t.dtype))
    prediction, change = derivative_along(forward, (x_t / sd, t), directions, derivative)
    with torch.no_grad():
        fixed = prediction.detach().to(x_t.dtype)
        g = -(cos**2) * (sd * fixed - dxdt) - r * (cos_sin * x_t + sd * change)
    return prediction, g


def consistency_loss(
    network: Network,
    process: TrigFlow,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    teacher: VelocityFunction | None = None,
    label: Tensor | None = None,
    guidance: Tensor | None = None,
    end: Tensor | None = None,
    tangent: TangentConfig | None = None,
    r: float = 1.0,
    weight: Callable[[Tensor], Tensor] | None = None,
) -> Loss:
    """Continuous-time consistency training (sCT, `teacher=None`) or distillation (sCD)::

        L = E[ cos(t)^p ( exp(w(t)) / D || F - F- - g ||^2 - w(t) ) ]

    with p = `tangent.prior` and g from `consistency_tangent`, shaped by `tangent`, along `dx_t/dt = v` (sCT) or
    `teacher(x_t, t)` (sCD).

    Args:
        network: the student, called as `network(x_t / sd, t, label, guidance)`.
        process: the TrigFlow process.
        x0: data `(b, ...)`, standard deviation sd.
        noise: `z ~ N(0, sd^2 I)`, like x0.
        t: times `(b,)` in (0, pi/2).
        teacher: velocity function of the teacher, guidance included; evaluated without gradients. None for sCT.
        label: int64 `(b,)` or None.
        guidance: guidance scale `(b,)`, an input of the student, or None.
        end: where each sample jumps to, `(b,)`, at most t; None for 0. See `multistep_loss`.
        tangent: how g is shaped; normalized with c = 0.1 by default.
        r: tangent warmup factor in [0, 1].
        weight: `w(t)`, `(b,)` to `(b,)`; None for no weighting.

    Returns:
        Loss with figures `t`, `loss` and `tangent_norm` (of g before shaping, root mean square per element), each `(b,)`.

    Source: Lu and Song 2025, section 4.2, algorithm 1, with p = 0.
    """
    with torch.no_grad():
        x_t = process.interpolate(x0, noise, t)
        dxdt = process.velocity(x0, noise, t) if teacher is None else teacher(x_t, t).to(x_t.dtype)
    tangent = tangent or TangentConfig()
    prediction, g = consistency_tangent(
        network, process, x_t, dxdt, t, label=label, guidance=guidance, end=end, r=r, derivative=tangent.derivative
    )
    with torch.no_grad():
        target = prediction.detach() + shape_tangent(g, tangent)
    error = per_sample_mean_square(prediction - target)
    figures = as_figures(t=t, loss=error, tangent_norm=per_sample_mean_square(g).sqrt())
    prior = tangent.prior_weight(t if end is None else t - end)
    return Loss(weighted_mean(error, t, weight, prior), figures)


def _sample_norm(g: Tensor) -> Tensor:
    """`||g||` over each sample, broadcastable over g."""
    return torch.linalg.vector_norm(g.flatten(1), dim=1).reshape(-1, *[1] * (g.ndim - 1))
