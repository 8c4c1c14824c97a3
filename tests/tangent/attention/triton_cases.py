"""Cases of the Triton kernels, each giving relative errors against attention written out in double precision.

Run as a program it prints them all as JSON. On the CPU that needs TRITON_INTERPRET=1 from the start of the process: the
kernels then run in Triton's interpreter.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent.helpers import draw, relative_error
from trigflow.tangent import attention_implementation, jvp
from trigflow.tangent.attention import attention, attention_with_tangent, blocks, operators, plain

TOLERANCE = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 1.2e-2}

# name: dtype, and what differs from one head of 40 queries to 40 keys with 32 features.
CASES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32", "b": 2, "h": 2},
    "many tiles": {"dtype": "float32", "l": 70, "s": 70},
    "float32 causal": {"dtype": "float32", "causal": True, "l": 70, "s": 70},
    "float16 causal": {"dtype": "float16", "causal": True, "l": 150, "s": 150},
    "causal, more keys": {"dtype": "float32", "causal": True, "l": 40, "s": 80},
    "causal, fewer keys": {"dtype": "float32", "causal": True, "l": 80, "s": 40},
    "whole tiles, causal": {"dtype": "float16", "l": 128, "s": 128, "causal": True},
    "one query": {"dtype": "float32", "l": 1, "s": 100},
    "one key": {"dtype": "float32", "l": 100, "s": 1, "bound": 1e-5},
    "cross attention": {"dtype": "float16", "l": 33, "s": 170},
    "40 features": {"dtype": "float32", "e": 40, "c": 40},
    "64 and 24 features": {"dtype": "bfloat16", "e": 64, "c": 24},
    "16 and 72 features": {"dtype": "float16", "e": 16, "c": 72},
    "80 features": {"dtype": "float16", "e": 80, "c": 80},
    "96 features": {"dtype": "bfloat16", "e": 96, "c": 96},
    "128 features": {"dtype": "bfloat16", "e": 128, "c": 128, "causal": True},
    "160 features": {"dtype": "float16", "e": 160, "c": 160},
    "256 features": {"dtype": "float32", "e": 256, "c": 256, "l": 17, "s": 17},
    "3 features": {"dtype": "float32", "e": 3, "c": 5},
    "grouped": {"dtype": "float32", "h": 4, "g": 2, "l": 20, "s": 20},
    "one head of keys": {"dtype": "float16", "h": 3, "g": 1, "causal": True},
    "only q moves": {"dtype": "float32", "carry": (True, False, False)},
    "only k moves": {"dtype": "float32", "carry": (False, True, False), "causal": True},
    "only v moves": {"dtype": "float32", "carry": (False, False, True)},
    "q and k move": {"dtype": "float16", "carry": (True, True, False)},
    "k and v move": {"dtype": "bfloat16", "carry": (False, True, True)},
    "nothing moves": {"dtype": "float32", "carry": (False, False, False)},
    "mask over keys": {"dtype": "float32", "b": 2, "mask": "keys"},
    "mask over keys, causal": {"dtype": "float16", "mask": "keys", "causal": True, "b": 2},
    "mask without a key": {"dtype": "float32", "b": 2, "mask": "none in one entry"},
    "mask after many keys": {"dtype": "float32", "mask": "last", "s": 100},
    "mask over pairs": {"dtype": "float32", "b": 2, "mask": "pairs", "l": 20},
    "mask over pairs of a head, grouped": {"dtype": "float32", "h": 4, "g": 2, "mask": "heads", "s": 20, "l": 20},
    "mask over queries": {"dtype": "float32", "mask": "queries"},
    "added mask": {"dtype": "float32", "mask": "added"},
    "added mask, half": {"dtype": "bfloat16", "mask": "added"},
    "added mask over keys": {"dtype": "float32", "b": 2, "mask": "added over keys"},
    "added mask with gaps, causal": {"dtype": "float16", "h": 2, "mask": "added with gaps", "causal": True},
    "frames": {"dtype": "float16", "mask": "frames", "l": 140, "s": 260, "e": 16, "c": 16},
    "heads next to each other": {"dtype": "float32", "strided": True, "h": 2},
    "features far apart": {"dtype": "float32", "transposed": True},
    "scale": {"dtype": "float32", "scale": 0.3},
    "large scores": {"dtype": "float32", "l": 20, "size": 20.0, "bound": 1e-5},
    "keys move as a whole": {"dtype": "bfloat16", "offset": 100.0, "s": 200},
}
KINDS = ("causal", "keys", "heads", "added with gaps", "frames")
# Only on a device: lengths that take seconds in the interpreter.
LARGE: dict[str, dict[str, Any]] = {
    f"{dtype}, {e} features, {kind}": {
        **{"dtype": dtype, "b": 2, "h": 4, "g": 2, "l": 700, "s": 1000, "e": e, "c": e, "bound": 3 * TOLERANCE[dtype]},
        **({"causal": True} if kind == "causal" else {"mask": kind}),
    }
    for i, dtype in enumerate(TOLERANCE)
    for j, e in enumerate((16, 40, 64, 72, 80, 96, 128, 160, 256))
    for kind in (KINDS[(i + j) % 5],)
}
SPECIAL = (
    "through jvp",
    "through jvp with a mask",
    "through jvp, fused",
    "through jvp, fused, autocast",
    "tiles that do not fit",
    "no keys",
    "log-sum-exp",
    "blocks that are empty",
    "blocks without a mask",
    "a mask of flex_attention",
    "traced",
    "compiled",
    "promises of the operators",
)


def errors(name: str, device: str) -> dict[str, float]:
    """Relative errors of the output, of its tangent and of the gradients."""
    case = CASES.get(name) or LARGE[name]
    q, k, v, tangents, mask, settings = problem(case)
    wide = [None if x is None else x.double().requires_grad_() for x in (q, k, v, *tangents)]
    seen = None if mask is None or mask.dtype == torch.bool else mask.double()
    seen = mask if seen is None else seen
    with torch.no_grad():
        exact = plain.attention(*wide, mask=_joined(seen, settings["causal"], q, k), **{**settings, "causal": False})  # type: ignore[arg-type]
    with sdpa_kernel(SDPBackend.MATH):
        output = F.scaled_dot_product_attention(
            *wide[:3],  # type: ignore[arg-type]
            attn_mask=_joined(seen, settings["causal"], q, k),
            scale=settings["scale"],
            enable_gqa=True,
        ).nan_to_num(0.0)
    weight = draw(11, *output.shape).to(q.dtype)
    gradients = torch.autograd.grad(output, wide[:3], weight.double())  # type: ignore[arg-type]

    leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
    moves = [None if x is None else x.to(device) for x in tangents]
    mask = None if mask is None else mask.to(device)
    out, tangent = attention_with_tangent(*leaves, *moves, mask=mask, **settings)  # type: ignore[arg-type, call-arg]
    assert out.dtype == tangent.dtype == q.dtype
    assert not tangent.requires_grad
    figures = {"output": relative_error(out.cpu().double(), output), "tangent": relative_error(tangent.cpu().double(), exact)}
    if "carry" in case:
        with torch.no_grad():
            alone = attention(*leaves, *moves, implementation="triton", **settings)  # type: ignore[misc]
        return {**figures, "tangent alone": relative_error(alone.cpu().double(), exact)}
    found = torch.autograd.grad(out, leaves, weight.to(device))
    for part, value, expected in zip("qkv", found, gradients, strict=True):
        assert value.dtype == q.dtype
        figures[f"gradient of {part}"] = relative_error(value.cpu().double(), expected.nan_to_num(0.0))
    return figures


def problem(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None], Tensor | None, dict[str, Any]]:
    """Queries, keys, values, their tangents, a mask, and settings."""
    dtype = getattr(torch, case["dtype"])
    defaults = (("b", 1), ("h", 1), ("l", 40), ("s", 40), ("e", 32), ("c", 32))
    b, h, rows, s, e, c = (case.get(n, d) for n, d in defaults)
    g = case.get("g", h)
    seed = zlib.crc32(repr(sorted(case.items())).encode()) % 1000

    def tensor(index: int, heads: int, length: int, width: int) -> Tensor:
        if case.get("strided"):
            return draw(seed + index, b, length, heads, width).to(dtype).transpose(1, 2)
        if case.get("transposed"):
            return draw(seed + index, b, heads, width, length).to(dtype).mT
        return draw(seed + index, b, heads, length, width).to(dtype)

    shapes = ((h, rows, e), (g, s, e), (g, s, c))
    q, k, v = (tensor(i, *shape) for i, shape in enumerate(shapes))
    q = q * case.get("size", 1.0)
    moves = case.get("carry", (True, True, True))
    tangents = [tensor(3 + i, *shape) if m else None for i, (shape, m) in enumerate(zip(shapes, moves, strict=True))]
    if "offset" in case:
        tangents[1] = tangents[1] + case["offset"] * draw(7, e).to(dtype)
    mask = _mask(case["mask"], seed + 8, (b, h, rows, s)) if "mask" in case else None
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    settings = {"causal": case.get("causal", False), "scale": case.get("scale"), "grouped": g != h}
    return q, k, v, tangents, mask, settings


def _mask(kind: str, seed: int, shape: tuple[int, int, int, int]) -> Tensor:
    b, h, rows, s = shape
    if kind == "frames":  # queries of a frame see it and the one before
        frames = (torch.arange(rows)[:, None] // 90) - (torch.arange(s) // 90)
        return (frames >= 0) & (frames < 2)
    axes = {"pairs": (b, 1, rows, s), "heads": (1, h, rows, s), "queries": (1, 1, rows, 1)}
    if kind in axes:
        return draw(seed, *axes[kind]) > 0
    if kind.startswith("added"):
        mask = draw(seed, 1, h, rows, s) if "keys" not in kind else draw(seed, b, 1, 1, s)
        return mask.masked_fill(draw(seed + 1, *mask.shape) > 0, -math.inf) if "gaps" in kind else mask
    keep = draw(seed, b, 1, 1, s) > 0
    if kind == "none in one entry":
        keep[1] = False
    if kind == "last":
        keep[..., :-3] = False
        keep[..., -3:] = True
    return keep


def _joined(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    if not causal:
        return mask
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    if mask is None or mask.dtype == torch.bool:
        return seen if mask is None else seen & mask
    return mask.masked_fill(~seen, -math.inf)


def special(name: str, device: str) -> dict[str, float]:
    """Cases beside the table."""
    if name in ("traced", "compiled", "promises of the operators"):
        return traced(name, device)
    if "block" in name or "flex" in name:
        return blockwise(name, device)
    q, k, v = (draw(i, 1, 2, 40, 32, dtype=torch.float32).to(device) for i in range(3))
    t = tuple(draw(3 + i, 1, 2, 40, 32, dtype=torch.float32).to(device) for i in range(3))
    if name.startswith("through jvp"):
        return through_jvp(name, q, k, v, t)
    if name == "tiles that do not fit":
        return tiles_that_do_not_fit(q, k, v, t)
    if name == "no keys":
        leaves = [x.requires_grad_() for x in (q, k[:, :, :0], v[:, :, :0])]
        out, tangent = attention_with_tangent(*leaves, t[0], t[1][:, :, :0], t[2][:, :, :0])
        (gradient,) = torch.autograd.grad(out.sum(), q)
        return {"output": float(out.abs().max()), "tangent": float(tangent.abs().max()), "gradients": float(gradient.sum())}
    mask = draw(9, 40, 40).to(device) > 0
    mask[3] = False
    _, _, value = operators.attention_with_tangent(q, k, v, None, None, None, mask, None, False, None, False)
    exact = (q.double() @ k.double().mT / math.sqrt(32)).masked_fill(~mask, -math.inf).logsumexp(-1)
    seen = mask.any(-1)
    wrong = float((value[..., ~seen] != -math.inf).sum())
    return {"order": wrong, "log-sum-exp": relative_error(value[..., seen].double(), exact[..., seen])}


def through_jvp(name: str, q: Tensor, k: Tensor, v: Tensor, t: tuple[Tensor, ...]) -> dict[str, float]:
    """The rule of the engine: by itself, PyTorch's output bit for bit; fused, the kernel's."""
    mask = None
    if "mask" in name:
        mask = draw(9, 1, 1, 1, 40).to(q) > 0
    if "fused" in name:
        mask = draw(9, 40, 40).to(q)

    def net(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask)

    leaves = tuple(x.clone().requires_grad_() for x in (q, k, v))
    cast = torch.autocast(q.device.type, torch.bfloat16, enabled="autocast" in name)
    with cast, attention_implementation("fused" if "fused" in name else "triton"):
        out, tangent = jvp(net, leaves, t)
    stock = net(*leaves)
    weight = draw(8, *out.shape, dtype=torch.float32).to(out)
    pairs = zip(torch.autograd.grad(out, leaves, weight), torch.autograd.grad(stock, leaves, weight.to(stock)), strict=True)
    exact = plain.attention(*(x.double() for x in (q, k, v, *t)), mask=mask)
    figures = {"tangent": relative_error(tangent.double(), exact)}
    if "fused" in name:
        assert "attention_with_tangent" in out.grad_fn.name()
        assert out.dtype == (torch.bfloat16 if "autocast" in name else torch.float32)
        figures |= {"output of jvp": relative_error(out, stock), "gradient": max(relative_error(*p) for p in pairs)}
        return {f"{out.dtype} {part}".removeprefix("torch."): error for part, error in figures.items()}
    figures["output"] = float((out - stock).detach().abs().max())
    figures["gradients"] = max(float((a - b).abs().max()) for a, b in pairs)
    return figures


def tiles_that_do_not_fit(q: Tensor, k: Tensor, v: Tensor, t: tuple[Tensor, ...]) -> dict[str, float]:
    """The first choices are passed over, once."""
    from trigflow.tangent.attention import triton

    kernel, tried = triton.kernel, []

    class Small:
        """Has no room for the first two choices."""

        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                form = args[-1]
                tried.append((form.ROWS, form.COLUMNS, kwargs["num_warps"], kwargs["num_stages"]))
                if len(tried) < 3:
                    raise triton.OutOfResources(2, 1, "shared memory")
                kernel[grid](*args, **kwargs)

            return launch

    triton._FIRST.clear()
    triton.kernel = Small()
    try:
        values = [attention(q, k, v, *t, implementation="triton") for _ in range(2)]
    finally:
        triton.kernel = kernel
        triton._FIRST.clear()
    choices = triton.launches(64, 4)
    exact = plain.attention(*(x.double() for x in (q, k, v, *t)))
    return {
        "order": float(tried != [*choices[:3], choices[2]]),
        "tangent": max(relative_error(value.double(), exact) for value in values),
    }


def blockwise(name: str, device: str) -> dict[str, float]:
    """Blocks of keys that no query sees hold NaN: whatever visits them gives NaN."""
    values = [draw(i, 1, 1, 257, 16, dtype=torch.float32).half().to(device) for i in range(6)]
    i = torch.arange(257, device=device)
    mask = (i[:, None] >= 128) | (i < 128)
    if name != "a mask of flex_attention":
        for x in values:
            x[:, :, 128:256] = math.nan if x is not values[0] and x is not values[3] else 1.0
        mask = mask.clone()
        mask[:, 128:256] = False
    leaves = [x.requires_grad_() for x in values[:3]]
    settings: dict[str, Any] = {"mask": mask[None, None]}
    if name == "blocks without a mask":
        settings = {"blocks": 2 * blocks.blocks_of(mask[None, None]).clamp(max=1)}
    if name == "a mask of flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        made = create_block_mask(lambda b, h, q, k: (q >= 128) | (k < 128), 1, 1, 257, 257, device=device)
        settings = dict(zip(("mask", "blocks"), blocks.from_flex(made), strict=True))
        assert torch.equal(settings["mask"][0, 0], mask)
        expected = flex_attention(*(x.detach() for x in leaves), block_mask=made)
    out, tangent = attention_with_tangent(*leaves, *values[3:], **settings)
    weight = draw(8, 1, 1, 257, 16, dtype=torch.float32).half().to(device)
    found = torch.autograd.grad(out, leaves, weight)
    wide = [x.detach().double().nan_to_num(0.0).requires_grad_() for x in values]
    with sdpa_kernel(SDPBackend.MATH):
        stock = F.scaled_dot_product_attention(*wide[:3], mask)
    exact = torch.autograd.grad(stock, wide[:3], weight.double())
    with torch.no_grad():
        moved = plain.attention(*wide, mask=mask)
    figures = {
        "float16 output": relative_error(out.double(), stock),
        "float16 tangent": relative_error(tangent.double(), moved),
    }
    figures["float16 gradients"] = max(relative_error(a.double(), b) for a, b in zip(found, exact, strict=True))
    if "flex" in name:
        figures["float16 flex"] = relative_error(out, expected)
    return figures


def traced(name: str, device: str) -> dict[str, float]:
    """Graphs of output, tangent and gradients compute the same bits."""
    q, k, v, dq = (draw(i, 1, 2, 8, 16, dtype=torch.float32).to(device) for i in range(4))
    mask = draw(9, 8, 8).to(device) > -0.5

    def step(q: Tensor, k: Tensor, v: Tensor, dq: Tensor) -> tuple[Tensor, ...]:
        out, tangent = attention_with_tangent(q, k, v, dq, None, dq, mask=mask, causal=True)
        return out, tangent

    def whole(q: Tensor, k: Tensor, v: Tensor, dq: Tensor) -> tuple[Tensor, ...]:
        out, tangent = step(q, k, v, dq)
        with attention_implementation("triton"):
            alone = attention(q, k, v, dq, None, dq, mask=mask, causal=True)
        return out, tangent, alone, *torch.autograd.grad(out.square().sum(), (q, k, v))

    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = whole(*leaves, dq)
    if name == "compiled":
        out, tangent = torch.compile(step, backend="aot_eager", fullgraph=True)(*leaves, dq)
        values = [(out, tangent, expected[2], *torch.autograd.grad(out.square().sum(), leaves))]
    elif name == "traced":
        values = []
        for mode in ("real", "symbolic"):
            graph = make_fx(whole, tracing_mode=mode, _allow_non_fake_inputs=True)(*leaves, dq)
            names = {str(node.target) for node in graph.graph.nodes}
            assert {f"trigflow.attention_{n}.default" for n in ("tangent", "with_tangent", "gradients")} <= names
            values.append(graph(*leaves, dq))
    else:
        of = torch.ops.trigflow
        lse = torch.zeros(1, 2, 8, device=device)
        settings = (mask.expand(1, 2, 8, 8), None, False, None, False)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        given = (*leaves, dq, None, dq, *settings)
        library.opcheck(of.attention_with_tangent.default, given, test_utils=checks)
        given = (*(x.detach() for x in (dq, *leaves, dq)), lse, *settings)
        library.opcheck(of.attention_gradients.default, given, test_utils=checks)
        return {"order": 0.0}
    gaps = [float((a - b).abs().max()) for value in values for a, b in zip(value, expected, strict=True)]
    return {"order": max(gaps)}


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
