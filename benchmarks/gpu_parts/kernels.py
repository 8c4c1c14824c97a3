"""The Triton kernels of attention against double precision: output, tangent and gradients, alone and through `jvp`."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_parts.record import Record
from trigflow.tangent import attention_implementation, jvp
from trigflow.tangent.attention import attention_with_tangent, plain

WIDTHS = (16, 40, 64, 72, 80, 96, 128, 160, 256)
DTYPES = ("float32", "bfloat16", "float16")
FORMS = ("full", "causal", "mask over keys", "other length", "grouped", "frames", "added")
BOUNDS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
"""Relative errors up to which a case counts as right."""


def run(record: Record, tiny: bool, share: int = 0, shares: int = 1) -> None:
    """Every `shares`-th case, beginning with `share`. On the CPU this needs TRITON_INTERPRET=1."""
    cases = list(itertools.product(WIDTHS, DTYPES, FORMS))
    if tiny:
        cases = [(16, "float32", "full"), (16, "float16", "causal"), (16, "float32", "frames"), (16, "float32", "added")]
    for width, dtype, form in cases[share::shares]:
        name = f"{dtype}, {width} features, {form}"
        if record.left() < 3:
            record.add("left_out", name)
            continue
        with record.guarded(name):
            errors = case(width, dtype, form, tiny)
            within = all(error < BOUNDS[dtype] for error in errors.values())
            record.add("cases", {"dtype": dtype, "width": width, "form": form, "errors": errors, "within": within})


def case(width: int, dtype: str, form: str, tiny: bool) -> dict[str, float]:
    """Relative errors against double precision of what the kernel computes, and of the gradients that `jvp` leaves."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = 24 if tiny else 300
    keys = 2 * rows + 5 if form == "other length" else rows
    heads, groups = (4, 2) if form == "grouped" else (2, 2)
    generator = torch.Generator().manual_seed(width)

    def draw(h: int, length: int) -> Tensor:
        numbers = torch.randn(2, h, length, width, generator=generator)
        return numbers.to(device, getattr(torch, dtype))

    q, k, v, dq, dk, dv = (draw(h, n) for h, n in 2 * ((heads, rows), (groups, keys), (groups, keys)))
    mask = None
    if form == "mask over keys":
        mask = (torch.randn(2, 1, 1, keys, generator=generator) > -0.5).to(device)
    if form == "frames":  # of 100 tokens; a query sees its own and the one before
        apart = torch.arange(rows, device=device)[:, None] // 100 - torch.arange(keys, device=device) // 100
        mask = (apart >= 0) & (apart < 2)
    if form == "added":
        mask = torch.randn(1, heads, rows, keys, generator=generator).to(q)
    causal, grouped = form == "causal", form == "grouped"

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, enable_gqa=grouped)

    wide = [x.double().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        exact = attend(*wide)
    weight = torch.randn(exact.shape, generator=generator).to(exact)
    exact_gradients = torch.autograd.grad(exact, wide, weight)
    with torch.no_grad():
        moved = plain.attention(*wide, dq.double(), dk.double(), dv.double(), mask=mask, causal=causal, grouped=grouped)

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, tangent = attention_with_tangent(*leaves, dq, dk, dv, mask=mask, causal=causal, grouped=grouped)
    alone = torch.autograd.grad(out, leaves, weight.to(out.dtype))
    with attention_implementation("triton"):
        through, through_tangent = jvp(attend, tuple(leaves), (dq, dk, dv))
    gradients = torch.autograd.grad(through, leaves, weight.to(through.dtype))
    return {
        "output": relative_error(out, exact),
        "tangent": relative_error(tangent, moved),
        "gradients": max(relative_error(a, b) for a, b in zip(alone, exact_gradients, strict=True)),
        "output of jvp": relative_error(through, exact),
        "tangent of jvp": relative_error(through_tangent, moved),
        "gradients of jvp": max(relative_error(a, b) for a, b in zip(gradients, exact_gradients, strict=True)),
    }


def relative_error(value: Tensor, expected: Tensor) -> float:
    """`|value - expected| / |expected|` in double precision; not a number where a value is not."""
    value, expected = value.detach().double(), expected.detach().double()
    gap, norm = torch.linalg.vector_norm(value - expected), torch.linalg.vector_norm(expected)
    return float(gap / norm if norm > 0 else gap)


def summary(parts: list[dict[str, Any]]) -> str:
    """One line."""
    cases = [c for part in parts for c in part.get("cases", [])]
    failed = sum(len(part.get("failures", [])) for part in parts)
    left = sum(len(part.get("left_out", [])) for part in parts)
    wrong = sum(not c["within"] for c in cases)
    return f"kernels: {len(cases) - wrong} of {len(cases)} cases within bounds, {failed} raised, {left} left out"
