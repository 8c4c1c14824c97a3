"""MeanFlow: a network of average velocities, from data or from a teacher.

MeanFlow lives on the straight path `z_tau = (1 - tau) x0 + tau z` with data and noise of the same standard deviation sd, and
learns the average velocity of its PF-ODE between two times, `z_r = z_tau - (tau - r) u(z_tau, r, tau)`. On the quarter circle
of this package, with `x_t = cos(t) x0 + sin(t) z`, `m(t) = cos(t) + sin(t)` and r the time of the end s of the jump::

    z_tau   = x_t / m(t),    tau = sin(t) / m(t)    so    tan(t) = tau / (1 - tau)  and  dt/dtau = m(t)^2
    tau - r = sin(t - s) / (m(t) m(s))

The straight path has velocity `z - x0 = (sin(t) - cos(t)) x_t + m(t) dx_t/dt`. A TrigFlow network that is also told where the
jump ends takes the place of `dx_t/dt`::

    u = (sin(t) - cos(t)) x_t + m(t) sd F(x_t / sd, t, label, guidance, s)

At s = t a teacher's weights are the teacher's velocity, so they are an exact start. Put into the jump above, this u gives
`x_s = cos(t - s) x_t - sin(t - s) sd F`: a jump of MeanFlow is a DDIM step with a network that knows its length.

Source: Geng, Deng, Bai, Kolter and He 2025, "Mean Flows for One-step Generative Modeling", arXiv 2505.13447.
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


@dataclass(frozen=True)
class MeanFlowConfig:
    """Times, ends and weighting of MeanFlow. The defaults are the paper's for ImageNet 256; for CIFAR-10 it has mean -2,
    std 2, equal 0.25 and power 0.75."""

    mean: float = -0.4
    """Of the logit of tau, `log tan(t)`, from which both ends of a jump are drawn."""
    std: float = 1.0
    """Its standard deviation."""
    equal: float = 0.75
    """Share of samples whose end is their time: plain flow matching."""
    weighting: Literal["error", "learned"] = "error"
    """error: each sample is weighted by 1 / (||error||^2 + c)^power; learned: by w(t), where adaptive_weight is on."""
    power: float = 1.0
    """Power p of the weighting by the error; 0 for none."""
    c: float = 1e-3
    """Its constant c."""

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Times t and ends s of n jumps, `0 < s <= t < pi/2`: two logit-normal times in order, `equal` of them with s = t.

        Float32, each `(n,)`, on the generator's device.
        """
        device = generator.device if generator is not None else None
        logit = self.mean + self.std * torch.randn(2, n, generator=generator, device=device)
        end, t = torch.atan(torch.exp(logit)).sort(dim=0).values
        equal = torch.rand(n, generator=generator, device=device) < self.equal
        return t, torch.where(equal, t, end)


