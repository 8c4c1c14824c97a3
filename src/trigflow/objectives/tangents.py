"""The tangents of flow maps: toward what a network is moved, from a Jacobian-vector product of it.

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

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trigflow import tangent as tangent_engine
from trigflow.objectives.objective import TangentConfig, evaluate
from trigflow.process import TrigFlow, trig
from trigflow.runtime.errors import UserError
from trigflow.samplers.guidance import Network, VelocityFunction
from trigflow.tangent.dispatch import replayed_draws

HEADROOM = 64.0
"""How much larger than float16 allows a tangent may be; see `derivative_along`."""


def shape_tangent(g: Tensor, config: TangentConfig) -> Tensor:
    """Normalize, clip or leave the tangent g `(b, ...)`; see `TangentConfig`. Source: Lu and Song 2025, section 4.2.

    Raises:
        UserError: for an unknown mode.
    """
    if config.mode == "normalize":
        norm = torch.linalg.vector_norm(g.flatten(1), dim=1).reshape(-1, *[1] * (g.ndim - 1))
        return g / (norm + config.c)
    if config.mode == "clip":
        return g.clamp(-config.limit, config.limit)
    if config.mode == "raw":
        return g
    raise UserError(f"unknown tangent mode '{config.mode}'; expected normalize, clip or raw; correct tangent.mode")


def derivative_along(
    function: Callable[..., Tensor], point: tuple[Tensor, ...], directions: tuple[Tensor, ...], method: str = "exact"
) -> tuple[Tensor, Tensor]:
    """`function(*point)` on the autograd graph and, detached, its derivative along the directions: `trigflow.tangent.jvp` by
    this method.

    Under float16 autocast the derivative of a steep network can exceed 65504, the largest number, where the values do not. But
    it is linear in the directions: these are made 64 times smaller, and the result, in float32, larger again. As 64 is a power
    of two, nothing is rounded by that but what is smaller than 4e-3, to multiples of 4e-6.
    """
    device = point[0].device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    half = autocast and torch.get_autocast_dtype(device) == torch.float16
    if not half or method != "exact":
        return tangent_engine.jvp(function, point, directions, method=method)
    value, derivative = tangent_engine.jvp(function, point, tuple(direction / HEADROOM for direction in directions))
    return value, HEADROOM * derivative.float()


def jump(network: Network, process: TrigFlow, x_t: Tensor, t: Tensor, end: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
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
    r: float | Tensor = 1.0,
    derivative: str = "exact",
    semi_step: float = 0.0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`F` on the autograd graph, and the tangent `g = c df/dt` along the trajectory, detached::

        g = -c^2 (sd F - dx_t/dt) - r c k (x_t + sd dF/dt)

    `c k dF/dt` is one Jacobian-vector product, with tangents `(c k d / sd, c k)` of x and t, d the direction. With a step h
    it is exact in x only, and in t a difference that needs one more evaluation, on the same dropout masks, and is exact for
    rotations::

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

    Returns:
        `(F, g)`, both like x_t; g is detached.

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
        with torch.no_grad():
            h = torch.minimum(torch.full_like(t, semi_step), t / 2)
            cos_h, sin_h = trig(h, x_t)
        with replayed_draws(x_t.device, []) as draws:
            prediction, change = derivative_along(lambda x: forward(x, t), (x_t / sd,), (dx,), derivative)
            draws.rewind()
            with torch.no_grad():
                before = forward(x_t / sd, t - h).to(x_t.dtype)
        with torch.no_grad():
            change = change + along / sin_h * (cos_h * prediction.detach().to(x_t.dtype) - before)
    else:
        prediction, change = derivative_along(forward, (x_t / sd, t), (dx, dt), derivative)
    with torch.no_grad():
        fixed = prediction.detach().to(x_t.dtype)
        first = c**2 if scale is c else scale * c
        g = -first * (sd * fixed - dxdt) - r * (along * x_t + sd * change)
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
    r: float | Tensor = 1.0,
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
    network: Network, process: TrigFlow, x_t: Tensor, t: Tensor, middle: Tensor, end: Tensor, conditions: Mapping[str, Tensor]
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
