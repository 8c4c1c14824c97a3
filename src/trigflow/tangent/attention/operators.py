"""Attention as operators of `torch.library`: one node of a graph each, with a shape that is known without computing.

| operator | computes | derivative |
| --- | --- | --- |
| `trigflow::attention_tangent` | the tangent, by the chunked implementation or by a kernel | none: its arguments are detached |
| `trigflow::attention_with_tangent` | output, tangent and log-sum-exp, by a kernel | of the output, by the next operator |
| `trigflow::attention_gradients` | gradients of queries, keys and values, by kernels | none |
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

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


def tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    mask: Tensor | None,
    dmask: Tensor | None,
    out: Tensor | None,
    causal: bool,
    scale: float | None,
    grouped: bool,
    implementation: str,
) -> Tensor:
    """The tangent by the implementation "chunked" or "triton"."""
    settings: dict[str, Any] = {"mask": mask, "causal": causal, "scale": scale, "grouped": grouped}
    if implementation == "triton":
        return kernels().forward(q, k, v, dq, dk, dv, **settings, store=False)[1]
    return chunked.attention(q, k, v, dq, dk, dv, dmask=dmask, out=out, **settings)


attention_tangent = torch.library.custom_op("trigflow::attention_tangent", tangent, mutates_args=())


@attention_tangent.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(arguments(q, k, v, None, None, None, None, None, None, rest[-2]).shape)


SETTINGS = "Tensor? mask, Tensor? blocks, bool causal, float? scale, bool grouped"
SCHEMAS = (
    f"(Tensor q, Tensor k, Tensor v, Tensor? dq, Tensor? dk, Tensor? dv, {SETTINGS}) -> (Tensor, Tensor, Tensor)",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {SETTINGS}) -> (Tensor, Tensor, Tensor)",
)


def _settings(values: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("mask", "blocks", "causal", "scale", "grouped"), values, strict=True))


@torch.library.custom_op("trigflow::attention_with_tangent", mutates_args=(), schema=SCHEMAS[0])
def attention_with_tangent(*given: Any) -> Three:
    return kernels().forward(*given[:6], **_settings(given[6:]))


@attention_with_tangent.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Three:
    shape = (*q.shape[:3], v.shape[3])
    return q.new_empty(shape), q.new_empty(shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("trigflow::attention_gradients", mutates_args=(), schema=SCHEMAS[1])
def attention_gradients(*given: Any) -> Three:
    return kernels("triton_backward").gradients(*given[:6], **_settings(given[6:]))


@attention_gradients.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Three:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    """Nothing of the tangent is kept."""
    q, k, v, _, _, _, mask, blocks, *ctx.settings = inputs
    out, moved, lse = output
    ctx.mark_non_differentiable(moved, lse)
    ctx.save_for_backward(q, k, v, out, lse, mask, blocks)


def _backward(ctx: Any, grad: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    return *attention_gradients(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 8


attention_with_tangent.register_autograd(_backward, setup_context=_save)
