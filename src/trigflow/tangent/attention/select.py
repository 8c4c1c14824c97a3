"""The one function for the tangent of attention, and which implementation computes it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trigflow.tangent.attention import operators, plain
from trigflow.tangent.attention.blocks import blocks_of
from trigflow.tangent.errors import error

IMPLEMENTATIONS = ("auto", "plain", "chunked", "triton", "fused")

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
    * `"triton"`: one kernel on CUDA devices, for float16, bfloat16 and float32, up to 256 features a head, with any mask
      that has no tangent, without dropout.
    * `"fused"`: the same kernel for the output as well, and kernels for its gradients, in place of PyTorch's attention.
    * `"auto"`, the default: triton where it serves, else plain for few scores and chunked for many; fused only on CUDA,
      for many scores, where PyTorch has no fused kernel for the output (see `fused`).

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
        implementation: name as for `attention_implementation`, which decides by default; "fused" is "triton" here.

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
    elif name in ("triton", "fused"):
        name = "triton"
        reason = _triton_lacks(q, k, v, mask, dmask, dropped)
        if reason is not None:
            raise _cannot(name, *reason)
    if name == "plain":
        settings: dict[str, Any] = {"causal": causal, "scale": scale, "grouped": grouped}
        return plain.attention(q, k, v, dq, dk, dv, mask=mask, dmask=dmask, dropped=dropped, out=out, **settings)
    tensors = (q, k, v, dq, dk, dv, mask, dmask, out)
    if not operators.traced():
        return operators.tangent(*tensors, causal, scale, grouped, name)
    tensors = tuple(None if t is None else t.detach() for t in tensors)  # type: ignore[assignment]
    return operators.attention_tangent(*tensors, causal, scale, grouped, name)


def attention_with_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    mask: Tensor | None = None,
    blocks: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention on the graph, and its tangent without one, by one Triton kernel; gradients by another.

    It can be traced and compiled. The backward computes the weights again from q, k, v and the log-sum-exp of the scores,
    and keeps nothing of the tangent. Arguments as for `attention`, with four axes each, keys and values of as many heads,
    all float16, bfloat16 or float32 (autocast decides where it is on), and:

    Args:
        blocks: what is seen in blocks of 128 queries and keys, as by `trigflow.tangent.attention.blocks`; empty ones are
            passed over. By default it is made at every call from a mask that differs between queries.

    Returns:
        `(o, do)`, both `(b, h, l, c)`, zero where no key is seen.

    Raises:
        TangentError: if the kernels cannot compute this case, which the message names.
    """
    q, k, v = (t.to(_cast(t)) for t in (q, k, v))
    reason = _fused_lacks(q, k, v, mask, None)
    if reason is not None:
        raise _cannot("fused", *reason)
    mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
    if blocks is None and mask is not None and mask.stride(2) != 0:
        blocks = blocks_of(mask)
    moves = (None if t is None else t.detach() for t in (dq, dk, dv))
    out, tangent, _ = operators.attention_with_tangent(q, k, v, *moves, mask, blocks, causal, scale, grouped)
    return out, tangent


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dmask: Tensor | None, causal: bool, grouped: bool) -> bool:
    """Whether the output, too, is to be computed by `attention_with_tangent`, in place of PyTorch's attention.

    If "fused" was named, it is. By itself only on CUDA, for many scores, where all of PyTorch's fused kernels refuse the case
    (an added mask with grouped queries, for example) and it would put the matrix of weights into memory. Everywhere else the
    output and its gradients are, bit for bit, those of PyTorch.

    Raises:
        TangentError: if "fused" was named and the kernels cannot compute this case.
    """
    name, case = _NAMED.get(), (q, k, v, mask, dmask)
    if name == "fused":
        if (reason := _fused_lacks(*case)) is not None:
            raise _cannot(name, *reason)
        return True
    long = q.is_cuda and q.shape[:-1].numel() * k.shape[-2] > MOST_SCORES
    if name != "auto" or not long or _fused_lacks(*case) is not None or _choose(*case, None) != "triton":
        return False
    cuda = torch.backends.cuda
    if not (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled()):
        return False  # the unfused one was asked for
    q, k, v = (_as_cast(t) for t in (q, k, v))
    stock = cuda.SDPAParams(q, k, v, None if mask is None else _as_cast(mask), 0.0, causal, grouped)
    able = (cuda.can_use_flash_attention, cuda.can_use_efficient_attention, cuda.can_use_cudnn_attention)
    return not any(can(stock) for can in able)


def _cast(x: Tensor) -> torch.dtype:
    """The dtype in which PyTorch's attention computes with `x`."""
    kind = x.device.type
    casts = torch.is_autocast_enabled(kind) and x.dtype not in (torch.bool, torch.float64)
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def _as_cast(x: Tensor) -> Tensor:
    """`x` as autocast will hand it over, with any values."""
    return x if x.dtype == _cast(x) else torch.empty_like(x, dtype=_cast(x)).requires_grad_(x.requires_grad)


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
    if dmask is not None:
        return "a mask with a tangent", "a mask without one"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) or not q.dtype == k.dtype == v.dtype:
        return f"{q.dtype}, {k.dtype}, {v.dtype}", "queries, keys and values all float16, bfloat16 or float32"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"heads of {max(q.shape[-1], v.shape[-1])} features", "at most 256"
    if any(
        x.ndim < 2
        or x.stride(-2) * x.shape[-2] >= 1 << 31
        or (type(x) not in (Tensor, torch.nn.Parameter) and not operators.traced())
        for x in (q, k, v)
    ):
        return "tensors of this kind", "ordinary strided tensors of less than 2^31 elements a head"
    if torch.compiler.is_compiling():
        return None  # the machine is seen when the kernel runs
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (interpreted or (q.is_cuda and _capable(q.device))):
        return f"tensors on {q.device}", "a CUDA device of compute capability 8.0 or more"
    if operators.kernels() is None:
        return "anything here, because the package triton cannot be imported", "an installed triton"
    return None


def _fused_lacks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dmask: Tensor | None) -> tuple[str, str] | None:
    """What of this case the kernels for output, tangent and gradients cannot compute; None if they can."""
    if not q.ndim == k.ndim == v.ndim == 4 or not q.shape[0] == k.shape[0] == v.shape[0]:
        return "queries, keys and values of such shapes", "four axes each and the same batch"
    if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1]:
        return (
            f"{q.shape[1]}, {k.shape[1]} and {v.shape[1]} heads",
            "as many for keys as for values, a divisor of the queries'",
        )
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return "the gradient of a mask", "a mask without one"
    return _triton_lacks(q, k, v, mask, dmask, None)


@cache
def _capable(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
