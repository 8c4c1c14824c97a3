"""Sampling a multistep consistency model: one evaluation for each of its segments, and no fresh noise.

`f(x_t, t -> s) = cos(t - s) x_t - sin(t - s) v(x_t, t, s)` jumps along the trajectory to the lower end s of the segment of t.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trigflow.process import TrigFlow
from trigflow.samplers.guidance import JumpFunction
from trigflow.segments import segment_jumps


@torch.no_grad()
def multistep_sample(velocity: JumpFunction, process: TrigFlow, noise: Tensor, segments: int) -> Tensor:
    """`x = f(x, t -> s)` for the jumps `t_max -> s_{M-1} -> ... -> s_1 -> 0` of M segments. NFE = M.

    Args:
        velocity: of the student, `velocity(x_t, t, end)` with t and end `(b,)` in the dtype of the state.
        process: gives `t_max`, where the first jump begins.
        noise: `z ~ N(0, sd^2 I)`, `(b, ...)`, as from `process.sample_noise`. Computed in float32 or higher.
        segments: M, the number the model was trained with; see `trigflow.segments`.

    Returns:
        Samples `(b, ...)` in float32 or higher, a function of the noise alone.

    Raises:
        UserError: if segments < 1, or too many for `t_max` to lie in the last.

    Source: Heek et al. 2024 (arXiv 2403.06807); Lu and Song 2025.
    """
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for t, end in segment_jumps(process, segments):
        times, ends = (torch.full((len(x),), time, dtype=x.dtype, device=x.device) for time in (t, end))
        v = velocity(x, times, ends)
        x = (math.cos(t - end) * x).sub_(v, alpha=math.sin(t - end))
    return x
