"""The quarter circle cut into segments, each of which a multistep consistency model crosses in one evaluation.

M segments of equal length have the ends `0 = s_0 < s_1 < ... < s_M = pi/2`, `s_k = (k / M) pi/2`, and segment k holds the times
`s_k < t <= s_{k+1}`: a time at an end belongs to the segment below it, so that a jump that lands on an end goes on from
there. Time 0, which nothing jumps from, counts to the first.

Source: Heek et al. 2024 (Multistep Consistency Models, arXiv 2403.06807), even segments of the angle; Lu and Song 2025.
"""

import torch
from torch import Tensor

from trigflow.process import HALF_PI, TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.runtime.values import whole


def segment_ends(segments: int) -> tuple[float, ...]:
    """`s_0, ..., s_M`: M + 1 increasing times, the first exactly 0 and the last exactly pi/2 (as Python has it).

    Raises:
        UserError: if segments < 1.
    """
    whole(segments=segments)
    if segments < 1:
        raise UserError(f"{segments} segments of the quarter circle; expected at least 1; raise segments")
    return tuple(HALF_PI * (k / segments) for k in range(segments + 1))


def segment_bounds(t: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """Lower and upper end `(s_k, s_{k+1})` of the segment `(s_k, s_{k+1}]` that each time lies in.

    The ends are rounded to the dtype of t before they are compared, so a time that was made from an end is at that end in
    every precision. Times are in [0, pi/2], of any shape, float32 or higher; the result is two tensors like them.

    Raises:
        UserError: if segments < 1.
    """
    ends = torch.tensor(segment_ends(segments), dtype=torch.float64).to(t.device, t.dtype)
    above = torch.bucketize(t.detach(), ends).clamp(1, segments)  # the first end that is not below t
    return ends[above - 1], ends[above]


def segment_times(process: TrigFlow, segments: int) -> tuple[float, ...]:
    """The times that the jumps of a multistep model begin at: `t_max, s_{M-1}, ..., s_1`, and the last jump ends at 0.

    Raises:
        UserError: if segments < 1, or so many that `t_max` lies below the last segment, which then could not be entered.
    """
    ends = segment_ends(segments)
    if not ends[-2] < process.t_max:
        raise UserError(
            f"{segments} segments of the quarter circle, the last of which begins at {ends[-2]:.4f}; expected it to begin "
            f"below t_max = {process.t_max:.4f}; use fewer segments or raise process.sigma_max"
        )
    return (process.t_max, *reversed(ends[1:-1]))
