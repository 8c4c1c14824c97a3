"""Attention as custom operators of PyTorch: one node of a graph each, with a shape that is known without computing.

| operator | computes | derivative |
| --- | --- | --- |
| `trigflow::attention_tangent` | the tangent, by the chunked implementation or by a kernel | none: its arguments are detached |
| `trigflow::attention_with_tangent` | output, tangent and log-sum-exp, by a kernel | of the output, by the next operator |
| `trigflow::attention_gradients` | gradients of queries, keys and values, by kernels | none |
"""

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor, library

from trigflow.tangent.attention import chunked
from trigflow.tangent.attention.layout import arguments

Three = tuple[Tensor, Tensor, Tensor]


def traced() -> bool:
    """Whether operations are being recorded (`make_fx`, `torch.compile`, `torch.export`) or have no values."""
    kinds = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(kind) is not None for kind in (kinds.PROXY, kinds.FAKE))


@cache
def kernels(name: str = "triton") -> Any:
    """The module of kernels of this name, or None where triton is missing; imported when first needed."""
    try:
        return importlib.import_module(f"trigflow.tangent.attention.{name}")
    except ImportError:
        return None


def tangent(*given: Any) -> Tensor:
    """The tangent; the implementation is "chunked" or "triton"."""
    q, k, v, dq, dk, dv, mask, dmask, out, causal, scale, grouped, implementation = given
    a = arguments(q, k, v, dq, dk, dv, mask, dmask, scale, grouped)
    return (
        kernels().forward(a, None, causal, store=False)[1] if implementation == "triton" else chunked.attention(a, causal, out)
    )


def _fused(*given: Any) -> Three:
    q, k, v, dq, dk, dv, mask, blocks, causal, scale, grouped = given
    return kernels().forward(arguments(q, k, v, dq, dk, dv, mask, None, scale, grouped), blocks, causal)


def _gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Three:
    mask, blocks, causal, scale, grouped = rest
    a = arguments(q, k, v, None, None, None, mask, None, scale, grouped)
    return kernels("triton_backward").gradients(a, grad, out, lse, blocks, causal)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    """Nothing of the tangent is kept."""
    q, k, v, _, _, _, mask, blocks, *ctx.settings = inputs
    out, moved, lse = output
    ctx.mark_non_differentiable(moved, lse)
    ctx.save_for_backward(q, k, v, out, lse, mask, blocks)


def _backward(ctx: Any, grad: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    return *attention_gradients(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 8


def _shapes(q: Tensor, v: Tensor) -> list[tuple[Any, torch.dtype]]:
    output = (*q.shape[:3], v.shape[3])
    return [(output, q.dtype), (output, q.dtype), (q.shape[:3], torch.float32)]


DUALS = "Tensor q, Tensor k, Tensor v, Tensor? dq, Tensor? dk, Tensor? dv, Tensor? mask"
KNOWN = "Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask"
SETTINGS = "bool causal, float? scale, bool grouped"
THREE = "(Tensor, Tensor, Tensor)"


def _operator(name: str, function: Any, schema: str, fake: Any) -> Any:
    operator = library.custom_op(f"trigflow::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


attention_tangent = _operator(
    "attention_tangent",
    tangent,
    f"({DUALS}, Tensor? dmask, Tensor? out, {SETTINGS}, str implementation) -> Tensor",
    lambda q, k, v, *rest: q.new_empty(arguments(q, k, v, None, None, None, None, None, None, rest[-2]).shape),
)
attention_with_tangent = _operator(
    "attention_with_tangent",
    _fused,
    f"({DUALS}, Tensor? blocks, {SETTINGS}) -> {THREE}",
    lambda q, k, v, *_: tuple(q.new_empty(n, dtype=d) for n, d in _shapes(q, v)),
)
attention_with_tangent.register_autograd(_backward, setup_context=_save)
attention_gradients = _operator(
    "attention_gradients",
    _gradients,
    f"({KNOWN}, Tensor? blocks, {SETTINGS}) -> {THREE}",
    lambda grad, *known: tuple(x.new_empty(x.shape) for x in known[:3]),
)
