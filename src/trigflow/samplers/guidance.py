"""Velocity functions: what a sampler integrates, made from a network.

A velocity function is `velocity(x_t, t) -> v` with x_t `(b, ...)`, t `(b,)` and v of the shape of x_t. Everything a network
wants to know beside these (label, guidance scale) is bound here, once, so that samplers know nothing about it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from trigflow.errors import UserError
from trigflow.process import TrigFlow

VelocityFunction = Callable[[Tensor, Tensor], Tensor]
"""`velocity(x_t, t) -> dx_t/dt`; shapes `(b, ...)` and `(b,)` to `(b, ...)`."""


class Network(Protocol):
    """`F(x_t / sd, t, label, guidance)`: unit variance in and out, label int64 `(b,)`, guidance `(b,)`, both optional."""

    def __call__(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None, /
    ) -> Tensor: ...


def network_velocity(
    network: Network,
    process: TrigFlow,
    label: int | Tensor | None = None,
    guidance: float | Tensor | None = None,
) -> VelocityFunction:
    """`v = sd F(x_t / sd, t, label, guidance)`, one evaluation per call.

    For a consistency student, and for a teacher without guidance. A student distilled from a guided teacher takes the scale
    as an input (attribute `takes_guidance`), so guidance costs it nothing.

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
    sd = process.sigma_data

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        scales = None if guidance is None else per_sample(guidance, x_t, x_t.dtype, "guidance scales")
        classes = None if label is None else per_sample(label, x_t, torch.int64, "labels")
        return sd * network(x_t / sd, t, classes, scales).to(x_t.dtype)

    return velocity


def guided_velocity(
    network: Network,
    process: TrigFlow,
    label: int | Tensor,
    scale: float | Tensor,
    null_label: int | None = None,
) -> VelocityFunction:
    """Classifier-free guidance: `v = sd F_s`, `F_s = F_uncond + s (F_cond - F_uncond)`.

    Both branches run in one call on a batch of 2b (unconditional half first), which counts as two evaluations. When every
    scale is exactly 1 the unconditional branch has no influence and is left out.

    Args:
        network: a class-conditional `Network`, without guidance input.
        process: gives `sd`.
        label: one class for all samples, or int64 `(b,)`.
        scale: s, one number or `(b,)`; 1 is the conditional model, 0 the unconditional one.
        null_label: index that means "no class"; the network's own `null_label` unless given.

    Raises:
        UserError: if there is no null label, the network takes the scale as an input, or, when called, labels or scales do
            not match the batch.

    Source: Ho and Salimans 2022 (arXiv 2207.12598), with s = 1 + w of its equation 6.
    """
    if null_label is None:
        null_label = getattr(network, "null_label", None)
    if null_label is None:
        raise UserError(
            "guidance for a network without a null label; expected a class-conditional network trained with label dropout; "
            "pass null_label or use network_velocity"
        )
    if getattr(network, "takes_guidance", False):
        raise UserError(
            "classifier-free guidance for a network that takes the scale as an input; expected one without; "
            "use network_velocity with guidance"
        )
    if bool(torch.all(torch.as_tensor(scale) == 1)):
        return network_velocity(network, process, label)
    sd = process.sigma_data

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        cond = per_sample(label, x_t, torch.int64, "labels")
        labels = torch.cat([torch.full_like(cond, null_label), cond])
        x = x_t / sd
        f_uncond, f_cond = network(torch.cat([x, x]), torch.cat([t, t]), labels, None).to(x_t.dtype).chunk(2)
        s: float | Tensor = scale
        if isinstance(scale, Tensor):
            s = per_sample(scale, x_t, x_t.dtype, "guidance scales").reshape(-1, *[1] * (x_t.ndim - 1))
        return sd * (f_uncond + s * (f_cond - f_uncond))

    return velocity


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
