"""Attention alone: memory of the chunked tangent on the CPU, speed and memory of the kernel on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tangent_parts.memory import added_peak, added_peak_on_cuda, in_fresh_process, map_large_blocks
from tangent_parts.steps import first_line, relative_error, timed
from trigflow.tangent.attention import attention, attention_with_tangent

WIDTH = 64
"""Features of a head."""


def draw(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, dq, dk, dv."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(6)]


def tangent_memory(implementation: str, tokens: int, threads: int) -> int:
    """Added peak of live memory of one attention tangent, batch 1, 4 heads, in bytes; for a fresh process."""
    map_large_blocks()
    torch.set_num_threads(threads)
    with torch.no_grad():
        attention(*draw(1, 4, 32, WIDTH), implementation=implementation)
        inputs = draw(1, 4, tokens, WIDTH)
        return added_peak(lambda: attention(*inputs, implementation=implementation))


def memory_by_length(lengths: tuple[int, ...], threads: int) -> dict[str, Any]:
    """Peak bytes of the chunked tangent at each length, of the plain one at the first two, and the largest growth.

    `growth` is the largest factor from one length to the next, twice as long: 2 where memory is linear, 4 where quadratic.
    """
    peaks = [in_fresh_process(tangent_memory, "chunked", n, threads) for n in lengths]
    plain = [in_fresh_process(tangent_memory, "plain", n, threads) for n in lengths[:2]]
    growth = max(peaks[i + 1] / max(peaks[i], 1) for i in range(len(peaks) - 1))
    return {"tokens": list(lengths), "chunked": peaks, "plain": plain, "growth": growth}


def methods(inputs: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """Output and tangent of attention, `(o, do)`, by each method at hand. Nothing is recorded for a backward.

    * `kernel`: both in one pass of the library's Triton kernel.
    * `engine`: PyTorch's attention for the output, the kernel for the tangent, as `jvp` does to keep PyTorch's backward.
    * `plain`: PyTorch's attention, and the tangent with the matrix of weights in memory.
    * `package`: the public package jvp-flash-attention, where it is installed.
    """
    q, k, v, *tangents = inputs

    def fused(implementation: str) -> tuple[Tensor, Tensor]:
        out = F.scaled_dot_product_attention(q, k, v)
        return out, attention(*inputs, out=out, implementation=implementation)

    found: dict[str, Callable[[], Any]] = {
        "kernel": lambda: attention_with_tangent(*inputs),
        "engine": lambda: fused("triton"),
        "plain": lambda: fused("plain"),
    }
    try:
        from jvp_flash_attention.jvp_attention import JVPAttn  # type: ignore[import-not-found]
    except ImportError:
        return found
    found["package"] = lambda: torch.func.jvp(JVPAttn.fwd_dual, (q, k, v), tuple(tangents))
    return found


def time_kernel(tokens: int, repeats: int) -> dict[str, Any]:
    """One length on CUDA: bfloat16, 16 heads of 64, batch such that there are 16,384 tokens in all.

    A method's entry has `seconds` (median), `tflops`, `memory` (added peak bytes) and `error` (of its tangent, relative to the
    chunked one in float32), or `message` where it cannot run. Output and tangent take six products of n x n x 64 a head, two
    floating-point operations each: `12 b h n^2 64`.
    """
    batch, heads = max(1, 16_384 // tokens), 16
    inputs = draw(batch, heads, tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    expected = attention(*(x[:1].float() for x in inputs), implementation="chunked")
    operations = 12 * batch * heads * tokens**2 * WIDTH
    row: dict[str, Any] = {"tokens": tokens, "batch": batch, "heads": heads, "methods": {}}
    for name, method in methods(inputs).items():
        try:
            with torch.no_grad():
                error = relative_error(method()[1][:1], expected)
                seconds = timed(method, repeats)
                memory = added_peak_on_cuda(method)
        except Exception as reason:
            row["methods"][name] = {"message": first_line(reason)}
            torch.cuda.empty_cache()
            continue
        row["methods"][name] = {"seconds": seconds, "tflops": operations / seconds / 1e12, "memory": memory, "error": error}
    return row


def kernel_table(rows: list[dict[str, Any]]) -> str:
    """Microseconds, TFLOP/s and MiB of each method, a line for each length."""
    lines = []
    for row in rows:
        cells = []
        for name, found in row["methods"].items():
            if "message" in found:
                cells.append(f"{name} {found['message'][:40]}")
            else:
                cells.append(
                    f"{name} {found['seconds'] * 1e6:9,.0f} us {found['tflops']:6.1f} TFLOP/s "
                    f"{found['memory'] / 2**20:8,.0f} MiB"
                )
        lines.append(f"{row['tokens']:6,} tokens   " + "   ".join(cells))
    return "\n".join(lines)
