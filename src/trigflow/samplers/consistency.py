"""Sampling a consistency model in one, two or a few evaluations.

`f(x_t, t) = cos(t) x_t - sin(t) v(x_t, t)` jumps from any time to data. More than one step means: add fresh noise to the
result and jump again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from trigflow.process import HALF_PI, TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.samplers.guidance import VelocityFunction


def consistency_times(process: TrigFlow, steps: int, t_mid: float = 1.1) -> tuple[float, ...]:
    """Default times for `steps` evaluations: `t_max`, then `t_mid` down towards 0 in equal distances.

    ::

        1 step    (t_max,)
        2 steps   (t_max, t_mid)                    t_mid = 1.1 in the paper
        n steps   (t_max, t_mid, t_mid (n-2)/(n-1), ..., t_mid / (n-1))

    From three steps on this is a starting point, not an optimum; `search_times` finds better ones for a given model.

    Raises:
        UserError: if steps < 1, or t_mid is not in (0, t_max) when it is used.

    Source: Lu and Song 2025 (two steps).
    """
    if steps < 1:
        raise UserError(f"{steps} sampling steps; expected at least 1; raise steps")
    if steps > 1 and not 0 < t_mid < process.t_max:
        raise UserError(
            f"t_mid={t_mid}; expected a time in (0, t_max={process.t_max:.4f}); use 1.1, the value of the paper"
        )
    return (process.t_max, *(t_mid * (steps - k) / (steps - 1) for k in range(1, steps)))


@torch.no_grad()
def consistency_sample(
    velocity: VelocityFunction,
    process: TrigFlow,
    noise: Tensor,
    times: Sequence[float],
    generator: torch.Generator | None = None,
    fresh: Sequence[Tensor] | None = None,
) -> Tensor:
    """`x0 = f(noise, times[0])`, then for every later time t: `x0 = f(cos(t) x0 + sin(t) z', t)`. NFE = len(times).

    Args:
        velocity: of the student, `velocity(x_t, t)` with t `(b,)` in the dtype of the state.
        process: gives `sd` of the fresh noise.
        noise: `z ~ N(0, sd^2 I)`, `(b, ...)`, as from `process.sample_noise`. Computed in float32 or higher.
        times: decreasing, in (0, pi/2]; see `consistency_times`.
        generator: draws the fresh noise `z'`; needed from two steps on, unless `fresh` is given.
        fresh: the fresh noise itself, `N(0, sd^2 I)`, one tensor of the shape of `noise` for each step after the first.

    Returns:
        Samples `(b, ...)` in float32 or higher.

    Raises:
        UserError: if times are not as above, there is no source of fresh noise, or `fresh` does not fit.

    Source: Song et al. 2023 (arXiv 2303.01469), algorithm 1; Lu and Song 2025.
    """
    grid = [float(t) for t in times]
    _check(noise, grid, generator, fresh)
    x0 = _jump(velocity, noise.to(torch.promote_types(noise.dtype, torch.float32)), grid[0])
    for k, t in enumerate(grid[1:]):
        z = fresh[k] if fresh is not None else process.sample_noise(x0, generator)
        x0 = _jump(velocity, (math.cos(t) * x0).add_(z.to(x0), alpha=math.sin(t)), t)
    return x0


def _jump(velocity: VelocityFunction, x_t: Tensor, t: float) -> Tensor:
    """The consistency function `f(x_t, t) = cos(t) x_t - sin(t) v`."""
    v = velocity(x_t, torch.full((x_t.shape[0],), t, dtype=x_t.dtype, device=x_t.device))
    return (math.cos(t) * x_t).sub_(v, alpha=math.sin(t))


def _check(
    noise: Tensor, times: list[float], generator: torch.Generator | None, fresh: Sequence[Tensor] | None
) -> None:
    if not times or not (times[-1] > 0 and times[0] <= HALF_PI) or not all(s < t for t, s in pairwise(times)):
        shown = ", ".join(f"{t:.4g}" for t in times)
        raise UserError(f"times ({shown}); expected one or more decreasing times in (0, pi/2]; use consistency_times")
    if len(times) > 1 and generator is None and fresh is None:
        raise UserError(
            f"no source of fresh noise for {len(times)} steps; expected a torch.Generator or fresh noise; pass generator"
        )
    if fresh is not None and [z.shape for z in fresh] != [noise.shape] * (len(times) - 1):
        raise UserError(
            f"fresh noise of shapes {[tuple(z.shape) for z in fresh]}; expected {len(times) - 1} tensors of shape "
            f"{tuple(noise.shape)}, one for each step after the first; correct fresh or pass a generator"
        )
