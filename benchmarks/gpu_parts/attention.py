"""Attention alone: output and tangent by each method at hand, against the forward of PyTorch's flash attention.

Forward takes two products of n x n x width a head, output and tangent together six; each counts two operations a term,
causal or not. `engine` is what `jvp` does: PyTorch's attention, whose backward is kept, and the kernel for the tangent.
"""

from __future__ import annotations

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
from trigflow.tangent.attention import attention

SHAPES = (
    (16, 16, 1024, 64),
    (4, 16, 4096, 64),
    (1, 16, 16_384, 64),
    (8, 8, 1024, 128),
    (4, 16, 4096, 128),
    (64, 16, 256, 72),
)
"""Batch, heads, tokens, width."""
TINY = ((1, 2, 32, 16),)


def methods(inputs: list[Tensor]) -> dict[str, tuple[int, Callable[[], Any]]]:
    """From a name to the number of products and the call."""
    q, k, v, *tangents = inputs
    cuda = q.is_cuda

    def flash() -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION] if cuda else [SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v)

    def engine(implementation: str) -> tuple[Tensor, Tensor]:
        out = F.scaled_dot_product_attention(q, k, v)
        return out, attention(q, k, v, *tangents, out=out, implementation=implementation)

    found: dict[str, tuple[int, Callable[[], Any]]] = {
        "flash forward": (2, flash),
        "forward": (2, lambda: F.scaled_dot_product_attention(q, k, v)),
        "chunked": (6, lambda: engine("chunked")),
        "plain": (6, lambda: engine("plain")),
    }
    if cuda:
        from trigflow.tangent.attention.triton import with_output

        found["kernel"] = (6, lambda: with_output(*inputs))
        found["engine"] = (6, lambda: engine("triton"))
    try:
        from jvp_flash_attention.jvp_attention import JVPAttn  # type: ignore[import-not-found]
    except ImportError:
        return found
    if cuda:
        found["jvp-flash-attention"] = (6, lambda: torch.func.jvp(JVPAttn.fwd_dual, (q, k, v), tuple(tangents)))
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
    repeats = 2 if tiny else 20
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