def average_velocity(x_t: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """`u = (sin(t) - cos(t)) x_t + (cos(t) + sin(t)) v`, on the straight path, of `v = sd F` on the quarter circle.

    Args:
        x_t: noisy sample, `(b, ...)`.
        velocity: `sd F(x_t / sd, t, ..., s)`, like x_t.
        t: time, scalar or `(b,)`.
    """
    cos, sin = trig(t, x_t)
    return (sin - cos) * x_t + (cos + sin) * velocity


def meanflow_error(
    network: Network,
    process: TrigFlow,
    x_t: Tensor,
    dxdt: Tensor,
    t: Tensor,
    end: Tensor,
    *,
    label: Tensor | None = None,
    guidance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`F` on the autograd graph and how far u is from its target, in units of sd, in one pass of the tangent engine.

    The target is `v - (tau - r) du/dtau` with `v = z - x0` and the derivative along it, `v d_z u + d_tau u`. With
    `dt/dtau = m(t)^2`, the definition of u and `d = t - s`, sines and cosines combine to::

        u - v + (tau - r) du/dtau = m(t)^2 / m(s) [ cos(d) (sd F - dx_t/dt) + sin(d) (x_t + sd dF/dt) ]

    which is `-m(t)^2 / m(s)` times the derivative along the trajectory of the jump `cos(d) x_t - sin(d) sd F`: MeanFlow asks,
    as consistency models do, that the end of a jump does not depend on where on the trajectory it starts. At s = t it is
    `m(t) (sd F - dx_t/dt)`, the error of flow matching.

    Args:
        network: called once as `network(x_t / sd, t, label, guidance, end)`.
        process: gives sd.
        x_t: point of the trajectory, `(b, ...)`.
        dxdt: its velocity on the quarter circle, like x_t.
        t: times `(b,)`.
        end: ends s of the jumps, `(b,)`, at most t.
        label: int64 `(b,)` or None.
        guidance: guidance scale `(b,)`, an input of the network, or None.

    Returns:
        `(F, error)`, both like x_t; the error is detached.
    """
    sd = process.sigma_data
    cos, sin = trig(t, x_t)
    cos_end, sin_end = trig(end, x_t)
    cos_d, sin_d = trig(t - end, x_t)
    scale = (cos + sin) ** 2 / (cos_end + sin_end)
    along = scale * sin_d

    def forward(x: Tensor, time: Tensor) -> Tensor:
        return network(x, time, label, guidance, end)

    directions = ((along * dxdt / sd).to(x_t.dtype), along.reshape(t.shape).to(t.dtype))
    prediction, derivative = derivative_along(forward, (x_t / sd, t), directions)
    with torch.no_grad():
        fixed = prediction.detach().to(x_t.dtype)
        error = scale * cos_d * (fixed - dxdt / sd) + along * x_t / sd + derivative
    return prediction, error


def meanflow_loss(
    network: Network,
    process: TrigFlow,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    end: Tensor,
    *,
    teacher: VelocityFunction | None = None,
    label: Tensor | None = None,
    guidance: Tensor | None = None,
    config: MeanFlowConfig | None = None,
    weight: Callable[[Tensor], Tensor] | None = None,
) -> Loss:
    """MeanFlow from data (`teacher=None`) or from a teacher's velocity::

        L = E[ omega || (u - sg(v - (tau - r) du/dtau)) / sd ||^2 ],    omega = 1 / sg(|| ... ||^2 + c)^p

    with `sg` stopping gradients and the square summed over the elements of a sample, in units of sd, in which the noise has
    variance one as in the paper. With the learned weighting it is `E[ exp(w(t)) / D || ... ||^2 - w(t) ]` instead.

    Args:
        network: of average velocities, called as `network(x_t / sd, t, label, guidance, end)`.
        process: the TrigFlow process.
        x0: data `(b, ...)`, standard deviation sd.
        noise: `z ~ N(0, sd^2 I)`, like x0.
        t: times `(b,)` in (0, pi/2).
        end: ends of the jumps `(b,)` in (0, t]; see `MeanFlowConfig.draw`.
        teacher: velocity function of the teacher, guidance included; evaluated without gradients. None for the data's.
        label: int64 `(b,)` or None.
        guidance: guidance scale `(b,)`, an input of the student, or None.
        config: weighting; the paper's by default.
        weight: `w(t)`, `(b,)` to `(b,)`, of the learned weighting; None for no weighting then.

    Returns:
        Loss with figures `t`, `loss` (mean square of the error per element, in units of sd) and `tangent_norm` (root mean
        square of `(tau - r) du/dtau` likewise, 0 where s = t), each `(b,)`.

    Source: Geng et al. 2025, sections 4.1 and 4.3 (weighting: of Geng et al. 2024, arXiv 2406.14548), algorithm 1.
    """
    config = config or MeanFlowConfig()
    with torch.no_grad():
        x_t = process.interpolate(x0, noise, t)
        dxdt = process.velocity(x0, noise, t) if teacher is None else teacher(x_t, t).to(x_t.dtype)
    prediction, error = meanflow_error(network, process, x_t, dxdt, t, end, label=label, guidance=guidance)
    cos, sin = trig(t, x_t)
    average = (cos + sin) * prediction  # u / sd but for a term that no weight changes
    with torch.no_grad():
        target = average - error
        correction = error - average + (cos + sin) * dxdt / process.sigma_data
    mean_square = per_sample_mean_square(average - target)
    figures = as_figures(t=t, loss=mean_square, tangent_norm=per_sample_mean_square(correction).sqrt())
    if config.weighting == "learned":
        return Loss(weighted_mean(mean_square, t, weight), figures)
    square = mean_square * x_t[0].numel()
    omega = (square.detach() + config.c) ** -config.power
    return Loss((omega * square).mean(), figures)
