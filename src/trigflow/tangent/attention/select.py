"""The one function for the tangent of attention, and which implementation computes it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trigflow.tangent.attention import chunked, operators, plain
from trigflow.tangent.errors import error

IMPLEMENTATIONS = ("auto", "plain", "chunked", "triton")

PLAIN_SCORES = {"cpu": 1 << 20}
"""By kind of device, the number of scores up to which plain attention is as fast as chunked; otherwise `MOST_SCORES`."""
MOST_SCORES = 1 << 24

_NAMED: ContextVar[str] = ContextVar("attention_implementation", default="auto")


@contextmanager
def attention_implementation(name: str) -> Iterator[None]:
    """While open, attention tangents in this thread are computed by the implementation `name`.

        with attention_implementation("chunked"):
            out, tangent = jvp(net, (x,), (dx,))

    * `"plain"`: the matrix of weights in memory; serves every case, dropout included.
    * `"chunked"`: memory linear in the sequence length, on any device; every case but dropout.
    * `"triton"`: one kernel on CUDA devices, for float16, bfloat16 and float32, up to 256 features a head, causal or
      with a boolean mask over keys `(b, 1, 1, s)`, without dropout.
    * `"auto"`, the default: triton where it serves, else plain for few scores and chunked for many.

    Raises:
        TangentError: if there is no such implementation; and, when attention is met that the named one cannot compute.
    """
    token = _NAMED.set(_known(name))
    try:
        yield
    finally:
        _NAMED.reset(token)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    mask: Tensor | None = None,
    dmask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
    dropped: Tensor | None = None,
    out: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    r"""Derivative of `o = P v`, `P = softmax(S)`, `S = scale q k^T + mask`, along `(dq, dk, dv, dmask)`::

        dS = scale (dq k^T + q dk^T) + dmask
        do = (P * dS) v + P dv - rowsum(P * dS) o

    Half-precision inputs are computed with sums in float32, as the fused kernels of PyTorch do inside, and returned in
    their own dtype. Rows in which every key is masked give zero.

    Args:
        q: queries `(..., h, l, e)`.
        k: keys `(..., h or g, s, e)`.
        v: values `(..., h or g, s, c)`.
        dq: tangent of the queries, None for zero; `dk` and `dv` likewise.
        mask: boolean (True: take part) or added to the scores, broadcast to `(..., h, l, s)`.
        dmask: tangent of an added mask.
        key_mask: boolean `(b, s)`, the same as the mask `(b, 1, 1, s)`.
        causal: let query i see keys 0..i only.
        scale: factor of the scores; `1 / sqrt(e)` by default.
        grouped: fewer heads in k and v than in q; each serves `h / g` neighbouring query heads.
        dropped: the weights after dropout, where there was dropout: `P` times the scaled mask.
        out: the output o if it is known, which can save computing it.
        implementation: "plain", "chunked", "triton" or "auto"; by default what `attention_implementation` says.

    Returns:
        `do`, `(..., h, l, c)`.

    Raises:
        TangentError: if the named implementation is unknown or cannot compute this case.
    """
    if key_mask is not None:
        if mask is not None:
            raise error("both mask and key_mask", "expected one of them", "combine them into one mask")
        mask = key_mask[:, None, None, :]
    name = _NAMED.get() if implementation is None else _known(implementation)
    if name == "auto":
        name = _choose(q, k, v, mask, dmask, dropped)
    elif name == "chunked" and dropped is not None:
        raise _cannot(name, "dropout", "attention without dropout")
    elif name == "triton":
        reason = _triton_lacks(q, k, v, mask, dmask, dropped)
        if reason is not None:
            raise _cannot(name, *reason)
    settings: dict[str, Any] = {"causal": causal, "scale": scale, "grouped": grouped}
    if name == "plain":
        return plain.attention(q, k, v, dq, dk, dv, mask=mask, dmask=dmask, dropped=dropped, out=out, **settings)
    if name == "chunked" and operators.traced():
        tensors = (None if t is None else t.detach() for t in (q, k, v, dq, dk, dv, mask, dmask, out))
        return operators.attention_tangent(*tensors, causal, scale, grouped)
    if name == "chunked":
        return chunked.attention(q, k, v, dq, dk, dv, mask=mask, dmask=dmask, out=out, **settings)
    keep = None if mask is None else _over_keys(mask)
    return _kernel().attention(q, k, v, dq, dk, dv, keep=keep, **settings)


def _known(name: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise error(
            f"attention implementation {name!r} does not exist",
            f"expected one of {', '.join(IMPLEMENTATIONS)}",
            'pass "auto" to have it chosen',
        )
    return name


def _cannot(name: str, what: str, expected: str) -> Exception:
    return error(
        f"the {name} implementation of attention cannot compute {what}",
        f"expected {expected}",
        'choose another with trigflow.tangent.attention_implementation, or leave the choice to "auto"',
    )


def _choose(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dmask: Tensor | None, dropped: Tensor | None) -> str:
    """The implementation for this case: by device, then by the number of scores."""
    if dropped is not None:
        return "plain"
    spills = q.dtype == torch.float32 and max(q.shape[-1], v.shape[-1]) > 128  # too much for the registers: slow
    if q.is_cuda and not spills and _triton_lacks(q, k, v, mask, dmask, dropped) is None:
        return "triton"
    scores = q.shape[:-1].numel() * k.shape[-2]
    return "plain" if scores <= PLAIN_SCORES.get(q.device.type, MOST_SCORES) else "chunked"


def _triton_lacks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dmask: Tensor | None, dropped: Tensor | None
) -> tuple[str, str] | None:
    """What of this case the kernel cannot compute, and what it could; None if it can."""
    if dropped is not None:
        return "dropout", "attention without dropout"
    if dmask is not None or (mask is not None and _over_keys(mask) is None):
        return "this mask", "a boolean mask over keys (b, 1, 1, s), or causal attention"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) or not q.dtype == k.dtype == v.dtype:
        return f"{q.dtype}, {k.dtype}, {v.dtype}", "queries, keys and values all float16, bfloat16 or float32"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"heads of {max(q.shape[-1], v.shape[-1])} features", "at most 256"
    if any(
        x.ndim < 2 or x.stride(-2) * x.shape[-2] >= 1 << 31 or type(x) not in (Tensor, torch.nn.Parameter)
        for x in (q, k, v)
    ):
        return "tensors of this kind", "ordinary strided tensors of less than 2^31 elements a head"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (interpreted or (q.is_cuda and _capable(q.device))):
        return f"tensors on {q.device}", "a CUDA device of compute capability 8.0 or more"
    if _kernel() is None:
        return "anything here, because the package triton cannot be imported", "an installed triton"
    return None


def _over_keys(mask: Tensor) -> Tensor | None:
    """The mask `(b or 1, s)` that a boolean `(b, 1, 1, s)` stands for, written out or broadcast; None for any other."""
    if mask.dtype != torch.bool or mask.ndim > 4:
        return None
    while mask.ndim < 4:
        mask = mask.unsqueeze(0)
    if any(mask.shape[axis] != 1 and mask.stride(axis) != 0 for axis in (1, 2)):
        return None
    return mask[:, 0, 0]


@cache
def _capable(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _kernel() -> Any:
    """The module of the kernel, or None where triton is missing; imported when first needed."""
    try:
        return importlib.import_module("trigflow.tangent.attention.triton")
    except ImportError:
        return None
