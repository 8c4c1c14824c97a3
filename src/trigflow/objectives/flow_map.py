"""Flow maps: networks that jump from any time t of a trajectory to an earlier one s, and three ways to train them.

With `c = cos(t - s)` and `k = sin(t - s)`, a network that is told both ends of its jump moves a point by::

    f(x_t, t -> s) = c x_t - k sd F(x_t / sd, t, s)

so `f(x, t -> t) = x` for any F, and `F(., t, t)` is the diffusion network. Its jumps follow the PF-ODE of velocity v if one of

    =============  =======================================  ==========================================
    Eulerian       the end does not depend on the start     `d/dt f(x_t, t -> s) = 0` along v
    Lagrangian     the end moves along the trajectory       `d/ds f(x_t, t -> s) = v(f, s)`
    semigroup      two jumps are one                        `f(f(x_t, t -> u), u -> s) = f(x_t, t -> s)`
    =============  =======================================  ==========================================

holds. Each becomes a tangent g, toward which F is moved, and which near s = t is the error of diffusion, `-(sd F - v)`.

Sources: Lu and Song 2025 (arXiv 2410.11081); Sabour et al. 2025 (AYF, arXiv 2506.14603); Boffi et al. 2025 (arXiv 2505.18825);
Geng et al. 2025 (MeanFlow, arXiv 2505.13447).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from trigflow.objectives.consistency import TangentConfig, shape_tangent
from trigflow.process import TrigFlow, trig
from trigflow.runtime.errors import UserError
from trigflow.segments import segment_bounds


@dataclass(frozen=True)
class FlowMapConfig:
    """Residual, velocity, jumps and shape of a flow-map loss. The defaults are those of an any-step student (AYF-EMD)."""

    residual: Literal["eulerian", "lagrangian", "semigroup"] = "eulerian"
    """Which of the three conditions is asked for."""
    velocity: Literal["data", "teacher", "self"] = "teacher"
    """Of the trajectory: cos(t) z - sin(t) x0, the teacher's, or the network's own F(x, t, t)."""
    jumps: Literal["zero", "segments", "any"] = "any"
    """Where jumps end: at 0, at the lower end of one of the segments, or anywhere below t."""
    segments: int = 1
    """Segments M of [0, pi/2], for jumps to their ends."""
    anchor: float = 0.0
    """Share of samples with s = t: diffusion, on the data's velocity or the teacher's."""
    direction: Literal["velocity", "self"] = "velocity"
    """Along what dF/dt is taken: the velocity of the residual, or the network's own, which varies less than the data's."""
    tangent: TangentConfig = field(default_factory=TangentConfig)
    """Shape, warmup and prior weight of the tangent."""
    semi_step: float = 0.0
    """h of the semi-continuous derivative, exact in x and a difference over h in t; 0 for one that is exact in both."""
    weighting: Literal["learned", "error"] = "learned"
    """learned: shaped tangents and w(t). error: MeanFlow's, raw errors weighted by 1 / (||error||^2 + c)^power."""
    power: float = 1.0
    """Power p of the weighting by the error."""
    c: float = 1e-3
    """Its constant c."""

    def check(self) -> None:
        """Refuse choices that contradict each other.

        Raises:
            UserError: naming the first setting that makes no sense.
        """
        anchored = self.anchor > 0
        checks = [
            (0 <= self.anchor <= 1, "anchor", self.anchor, "a share in [0, 1]"),
            (self.segments >= 1, "segments", self.segments, "at least 1"),
            (0 <= self.semi_step < 1, "semi_step", self.semi_step, "in [0, 1)"),
            (self.c > 0, "c", self.c, "a positive number"),
            (self.power >= 0, "power", self.power, "0 or more"),
            (self.residual != "lagrangian" or self.velocity != "data", "velocity", self.velocity,
             "teacher or self for the Lagrangian residual, which asks it where there are no data"),
            (self.residual != "semigroup" or anchored, "anchor", self.anchor, "above 0 for the semigroup residual"),
            (self.velocity != "self" or anchored, "anchor", self.anchor, "above 0 for velocity self"),
        ]  # fmt: skip
        for sound, name, value, expected in checks:
            if not sound:
                raise UserError(f"flow_map.{name}={value}; expected {expected}; correct flow_map.{name}")

    def ends(self, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Ends s of jumps from the times t, `(b,)`: as `jumps` says, `anchor` of them t itself."""

        def uniform() -> Tensor:
            device = generator.device if generator is not None else t.device
            return torch.rand(len(t), generator=generator, device=device, dtype=t.dtype).to(t.device)

        if self.jumps == "any":
            end = t * uniform()
        else:
            end = segment_bounds(t, self.segments if self.jumps == "segments" else 1)[0]
        return torch.where(uniform() < self.anchor, t, end) if self.anchor > 0 else end


def takes_end(network: Network) -> bool:
    """Whether the network is told the end of a jump."""
    return bool(getattr(network, "takes_end", False))


def evaluate(network: Network, x: Tensor, t: Tensor, end: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """`F(x, t, s)` of a network that takes the end, and `F(x, t)` of another. x has unit variance."""
    told = {"end": end} if takes_end(network) else {}
    return network(x, t, **conditions, **told)  # type: ignore[no-any-return]


def jump(
    network: Network, process: TrigFlow, x_t: Tensor, t: Tensor, end: Tensor, conditions: Mapping[str, Tensor]
) -> Tensor:
    """`f(x_t, t -> s) = cos(t - s) x_t - sin(t - s) sd F(x_t / sd, t, s)`; shapes `(b, ...)`, `(b,)`, `(b,)`."""
    prediction = evaluate(network, x_t / process.sigma_data, t, end, conditions).to(x_t.dtype)
    return process.ddim_step(x_t, process.sigma_data * prediction, t, end)


def own_velocity(network: Network, process: TrigFlow, conditions: Mapping[str, Tensor]) -> VelocityFunction:
    """`v(x_t, t) = sd sg F(x_t / sd, t, t)`: what the network itself says of the trajectory, without gradients."""

    @torch.no_grad()
    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        return process.sigma_data * evaluate(network, x_t / process.sigma_data, t, t, conditions).to(x_t.dtype)

    return velocity


def eulerian_tangent(
    network: Network,
    process: TrigFlow,
    x_t: Tensor,
    dxdt: Tensor,
    t: Tensor,
    end: Tensor,
    conditions: Mapping[str, Tensor],
    *,
    direction: Tensor | None = None,
    r: float = 1.0,
    derivative: str = "exact",
    semi_step: float = 0.0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`F` on the autograd graph, and the tangent `g = c df/dt` along the trajectory, detached::

        g = -c^2 (sd F - dx_t/dt) - r c k (x_t + sd dF/dt)

    `c k dF/dt` is one Jacobian-vector product, with tangents `(c k d / sd, c k)` of x and t, d the direction. With a step h
    it is exact in x only, and in t a difference that needs one more evaluation and is exact for rotations::

        dF/dt = (dF/dx) d / sd + (cos(h) F(x, t) - F(x, t - h)) / sin(h)

    Args:
        network: see `evaluate`.
        x_t: point of the trajectory, `(b, ...)`.
        dxdt: its velocity, like x_t.
        t: times `(b,)`.
        end: s, `(b,)`, at most t.
        conditions: everything else that the network is told, by name.
        direction: d, like x_t; None for dx_t/dt.
        r: tangent warmup factor in [0, 1].
        derivative: method of `trigflow.tangent.jvp`.
        semi_step: h, halved time where that is shorter; 0 for the exact derivative.
        scale: factor in place of the first c of every term, broadcastable over x_t.

    Source: Lu and Song 2025, section 4.2; of the difference Zheng et al. 2025 (rCM, arXiv 2510.08431).
    """
    sd = process.sigma_data
    c, k = trig(t - end, x_t)
    scale = c if scale is None else scale
    along = scale * k
    d = dxdt if direction is None else direction

    def forward(x: Tensor, time: Tensor) -> Tensor:
        return evaluate(network, x, time, end, conditions)

    dx, dt = (along * d / sd).to(x_t.dtype), along.reshape(t.shape).to(t.dtype)
    if semi_step > 0:
        prediction, change = derivative_along(lambda x: forward(x, t), (x_t / sd,), (dx,), derivative)
        with torch.no_grad():
            h = torch.minimum(torch.full_like(t, semi_step), t / 2)
            cos_h, sin_h = trig(h, x_t)
            before = forward(x_t / sd, t - h).to(x_t.dtype)
            change = change + along / sin_h * (cos_h * prediction.detach().to(x_t.dtype) - before)
    else:
        prediction, change = derivative_along(forward, (x_t / sd, t), (dx, dt), derivative)
    with torch.no_grad():
        fixed = prediction.detach().to(x_t.dtype)
        g = -scale * c * (sd * fixed - dxdt) - r * (along * x_t + sd * change)
    return prediction, g


def lagrangian_tangent(
    network: Network,
    process: TrigFlow,
    x_t: Tensor,
    velocity: VelocityFunction,
    t: Tensor,
    end: Tensor,
    conditions: Mapping[str, Tensor],
    *,
    r: float = 1.0,
    derivative: str = "exact",
) -> tuple[Tensor, Tensor]:
    """`F` on the autograd graph, and the tangent `g = -c (df/ds - v(f, s))`, detached::

        g = -c^2 sd F + c v(f, s) - r c k (x_t - sd dF/ds)

    `c k dF/ds` is one Jacobian-vector product with tangent `c k` of s alone. The velocity is asked at the network's own point.

    Args:
        velocity: `v(x, s)`, of a teacher or of the network itself; evaluated without gradients.

    Other arguments are those of `eulerian_tangent`. Source: Boffi et al. 2025; Sabour et al. 2025 (AYF-LMD).
    """
    sd = process.sigma_data
    c, k = trig(t - end, x_t)

    def forward(stop: Tensor) -> Tensor:
        return evaluate(network, x_t / sd, t, stop, conditions)

    prediction, change = derivative_along(forward, (end,), ((c * k).reshape(t.shape).to(t.dtype),), derivative)
    with torch.no_grad():
        fixed = prediction.detach().to(x_t.dtype)
        v = velocity(c * x_t - k * sd * fixed, end).to(x_t.dtype)
        g = -(c**2) * sd * fixed + c * v - r * (c * k * x_t - sd * change)
    return prediction, g


def semigroup_tangent(
    network: Network,
    process: TrigFlow,
    x_t: Tensor,
    t: Tensor,
    middle: Tensor,
    end: Tensor,
    conditions: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """`F` on the autograd graph, and `g = sd (F_target - F)`, detached, with the F that makes one jump of two, over time u.

    The two jumps have `F_1 = F(x_t / sd, t, u)` and `F_2 = F(f(x_t, t -> u) / sd, u, s)`, both without gradients. Put into
    `F_target = (c x_t - f(f(x_t, t -> u), u -> s)) / (k sd)`, x_t drops out but for a product of two sines::

        F_target = [ sin(t-u) cos(u-s) F_1 + sin(u-s) F_2 - sin(t-u) sin(u-s) x_t / sd ] / sin(t-s)

    where nothing small divides anything large. For s = t the target is F itself, and g zero.

    Args:
        middle: u, `(b,)`, between end and t.

    Other arguments are those of `eulerian_tangent`. Source: Frans et al. 2024 (arXiv 2410.12557); Boffi et al. 2025.
    """
    sd = process.sigma_data
    prediction = evaluate(network, x_t / sd, t, end, conditions)
    with torch.no_grad():
        fixed = prediction.detach().to(x_t.dtype)
        (_, k), (c1, k1), (c2, k2) = (trig(angle, x_t) for angle in (t - end, t - middle, middle - end))
        first = evaluate(network, x_t / sd, t, middle, conditions).to(x_t.dtype)
        second = evaluate(network, c1 * x_t / sd - k1 * first, middle, end, conditions).to(x_t.dtype)
        short = k == 0
        k = torch.where(short, torch.ones_like(k), k)
        target = (k1 / k) * c2 * first + (k2 / k) * second - (k1 / k) * k2 * x_t / sd
        g = torch.where(short, torch.zeros_like(fixed), sd * (target - fixed))
    return prediction, g


def flow_map_loss(
    network: Network,
    process: TrigFlow,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    end: Tensor,
    *,
    middle: Tensor | None = None,
    teacher: VelocityFunction | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    config: FlowMapConfig | None = None,
    r: float = 1.0,
    weight: Callable[[Tensor], Tensor] | None = None,
) -> Loss:
    """The loss of a flow map, whatever its residual::

        L = E[ cos(t - s)^p ( exp(w(t)) / D || F - sg(F) - shape(g) ||^2 - w(t) ) ]

    Samples with s = t are those of diffusion: their g is `-(sd F - v)`, of which no shape is changed, with the velocity of
    the teacher, or of the data where there is none. With the weighting by the error (MeanFlow), Eulerian errors are those of
    the average velocity in units of sd, `-m(t)^2 / m(s) df/dt / sd` with `m = cos + sin`, others are `g / sd`.

    Args:
        network: takes the end, unless every jump ends at 0 or at its segment's end.
        process: the TrigFlow process.
        x0: data `(b, ...)`, standard deviation sd.
        noise: `z ~ N(0, sd^2 I)`, like x0.
        t: times `(b,)` in (0, pi/2).
        end: `(b,)`, at most t; see `FlowMapConfig.ends`.
        middle: times `(b,)` of the semigroup residual; None for half way.
        teacher: velocity function of the teacher, guidance included; needed for velocity teacher.
        conditions: everything else that the network is told, by name.
        config: the choices.
        r: tangent warmup factor in [0, 1].
        weight: `w(t)`, `(b,)` to `(b,)`, of the learned weighting; None for none.

    Returns:
        Loss with figures `t`, `loss` and `tangent_norm` (root mean square of g before shaping), each `(b,)`.

    Raises:
        UserError: for choices that contradict each other, a missing teacher, or a network that has to be told the end.
    """
    config, told = config or FlowMapConfig(), conditions or {}
    config.check()
    if config.velocity == "teacher" and teacher is None:
        raise UserError("flow_map.velocity=teacher without a teacher; expected a velocity function; pass teacher")
    if not takes_end(network) and (config.jumps == "any" or config.anchor > 0 or config.residual != "eulerian"):
        raise UserError(
            "a network that is not told the end of its jumps; expected one that takes it; build it with takes_end"
        )
    shape = config.tangent
    own = own_velocity(network, process, told)
    anchored = (t == end).reshape(-1, *[1] * (x0.ndim - 1))
    scale, unit = None, 1.0
    with torch.no_grad():
        x_t = process.interpolate(x0, noise, t)
        v = process.velocity(x0, noise, t)
        if config.velocity == "teacher" and teacher is not None:
            v = teacher(x_t, t).to(x_t.dtype)
        anchor_v = v
        if config.velocity == "self" and config.residual == "eulerian":
            v = torch.where(anchored, v, own(x_t, t))
        (cos, sin), (cos_end, sin_end) = trig(t, x_t), trig(end, x_t)
        factor: Tensor | float = 1.0  # of F, in what the weighting by the error compares
        if config.weighting == "error":
            unit = process.sigma_data
            if config.residual == "eulerian":
                factor = cos + sin
                scale = factor**2 / (cos_end + sin_end)
    if config.residual == "eulerian":
        direction = own(x_t, t) if config.direction == "self" else None
        prediction, g = eulerian_tangent(
            network, process, x_t, v, t, end, told,
            direction=direction, r=r, derivative=shape.derivative, semi_step=config.semi_step, scale=scale,
        )  # fmt: skip
    elif config.residual == "lagrangian":
        asked = own if config.velocity == "self" or teacher is None else teacher
        prediction, g = lagrangian_tangent(network, process, x_t, asked, t, end, told, r=r, derivative=shape.derivative)
    else:
        middle = (t + end) / 2 if middle is None else middle
        prediction, g = semigroup_tangent(network, process, x_t, t, middle, end, told)
    with torch.no_grad():
        fixed = prediction.detach().to(x_t.dtype)
        if config.residual != "eulerian":
            g = torch.where(anchored, anchor_v - process.sigma_data * fixed, g)
        if config.weighting == "error":
            shaped = g / unit
        else:
            shaped = torch.where(anchored, g, shape_tangent(g, shape))
        target = factor * fixed + shaped
    error = per_sample_mean_square(factor * prediction - target)
    figures = as_figures(t=t, loss=error, tangent_norm=per_sample_mean_square(g).sqrt())
    if config.weighting == "error":
        square = error * x_t[0].numel()
        omega = (square.detach() + config.c) ** -config.power
        return Loss((omega * square).mean(), figures)
    return Loss(weighted_mean(error, t, weight, shape.prior_weight(t - end)), figures)
