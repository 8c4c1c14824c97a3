"""Drawing from a network of average velocities (MeanFlow) in one or a few evaluations, without fresh noise.

`x_s = cos(t - s) x_t - sin(t - s) v(x_t, t, s)` jumps from time t to time s; see `trigflow.objectives.meanflow`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from trigflow.process import HALF_PI, TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.samplers.guidance import JumpFunction


def meanflow_times(process: TrigFlow, steps: int) -> tuple[float, ...]:
    """Default times for `steps` evaluations: even in the time `tau = sin t / (cos t + sin t)` of the straight path.

    `tau = 1, (n-1)/n, ..., 1/n` as `t = atan(tau / (1 - tau))`, where the first, pi/2, is `t_max` instead::

        1 step    (t_max,)
        2 steps   (t_max, pi/4)

    Raises:
        UserError: if steps < 1.
    """
    if steps < 1:
        raise UserError(f"{steps} sampling steps; expected at least 1; raise steps")
    return (process.t_max, *(math.atan2(steps - k, k) for k in range(1, steps)))


@torch.no_grad()
def meanflow_sample(velocity: JumpFunction, process: TrigFlow, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Jump from time to time and from the last one to 0, `z_r = z_tau - (tau - r) u`. NFE = len(times).

    Args:
        velocity: of the network, `velocity(x_t, t, end)` with t and end `(b,)` in the dtype of the state.
        process: the TrigFlow process.
        noise: `z ~ N(0, sd^2 I)`, `(b, ...)`, as from `process.sample_noise`. Computed in float32 or higher.
        times: decreasing, in (0, pi/2]; see `meanflow_times`.

    Returns:
        Samples `(b, ...)` in float32 or higher.

    Raises:
        UserError: if times are not as above.

    Source: Geng et al. 2025 (arXiv 2505.13447), section 4.1 and algorithm 2.
    """
    grid = [*map(float, times), 0.0]
    if len(grid) == 1 or grid[0] > HALF_PI or not all(end < t for t, end in pairwise(grid)):
        shown = ", ".join(f"{t:.4g}" for t in times)
        raise UserError(f"times ({shown}); expected one or more decreasing times in (0, pi/2]; use meanflow_times")
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for t, end in pairwise(grid):
        start, stop = (torch.full((x.shape[0],), time, dtype=x.dtype, device=x.device) for time in (t, end))
        x = process.ddim_step(x, velocity(x, start, stop), t, end)
    return x
