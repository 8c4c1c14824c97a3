"""Velocity functions: what a sampler integrates, made from a network.

A velocity function is `velocity(x_t, t) -> v` with x_t `(b, ...)`, t `(b,)` and v of the shape of x_t. Everything a network
wants to know beside these (label, guidance scale) is bound here, once, so that samplers know nothing about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError

VelocityFunction = Callable[[Tensor, Tensor], Tensor]
"""`velocity(x_t, t) -> dx_t/dt`; shapes `(b, ...)` and `(b,)` to `(b, ...)`."""

JumpFunction = Callable[..., Tensor]
"""`velocity(x_t, t, end) -> v`, also told the end of the jump, `(b,)`; a `VelocityFunction` where that is left out."""

Network = Callable[..., Tensor]
"""`F(x_t / sd, t, label, guidance)`: unit variance in and out, label int64 `(b,)`, guidance `(b,)`, both optional. With the
attribute `takes_end`, `F(x_t / sd, t, label, guidance, end)`, end `(b,)`."""


def network_velocity(
    network: Network,
    process: TrigFlow,
    label: int | Tensor | None = None,
    guidance: float | Tensor | None = None,
) -> JumpFunction:
    """`v = sd F(x_t / sd, t, label, guidance)`, one evaluation per call.

    For a consistency student, and for a teacher without guidance. A student distilled from a guided teacher takes the scale
    as an input (attribute `takes_guidance`), so guidance costs it nothing.

    The function takes the end `(b,)` of a jump as an optional third argument, and passes it on to a network with the
    attribute `takes_end`; other networks are not told. Where none is given, it is t itself: a jump of no length.

    Args:
        network: see `Network`.
        process: gives `sd`.
        label: one class for all samples, or int64 `(b,)`; None for the unconditional network.
        guidance: one scale for all samples, or `(b,)`; only for a network that takes it.

    Raises:
        UserError: if guidance is given to a network without that input or missing for one with it, or, when called, if
            labels or scales do not match the batch.
    """
    takes_guidance = bool(getattr(network, "takes_guidance", False))
    if guidance is not None and not takes_guidance:
        raise UserError(
            "a guidance scale for a network that does not take one; expected guidance=None; "
            "call guided_velocity for classifier-free guidance, or drop the scale"
        )
    if guidance is None and takes_guidance:
        raise UserError(
            "no guidance scale for a network that takes one; expected a number or shape (b,); pass guidance (1.0 for none)"
        )
    takes_end = bool(getattr(network, "takes_end", False))
    sd = process.sigma_data

    def velocity(x_t: Tensor, t: Tensor, end: Tensor | None = None) -> Tensor:
        scales = None if guidance is None else per_sample(guidance, x_t, x_t.dtype, "guidance scales")
        classes = None if label is None else per_sample(label, x_t, torch.int64, "labels")
        ends = (t if end is None else end,) if takes_end else ()
        return sd * network(x_t / sd, t, classes, scales, *ends).to(x_t.dtype)

    return velocity


def guided_velocity(
    network: Network,
    process: TrigFlow,
    label: int | Tensor | None,
    scale: float | Tensor,
    *,
    null_label: int | None = None,
    negative: Network | None = None,
    interval: tuple[float, float] | None = None,
) -> VelocityFunction:
    """Guidance by extrapolation away from a negative: `v = sd F_s`, `F_s = F_neg + s (F - F_neg)`.

    ============================  =====================================  ====================================
    guidance                      F_neg                                  source
    ============================  =====================================  ====================================
    classifier-free (default)     `network` at the null label            Ho and Salimans 2022, with s = 1 + w
    autoguidance (`negative`)     `negative` at the same label           Karras et al. 2024, arXiv 2406.02507
    ============================  =====================================  ====================================

    The negative of autoguidance is a worse version of the network: smaller, or trained for less time. It may be
    unconditional, and then is not told the label; and it can guide a network without classes.

    With an `interval` of noise levels, guidance acts where `lo <= sd tan(t) <= hi`, both ends included, and elsewhere
    `F_s = F` (Kynkaanniemi et al. 2024, arXiv 2404.07724). Only samples inside need the second evaluation, and a call with
    none inside makes no second evaluation at all. The same happens when every scale is exactly 1.

    Classifier-free guidance evaluates both branches in one call, the negative ones first: a batch of 2b where all samples
    are inside the interval. Either way one guided sample counts as two evaluations.

    Args:
        network: a `Network` without guidance input; class-conditional for classifier-free guidance.
        process: gives `sd`.
        label: one class for all samples, or int64 `(b,)`; None for an unconditional network, with `negative`.
        scale: s, one number or `(b,)`; 1 is the network itself, 0 the negative.
        null_label: index that means "no class"; the network's own `null_label` unless given. Not with `negative`.
        negative: network of autoguidance, on the same data and of the same `sd`; None for classifier-free guidance.
        interval: `(lo, hi)`, EDM noise levels with `0 <= lo < hi`; `hi` may be infinite. None guides everywhere. It is
            stated in sigma, like `sigma_min`, `sigma_max` and the published intervals, so that it does not depend on sd.

    Raises:
        UserError: if there is nothing to guide away from, a network takes the scale as an input, the interval is none, or,
            when called, labels or scales do not match the batch.
    """
    if negative is None:
        null_label = getattr(network, "null_label", None) if null_label is None else null_label
        if null_label is None:
            raise UserError(
                "guidance for a network without a null label; expected a class-conditional network trained with label "
                "dropout, or a negative network; pass null_label or negative, or use network_velocity"
            )
        if label is None:
            raise UserError("guidance without a label; expected a class, or a negative network; pass label or negative")
    elif null_label is not None:
        raise UserError(
            "both null_label and negative; expected one, each says what to guide away from; drop one of them"
        )
    if any(getattr(net, "takes_guidance", False) for net in (network, negative)):
        raise UserError(
            "guidance by two evaluations for a network that takes the scale as an input; expected one without; "
            "use network_velocity with guidance"
        )
    bounds = None if interval is None else time_interval(process, interval)
    if bool(torch.all(torch.as_tensor(scale) == 1)):
        return network_velocity(network, process, label)
    sd = process.sigma_data

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        b = x_t.shape[0]
        classes = None if label is None else per_sample(label, x_t, torch.int64, "labels")
        s = per_sample(scale, x_t, x_t.dtype, "guidance scales").reshape(-1, *[1] * (x_t.ndim - 1))
        inside = None if bounds is None else inside_interval(t, bounds)
        if inside is not None and not bool(inside.any()):
            return sd * network(x_t / sd, t, classes, None).to(x_t.dtype)
        chosen = None if inside is None or bool(inside.all()) else inside.nonzero()[:, 0]

        def pick(value: Tensor) -> Tensor:
            return value if chosen is None else value[chosen]

        x = x_t / sd
        if negative is not None:
            f = network(x, t, classes, None).to(x_t.dtype)
            told = classes is not None and getattr(negative, "null_label", 0) is not None
            f_neg = negative(pick(x), pick(t), pick(classes) if told else None, None).to(x_t.dtype)  # type: ignore[arg-type]
        else:
            labels = torch.cat([torch.full_like(pick(classes), null_label), classes])  # type: ignore[arg-type, list-item]
            both = network(torch.cat([pick(x), x]), torch.cat([pick(t), t]), labels, None).to(x_t.dtype)
            f_neg, f = both.split([len(both) - b, b])
        guided = f_neg + pick(s) * (pick(f) - f_neg)
        return sd * (guided if chosen is None else f.index_copy(0, chosen, guided))

    return velocity


def time_interval(process: TrigFlow, interval: tuple[float, float]) -> tuple[float, float]:
    """The times `(atan(lo / sd), atan(hi / sd))` of an interval of EDM noise levels.

    Raises:
        UserError: unless `0 <= lo < hi`.
    """
    low, high = interval
    if not 0 <= low < high:
        raise UserError(
            f"guidance interval ({low:g}, {high:g}); expected two noise levels sigma with 0 <= low < high; "
            "correct the guidance interval"
        )
    return math.atan(low / process.sigma_data), math.atan(high / process.sigma_data)


def inside_interval(t: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Which of the times `(b,)` lie in `[low, high]`; the ends are rounded as t is, so that a time at an end is inside."""
    low, high = torch.tensor(bounds, dtype=torch.float64).to(t.dtype)
    return (t >= low.item()) & (t <= high.item())


def per_sample(value: float | Tensor, x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """One number per sample of the batch `x`, shape `(b,)`, from a number or a tensor of shape `()`, `(1,)` or `(b,)`.

    Raises:
        UserError: for any other shape; `what` names the value in the message.
    """
    batch = x.shape[0]
    if not isinstance(value, Tensor):
        return torch.full((batch,), value, dtype=dtype, device=x.device)
    if value.ndim > 1 or value.numel() not in (1, batch):
        raise UserError(
            f"{what} of shape {tuple(value.shape)} for a batch of {batch}; expected one number or shape ({batch},); "
            f"pass one per sample"
        )
    return value.to(device=x.device, dtype=dtype).expand(batch)
