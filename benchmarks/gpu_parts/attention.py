"""Attention alone: output, tangent and gradients by each method at hand, against PyTorch's flash attention.

Forward takes two products of n x n x width a head, output and tangent together six, a backward five more; each counts two
operations a term, whether a mask hides it or not. `engine` is what `jvp` does: PyTorch's attention, whose backward is kept,
and the kernel for the tangent. `fused` is the kernels for all three. With `frames`, queries see their own quarter of the
sequence and those before it; FlexAttention is compiled. On a CPU the kernels run in Triton's interpreter, or not at all.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_parts.kernels import relative_error
from gpu_parts.record import Record
from gpu_parts.steps import measured
from trigflow.tangent.attention import attention, attention_with_tangent
from trigflow.tangent.attention.blocks import blocks_of

SHAPES = ((16, 16, 1024, 64), (4, 16, 4096, 64), (1, 16, 16_384, 64), (8, 8, 1024, 128), (4, 16, 4096, 128), (64, 16, 256, 72))
"""Batch, heads, tokens, width."""
TINY = ((1, 1, 16, 16),)


def methods(inputs: list[Tensor]) -> dict[str, tuple[int, Callable[[], Any]]]:
    """From a name to the number of products and the call."""
    q, k, v, *tangents = inputs
    cuda = q.is_cuda
    kernels = cuda or os.environ.get("TRITON_INTERPRET") == "1"

    def flash(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION] if cuda else [SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v)

    def engine(q: Tensor, k: Tensor, v: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
        out = F.scaled_dot_product_attention(q, k, v)
        with torch.no_grad():
            return out, attention(q, k, v, *tangents, out=out, implementation=implementation)

    def fused(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        return attention_with_tangent(q, k, v, *tangents, **settings)

    def trained(call: Callable[..., Any]) -> Any:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            found = call(*leaves)
            out = found if isinstance(found, Tensor) else found[0]
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        return found

    n = q.shape[2]
    frame = torch.arange(n, device=q.device) * 4 // n
    mask = (frame[:, None] >= frame)[None, None]
    blocks = blocks_of(mask)

    found: dict[str, tuple[int, Callable[[], Any]]] = {
        "flash forward": (2, flash),
        "forward": (2, lambda: F.scaled_dot_product_attention(q, k, v)),
        "flash forward, backward": (7, lambda: trained(flash)),
        "forward of frames": (2, lambda: F.scaled_dot_product_attention(q, k, v, mask)),
        "chunked": (6, lambda: engine(q, k, v, "chunked")),
        "plain": (6, lambda: engine(q, k, v, "plain")),
    }
    if kernels:
        found |= {
            "kernel": (6, lambda: fused(q, k, v)),
            "engine": (6, lambda: engine(q, k, v, "triton")),
            "engine, backward": (11, lambda: trained(functools.partial(engine, implementation="triton"))),
            "fused, backward": (11, lambda: trained(fused)),
            "fused of frames": (6, lambda: fused(q, k, v, mask=mask, blocks=blocks)[0]),
            "fused of frames, backward": (11, lambda: trained(functools.partial(fused, mask=mask, blocks=blocks))[0]),
        }
    if cuda:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        made = create_block_mask(lambda b, h, i, j: frame[i] >= frame[j], None, None, n, n, q.device.type)
        compiled = torch.compile(flex_attention)
        found["flex forward of frames"] = (2, lambda: compiled(q, k, v, block_mask=made))
    try:
        from jvp_flash_attention.jvp_attention import JVPAttn  # type: ignore[import-not-found]
    except ImportError:
        return found
    if cuda:

        def rival(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return torch.func.jvp(JVPAttn.fwd_dual, (q, k, v), tuple(tangents))

        found["jvp-flash-attention"] = (6, lambda: rival(q, k, v))
        found["jvp-flash-attention, backward"] = (11, lambda: trained(rival))
    return found


def run(record: Record, tiny: bool) -> None:
    """Every shape in bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for shape in TINY if tiny else SHAPES:
        if record.left() < 3:
            record.add("left_out", str(shape))
            continue
        batch, heads, tokens, width = shape
        generator = torch.Generator(device).manual_seed(0)
        inputs = [
            torch.randn(shape[0], heads, tokens, width, generator=generator, device=device, dtype=torch.bfloat16)
            for _ in range(6)
        ]
        row: dict[str, Any] = {"batch": batch, "heads": heads, "tokens": tokens, "width": width, "methods": {}}
        record.add("shapes", row)
        with torch.no_grad():
            expected = attention(*(x[:1].float() for x in inputs), implementation="chunked")
            for name, (products, call) in methods(inputs).items():
                if name == "plain" and batch * heads * tokens**2 > 1 << 30:
                    continue
                with record.guarded(f"{name} at {shape}"):
                    row["methods"][name] = time_method(call, products, shape, expected, device, tiny)
                    record.write()
        flash = row["methods"].get("flash forward", {}).get("tflops")
        if flash:
            for entry in row["methods"].values():
                entry["of_flash_forward"] = entry["tflops"] / flash
        record.write()


def time_method(
    call: Callable[[], Any], products: int, shape: tuple[int, ...], expected: Tensor, device: str, tiny: bool
) -> dict[str, float]:
    """Median seconds, TFLOP/s, added peak memory and error of the tangent, against the chunked one in float32."""
    batch, heads, tokens, width = shape
    value = call()
    found = {} if isinstance(value, Tensor) else {"tangent_error": relative_error(value[1][:1], expected)}
    del value
    repeats = 1 if tiny else 20
    call()
    seconds = [measured(call, device) for _ in range(repeats)]
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        found["added_memory"] = torch.cuda.max_memory_allocated() - before
    operations = 2 * products * batch * heads * tokens**2 * width
    return {"seconds": median(seconds), "tflops": operations / median(seconds) / 1e12, **found}


def summary(part: dict[str, Any]) -> str:
    """A line for each shape."""
    lines = []
    for row in part.get("shapes", []):
        cells = "  ".join(f"{n} {m['tflops']:.0f}" for n, m in row["methods"].items())
        lines.append(f"attention {row['batch']}x{row['heads']}x{row['tokens']}x{row['width']}, TFLOP/s: {cells}")
    return "\n".join(lines + [f"{f['what']}: {f['error']}" for f in part.get("failures", [])])
