"""Velocity functions: what a sampler integrates, made from a network.

A velocity function is `velocity(x_t, t) -> v` with x_t `(b, ...)`, t `(b,)` and v of the shape of x_t. Everything a network
wants to know beside these is bound here, once, so that samplers know nothing about it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trigflow.conditions import check_told, joined, null, null_rows, pick, rows_of, takes
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.runtime.values import row
from trigflow.tangent import is_traced

VelocityFunction = Callable[[Tensor, Tensor], Tensor]
"""`velocity(x_t, t) -> dx_t/dt`; shapes `(b, ...)` and `(b,)` to `(b, ...)`."""

JumpFunction = Callable[..., Tensor]
"""`velocity(x_t, t, end) -> v`, also told the end of the jump, `(b,)`; a `VelocityFunction` where that is left out."""

Network = Callable[..., Tensor]
"""`F(x_t / sd, t, **conditions)`: unit variance in and out; see `trigflow.conditions`."""


def network_velocity(network: Network, process: TrigFlow, conditions: Mapping[str, Any] | None = None) -> JumpFunction:
    """`v = sd F(x_t / sd, t, **conditions)`, one evaluation per call.

    For a student, and for a teacher without guidance. A student distilled from a guided teacher takes the scale as one of its
    conditions, so guidance costs it nothing.

    The function takes the end `(b,)` of a jump as an optional third argument, and tells it a network that takes `end`. Where
    none is given, it is t itself: a jump of no length.

    Args:
        network: see `Network`.
        process: gives `sd`.
        conditions: by name, `(b, ...)`, or a number or one row for all samples. What can be left out is "none" then.

    Raises:
        UserError: for conditions that the network does not take or misses, an end among them, or, when called, for conditions
            that do not match the batch.
    """
    told, sd, told_end = conditions or {}, process.sigma_data, "end" in takes(network)
    check_told(network, told, later=("end",))
    if "end" in told:
        raise UserError("end among the conditions; expected it as the third argument of the velocity; drop it there")

    def velocity(x_t: Tensor, t: Tensor, end: Tensor | None = None) -> Tensor:
        ends = {"end": t if end is None else end} if told_end else {}
        return sd * network(x_t / sd, t, **rows_of(told, x_t), **ends).to(x_t.dtype)

    return velocity


def guided_velocity(
    network: Network,
    process: TrigFlow,
    conditions: Mapping[str, Any] | None,
    scale: float | Tensor,
    *,
    negative: Network | None = None,
    interval: tuple[float, float] | None = None,
) -> VelocityFunction:
    """Guidance by extrapolation away from a negative: `v = sd F_s`, `F_s = F_neg + s (F - F_neg)`.

    ============================  ===========================================  ====================================
    guidance                      F_neg                                        source
    ============================  ===========================================  ====================================
    classifier-free (default)     `network` at `{**conditions, **null}`        Ho and Salimans 2022, with s = 1 + w
    autoguidance (`negative`)     `negative`, told what it takes of the same   Karras et al. 2024, arXiv 2406.02507
    ============================  ===========================================  ====================================

    The negative of autoguidance is a worse version of the network: smaller, or trained for less time. It may be
    unconditional; and it can guide a network without conditions.

    With an `interval` of noise levels, guidance acts where `lo <= sd tan(t) <= hi`, both ends included, and elsewhere
    `F_s = F` (Kynkaanniemi et al. 2024, arXiv 2404.07724). Only samples inside need the second evaluation, and a call with
    none inside makes no second evaluation at all; compiled, all have one. The same happens when the scale is the number 1.

    Classifier-free guidance evaluates both branches in one call, the negative ones first: a batch of 2b where all samples
    are inside the interval. Either way one guided sample counts as two evaluations.

    Args:
        network: a `Network` that does not take the scale itself; for classifier-free guidance, one with `null`.
        process: gives `sd`.
        conditions: as in `network_velocity`; for classifier-free guidance, some that can be left out.
        scale: s, one number or `(b,)`; 1 is the network itself, 0 the negative.
        negative: network of autoguidance, on the same data and of the same `sd`; None for classifier-free guidance.
        interval: `(lo, hi)`, EDM noise levels with `0 <= lo < hi`; `hi` may be infinite. None guides everywhere. It is
            stated in sigma, like `sigma_min`, `sigma_max` and the published intervals, so that it does not depend on sd.

    Raises:
        UserError: if there is nothing to guide away from, a network takes the scale itself, the interval is none, or,
            when called, conditions or scales do not match the batch.
    """
    told, sd = conditions or {}, process.sigma_data
    if any("guidance" in takes(net) for net in (network, negative)):
        raise UserError(
            "guidance by two evaluations for a network that takes the scale itself; expected one without; "
            "use network_velocity with the condition guidance"
        )
    if negative is None and not null(network).keys() & told.keys():
        raise UserError(
            f"guidance away from nothing: of the conditions {', '.join(told) or '(none)'} the network can leave out "
            f"{', '.join(null(network)) or 'none'}; expected one that was trained with some left out, or a negative network; "
            "pass it, or use network_velocity"
        )
    check_told(network, told)
    if negative is not None:
        check_told(negative, takes(negative) & told.keys())
    bounds = None if interval is None else time_interval(process, interval)
    if not isinstance(scale, Tensor) and scale == 1:
        return network_velocity(network, process, told)

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        b, x, positive = len(x_t), x_t / sd, rows_of(told, x_t)
        s = rows_of({"guidance": scale}, x_t)["guidance"].reshape(-1, *[1] * (x_t.ndim - 1))
        inside = None if bounds is None else inside_interval(t, bounds)
        every = inside is None or is_traced()  # a compiled function cannot branch on times
        chosen = torch.arange(b, device=x.device) if every else inside.nonzero()[:, 0]  # type: ignore[union-attr]
        if not len(chosen):
            return sd * network(x, t, **positive).to(x_t.dtype)
        x_in, t_in = x[chosen], t[chosen]
        if negative is not None:
            f = network(x, t, **positive).to(x_t.dtype)
            known = {name: value for name, value in positive.items() if name in takes(negative)}
            f_neg = negative(x_in, t_in, **pick(known, chosen)).to(x_t.dtype)
        else:
            none = null_rows(network, x_t)
            without = joined(pick({**positive, **none}, chosen), {**none, **positive})
            both = network(torch.cat([x_in, x]), torch.cat([t_in, t]), **without).to(x_t.dtype)
            f_neg, f = both.split([len(chosen), b])
        if every and inside is not None:
            return sd * torch.where(inside.reshape(s.shape), f_neg + s * (f - f_neg), f)
        return sd * f.index_copy(0, chosen, f_neg + s[chosen] * (f[chosen] - f_neg))

    return velocity


def time_interval(process: TrigFlow, interval: tuple[float, float]) -> tuple[float, float]:
    """The times `(atan(lo / sd), atan(hi / sd))` of an interval of EDM noise levels.

    Raises:
        UserError: unless `0 <= lo < hi`.
    """
    low, high = row("guidance interval", interval, 2)
    if not 0 <= low < high:
        raise UserError(
            f"guidance interval ({low:g}, {high:g}); expected two noise levels sigma with 0 <= low < high; "
            "correct the guidance interval"
        )
    return math.atan(low / process.sigma_data), math.atan(high / process.sigma_data)


def inside_interval(t: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Which of the times `(b,)` lie in `[low, high]`; the ends are rounded as t is, so that a time at an end is inside."""
    low, high = torch.tensor(bounds, dtype=torch.float64).to(t.dtype)
    return (t >= low) & (t <= high)
