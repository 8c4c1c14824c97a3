"""One shape for the arguments of attention, whatever the number of leading axes: `(batch, heads, length, features)`."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trigflow.tangent.errors import error


@dataclass
class Arguments:
    """Attention of `(b, h, l, e)` queries to `(b, g, s, e)` keys and `(b, g', s, c)` values, views where possible.

    Attributes:
        q: queries; `k` keys; `v` values; `dq`, `dk`, `dv` their tangents or None.
        mask: `(b, h, l, s)` without memory of its own where it was broadcast; `dmask` likewise.
        shape: shape of the output.
        scale: factor of the scores.
        work: dtype of the arithmetic, float32 or float64.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    mask: Tensor | None
    dmask: Tensor | None
    shape: tuple[int, ...]
    scale: float
    work: torch.dtype


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    mask: Tensor | None,
    dmask: Tensor | None,
    scale: float | None,
    grouped: bool,
) -> Arguments:
    """The arguments of attention with four axes each.

    Raises:
        TangentError: if the numbers of heads or the lengths do not fit together.
    """
    two_axes = q.ndim == 2
    lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    q, dq = four_axes(q, lead), None if dq is None else four_axes(dq, lead)
    k, dk = four_axes(k, lead), None if dk is None else four_axes(dk, lead)
    v, dv = four_axes(v, lead), None if dv is None else four_axes(dv, lead)
    heads = max(q.shape[1], k.shape[1], v.shape[1])
    if q.shape[1] == 1:
        q, dq = (None if t is None else t.expand(-1, heads, -1, -1) for t in (q, dq))  # type: ignore[assignment]
    groups = (k.shape[1], v.shape[1])
    fits = all(heads % g == 0 for g in groups) if grouped else all(g in (1, heads) for g in groups)
    if q.shape[1] != heads or not fits or k.shape[2] != v.shape[2] or k.shape[3] != q.shape[3]:
        raise error(
            f"attention of queries {tuple(q.shape)} to keys {tuple(k.shape)} and values {tuple(v.shape)}",
            "expected (b, h, l, e), (b, h, s, e) and (b, h, s, c), or with grouped=True a number of heads that divides h",
            "check the axes of the three tensors",
        )
    full = (*lead, heads, q.shape[2], k.shape[2])
    mask, dmask = (None if m is None else four_axes(_third_axis(m), lead) for m in (mask, dmask))
    mask, dmask = (None if m is None else m.expand(-1, heads, *full[-2:]) for m in (mask, dmask))
    shape = (*lead, heads, q.shape[2], v.shape[3])
    work = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    return Arguments(q, k, v, dq, dk, dv, mask, dmask, shape[-2:] if two_axes else shape, scale, work)


def four_axes(x: Tensor, lead: torch.Size) -> Tensor:
    """`x` of two or more axes as `(b, h, l, e)`, its leading axes broadcast to `lead` and taken as one."""
    x = _third_axis(x)
    return x.expand(*lead, *x.shape[-3:]).reshape(math.prod(lead), *x.shape[-3:])


def _third_axis(x: Tensor) -> Tensor:
    while x.ndim < 3:
        x = x.unsqueeze(0)
    return x
