"""The one sampler of flow maps: jumps between times, with as much fresh noise between them as `gamma` says.

From `t_i` the network jumps to t', and fresh noise leads up again to the next time `t_{i+1} >= t'`, with
`tan t' = sqrt(1 - gamma^2) tan t_{i+1}`::

    x_{t_{i+1}} = (cos t_{i+1} / cos t') f(x, t_i -> t') + sqrt(sin^2 t_{i+1} - cos^2 t_{i+1} tan^2 t') z

With gamma = 0, t' is the next time and nothing is random: multistep models and MeanFlow. With gamma = 1, t' is 0: consistency
sampling. The last jump ends at 0.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from trigflow.process import HALF_PI, TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.runtime.values import number, row
from trigflow.samplers.guidance import JumpFunction


def landing(time: float, gamma: float) -> tuple[float, float, float]:
    """`(t', cos t / cos t', s)` of a jump with fresh noise of factor s after it, which together lead to `time`.

    `cos t / cos t' = sqrt(cos^2 t + (1 - gamma^2) sin^2 t)` and `s = gamma sin t`, which is the square root of
    `sin^2 t - cos^2 t tan^2 t'`: neither takes a difference.
    """
    kept = math.sqrt(1 - gamma**2)
    end = time if gamma == 0 else math.atan2(kept * math.sin(time), math.cos(time))
    return end, math.hypot(math.cos(time), kept * math.sin(time)), gamma * math.sin(time)


@torch.no_grad()
def flow_map_sample(
    velocity: JumpFunction,
    process: TrigFlow,
    noise: Tensor,
    times: Sequence[float],
    *,
    gamma: float = 0.0,
    generator: torch.Generator | None = None,
    fresh: Sequence[Tensor] | None = None,
) -> Tensor:
    """Jump from time to time and from the last one to 0, with noise between the jumps. NFE = len(times).

    Args:
        velocity: of the network, `velocity(x_t, t, end)` with t and end `(b,)` in the dtype of the state.
        process: gives `sd` of the fresh noise.
        noise: `z ~ N(0, sd^2 I)`, `(b, ...)`, as from `process.sample_noise`. Computed in float32 or higher.
        times: decreasing, in (0, pi/2]; `consistency_times`, `segment_times`, `meanflow_times`, or your own.
        gamma: in [0, 1], from jumps without noise to consistency sampling.
        generator: draws the fresh noise; needed from two steps on where gamma > 0, unless `fresh` is given.
        fresh: the fresh noise itself, `N(0, sd^2 I)`, one tensor like `noise` for each step after the first.

    Returns:
        Samples `(b, ...)` in float32 or higher.

    Raises:
        UserError: if times or gamma are not as above, there is no source of fresh noise, or `fresh` does not fit.

    Source: Kim et al. 2024 (consistency trajectory models, arXiv 2310.02279), for gamma.
    """
    grid = [float(t) for t in row("times", times)]
    _check(noise, grid, gamma, generator, fresh)
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for k, (t, after) in enumerate(pairwise([*grid, 0.0])):
        end, keep, add = landing(after, gamma)
        start, stop = (torch.full((len(x),), time, dtype=x.dtype, device=x.device) for time in (t, end))
        x = process.ddim_step(x, velocity(x, start, stop), t, end)
        if add > 0:
            z = fresh[k] if fresh is not None else process.sample_noise(x, generator)
            x = (keep * x).add_(z.to(x), alpha=add)
    return x


def _check(
    noise: Tensor, times: list[float], gamma: float, generator: torch.Generator | None, fresh: Sequence[Tensor] | None
) -> None:
    if not times or times[0] > HALF_PI or not all(s < t for t, s in pairwise([*times, 0.0])):
        shown = ", ".join(f"{t:.4g}" for t in times)
        raise UserError(f"times ({shown}); expected one or more decreasing times in (0, pi/2]; use meanflow_times")
    number(gamma=gamma)
    if not 0 <= gamma <= 1:
        raise UserError(f"gamma={gamma}; expected a number in [0, 1]; use 0 for jumps without fresh noise")
    if len(times) > 1 and gamma > 0 and generator is None and fresh is None:
        raise UserError(
            f"no source of fresh noise for {len(times)} steps; expected a torch.Generator or fresh noise; pass generator"
        )
    if fresh is not None and [z.shape for z in fresh] != [noise.shape] * (len(times) - 1):
        raise UserError(
            f"fresh noise of shapes {[tuple(z.shape) for z in fresh]}; expected {len(times) - 1} tensors of shape "
            f"{tuple(noise.shape)}, one for each step after the first; correct fresh or pass a generator"
        )
