"""Cases of the Triton kernel, each giving relative errors against plain attention in double precision.

Run as a program it prints them all as JSON. On the CPU that needs TRITON_INTERPRET=1 from the start of the process: the
kernel then runs in Triton's interpreter.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tangent.helpers import draw, relative_error
from trigflow.tangent import attention_implementation, jvp
from trigflow.tangent.attention import plain

TOLERANCE = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 1.2e-2}

# name: dtype, and what differs from one head of 70 queries to 70 keys with 32 features, twice.
CASES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32", "h": 2},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "float32 causal": {"dtype": "float32", "causal": True},
    "float16 causal": {"dtype": "float16", "causal": True, "l": 200, "s": 200},
    "bfloat16 causal": {"dtype": "bfloat16", "causal": True, "l": 130, "s": 130},
    "causal, more keys": {"dtype": "float32", "causal": True, "l": 40, "s": 150},
    "causal, fewer keys": {"dtype": "float32", "causal": True, "l": 150, "s": 40},
    "whole blocks": {"dtype": "float32", "l": 128, "s": 128},
    "one query": {"dtype": "float32", "l": 1, "s": 100},
    "one key": {"dtype": "float32", "l": 100, "s": 1},
    "cross attention": {"dtype": "float16", "l": 33, "s": 170},
    "40 features": {"dtype": "float32", "e": 40, "c": 40},
    "64 and 24 features": {"dtype": "bfloat16", "e": 64, "c": 24},
    "80 features": {"dtype": "float16", "e": 80, "c": 80},
    "128 features": {"dtype": "bfloat16", "e": 128, "c": 128, "causal": True},
    "256 features": {"dtype": "float32", "e": 256, "c": 256},
    "200 features": {"dtype": "float16", "e": 200, "c": 200},
    "3 features": {"dtype": "float32", "e": 3, "c": 5},
    "grouped": {"dtype": "float32", "h": 4, "g": 2},
    "one head of keys": {"dtype": "float16", "h": 3, "g": 1, "causal": True},
    "only q moves": {"dtype": "float32", "carry": (True, False, False)},
    "only k moves": {"dtype": "float32", "carry": (False, True, False), "causal": True},
    "only v moves": {"dtype": "float32", "carry": (False, False, True)},
    "q and k move": {"dtype": "float16", "carry": (True, True, False)},
    "k and v move": {"dtype": "bfloat16", "carry": (False, True, True)},
    "nothing moves": {"dtype": "float32", "carry": (False, False, False)},
    "mask over keys": {"dtype": "float32", "keep": "some"},
    "mask over keys, causal": {"dtype": "float16", "keep": "some", "causal": True, "h": 2},
    "mask over keys, half": {"dtype": "bfloat16", "keep": "some", "s": 150},
    "mask without a key": {"dtype": "float32", "keep": "none in one entry"},
    "mask after many keys": {"dtype": "float32", "keep": "last", "s": 150},
    "heads next to each other": {"dtype": "float32", "strided": True, "h": 3},
    "features far apart": {"dtype": "float32", "transposed": True},
    "scale": {"dtype": "float32", "scale": 0.3},
    "large scores": {"dtype": "float32", "size": 20.0},
    "keys move as a whole": {"dtype": "bfloat16", "offset": 100.0, "s": 200},
}
SPECIAL = ("through jvp", "through jvp with a mask", "blocks that do not fit", "no keys")


def errors(name: str, device: str) -> dict[str, float]:
    """Relative errors of the output and of its tangent."""
    from trigflow.tangent.attention import triton

    q, k, v, tangents, settings = problem(CASES[name])
    keep = settings.pop("keep")
    mask = None if keep is None else keep[:, None, None]
    wide = [None if x is None else x.double() for x in (q, k, v, *tangents)]
    exact = plain.attention(*wide, mask=mask, **settings)  # type: ignore[arg-type]
    output = F.scaled_dot_product_attention(
        *wide[:3],  # type: ignore[arg-type]
        attn_mask=_joined(mask, settings["causal"], q, k),
        scale=settings["scale"],
        enable_gqa=True,
    )
    low = [None if x is None else x.to(device) for x in (q, k, v, *tangents)]
    keep = None if keep is None else keep.to(device)
    out, tangent = triton.with_output(*low, keep=keep, **settings)  # type: ignore[arg-type]
    assert out.dtype == tangent.dtype == q.dtype
    figures = {
        "output": relative_error(out.cpu().double(), output.nan_to_num(0.0)),
        "tangent": relative_error(tangent.cpu().double(), exact),
    }
    if "carry" in CASES[name]:
        alone = triton.attention(*low, keep=keep, **settings)  # type: ignore[arg-type]
        figures["tangent alone"] = relative_error(alone.cpu().double(), exact)
    return figures


def problem(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None], dict[str, Any]]:
    """Queries, keys, values, their tangents, and settings."""
    dtype = getattr(torch, case["dtype"])
    h, rows, s, e, c = (case.get(n, d) for n, d in (("h", 1), ("l", 70), ("s", 70), ("e", 32), ("c", 32)))
    g = case.get("g", h)
    seed = zlib.crc32(repr(sorted(case.items())).encode()) % 1000

    def tensor(index: int, heads: int, length: int, width: int) -> Tensor:
        if case.get("strided"):
            return draw(seed + index, 2, length, heads, width).to(dtype).transpose(1, 2)
        if case.get("transposed"):
            return draw(seed + index, 2, heads, width, length).to(dtype).mT
        return draw(seed + index, 2, heads, length, width).to(dtype)

    shapes = ((h, rows, e), (g, s, e), (g, s, c))
    q, k, v = (tensor(i, *shape) for i, shape in enumerate(shapes))
    q = q * case.get("size", 1.0)
    moves = case.get("carry", (True, True, True))
    tangents = [tensor(3 + i, *shape) if m else None for i, (shape, m) in enumerate(zip(shapes, moves, strict=True))]
    if "offset" in case:
        tangents[1] = tangents[1] + case["offset"] * draw(7, e).to(dtype)
    keep = None
    if "keep" in case:
        keep = draw(seed + 8, 2, s) > 0
        if case["keep"] == "none in one entry":
            keep[1] = False
        if case["keep"] == "last":
            keep[:, :-3] = False
            keep[:, -3:] = True
    settings = {
        "keep": keep,
        "causal": case.get("causal", False),
        "scale": case.get("scale"),
        "grouped": g != h,
    }
    return q, k, v, tangents, settings


def _joined(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    if not causal:
        return mask
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return seen if mask is None else seen & mask


def special(name: str, device: str) -> dict[str, float]:
    """Cases beside the table."""
    from trigflow.tangent.attention import triton

    q, k, v = (draw(i, 2, 2, 40, 32, dtype=torch.float32).to(device) for i in range(3))
    t = tuple(draw(3 + i, 2, 2, 40, 32, dtype=torch.float32).to(device) for i in range(3))
    if name.startswith("through jvp"):
        keys = (draw(9, 2, 1, 1, 40) > 0).to(device) if "mask" in name else None

        def net(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, keys)

        leaves = tuple(x.clone().requires_grad_() for x in (q, k, v))
        with attention_implementation("triton"):
            out, tangent = jvp(net, leaves, t)
        plain_out = net(*leaves)
        weight = draw(8, *out.shape, dtype=torch.float32).to(device)
        gaps = [
            float((a - b).abs().max())
            for a, b in zip(
                torch.autograd.grad(out, leaves, weight), torch.autograd.grad(plain_out, leaves, weight), strict=True
            )
        ]
        exact = plain.attention(*(x.double() for x in (q, k, v, *t)), mask=keys)
        return {
            "output": float((out - plain_out).detach().abs().max()),
            "gradients": max(gaps),
            "tangent": relative_error(tangent.double(), exact),
        }
    if name == "blocks that do not fit":
        kernel, tried = triton.kernel, []

        class Small:
            """Has no room for the first two choices."""

            def __getitem__(self, grid: Any) -> Any:
                def launch(*args: Any, **kwargs: Any) -> None:
                    tried.append((kwargs["ROWS"], kwargs["COLUMNS"], kwargs["num_warps"], kwargs["num_stages"]))
                    if len(tried) < 3:
                        raise triton.OutOfResources(2, 1, "shared memory")
                    kernel[grid](*args, **kwargs)

                return launch

        triton._FIRST.clear()
        triton.kernel = Small()
        try:
            values = [triton.attention(q, k, v, *t) for _ in range(2)]
        finally:
            triton.kernel = kernel
            triton._FIRST.clear()
        choices = triton.launches(32, 4)
        exact = plain.attention(*(x.double() for x in (q, k, v, *t)))
        return {
            "order": float(tried != [*choices[:3], choices[2]]),
            "tangent": max(relative_error(value.double(), exact) for value in values),
        }
    out, tangent = triton.with_output(q, k[:, :, :0], v[:, :, :0], *(x[:, :, :0] if i else x for i, x in enumerate(t)))
    return {"output": float(out.abs().max()), "tangent": float(tangent.abs().max())}


def main() -> None:
    figures = {}
    for name in CASES:
        figures[name] = errors(name, "cpu")
    for name in SPECIAL:
        figures[name] = special(name, "cpu")
    for row in figures.values():
        for key, value in row.items():
            row[key] = value if math.isfinite(value) else 1e30
    json.dump(figures, sys.stdout)


if __name__ == "__main__":
    main()
