"""Random compositions of functions, shapes and layouts against torch.func.jvp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tangent.helpers import check, draw

# Each takes the current value, (b, c, h, w) with c = 4, and another of the same shape, and keeps the shape.
STEPS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a + b,
    lambda a, b: a * torch.tanh(b),
    lambda a, b: a - 0.3 * b.flip(0),
    lambda a, b: a / (1 + b * b),
    lambda a, b: torch.where(a > 0, a, 0.2 * b),
    lambda a, b: torch.maximum(a, b),
    lambda a, b: F.silu(a) + F.gelu(b),
    lambda a, b: F.softplus(a).sqrt(),
    lambda a, b: a.sigmoid().log(),
    lambda a, b: F.group_norm(a.contiguous(), 2) + b,
    lambda a, b: F.layer_norm(a.contiguous(), a.shape[1:]),
    lambda a, b: F.normalize(a, dim=1),
    lambda a, b: torch.softmax(a, dim=1) * b,
    lambda a, b: torch.cat([a, b], dim=1)[:, 2:6],
    lambda a, b: torch.cat([a, b], dim=1).chunk(2, 1)[1] * a,
    lambda a, b: a.permute(0, 2, 3, 1).reshape(a.shape[0], -1, 4).transpose(1, 2).reshape(a.shape),
    lambda a, b: a.transpose(2, 3).transpose(2, 3) + b.mean((2, 3), keepdim=True),
    lambda a, b: (torch.einsum("bchw,bdhw->bcd", a, b).softmax(-1) @ a.flatten(2)).view(a.shape) + b,
    lambda a, b: F.interpolate(F.avg_pool2d(a, 2), scale_factor=2.0, mode="nearest") + b,
    lambda a, b: F.conv2d(a, torch.linspace(-1, 1, 144, dtype=a.dtype).view(4, 4, 3, 3), padding=1),
    lambda a, b: F.pad(a, (1, 1, 1, 1))[..., 2:, :-2] - b,
    lambda a, b: a.clamp(-1, 1) + a.abs() ** 1.5,
    lambda a, b: torch.sin(a) * torch.exp(-(b**2)),
    lambda a, b: torch.stack([a, b]).amax(0),
    lambda a, b: torch.stack(a.unbind(1), dim=1) * b.sum(),
    lambda a, b: torch.lerp(a, b, torch.sigmoid(a)),
    lambda a, b: a + b.var(dim=1, keepdim=True) + b.norm(),
    lambda a, b: torch.addcmul(a, b, a, value=0.5),
    lambda a, b: torch.softmax(a @ b.mT / a.shape[-1] ** 0.5, -1) @ a + b,
]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    picks=st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.booleans()), min_size=1, max_size=7),
    layout=st.sampled_from(["packed", "channels_last", "sliced", "expanded"]),
    carry=st.sampled_from([(True, True), (True, False), (False, True)]),
    seed=st.integers(0, 10**6),
)
def test_compositions(picks: Any, layout: str, carry: tuple[bool, bool], seed: int) -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        a, b = x, y.expand(2, 4, 4, 6)
        for i, swap in picks:
            a, b = STEPS[i](a, b), a
            if swap:
                a, b = b, a
        return a * 0.5 + b

    x, y = draw(seed, 2, 4, 4, 6), draw(seed + 1, 2, 4, 4, 6)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = draw(seed, 2, 8, 4, 12)[:, ::2, :, 1::2]
    elif layout == "expanded":
        y = draw(seed + 1, 2, 4, 1, 1)
    check(fn, (x, y), carry, tolerance=1e-9)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    ones=st.lists(st.booleans(), min_size=4, max_size=4),
    drop=st.integers(0, 3),
    carry=st.sampled_from([(True, True), (True, False), (False, True)]),
    which=st.integers(0, 9),
    seed=st.integers(0, 10**6),
)
def test_broadcasts(shape: list[int], ones: list[bool], drop: int, carry: tuple[bool, bool], which: int, seed: int) -> None:
    functions: list[Callable[[Tensor, Tensor], Tensor]] = [
        torch.add,
        torch.sub,
        torch.mul,
        torch.div,
        torch.pow,
        torch.maximum,
        torch.atan2,
        lambda a, b: torch.where(a > b, a, b),
        lambda a, b: torch.addcmul(a, b, a),
        lambda a, b: torch.lerp(a, b, b),
    ]
    other = [1 if one else n for n, one in zip(shape, ones, strict=False)][min(drop, len(shape)) :]
    a, b = draw(seed, *shape, low=0.5), draw(seed + 1, *other, low=0.5)
    fn = functions[which]
    if which < 8:
        check(fn, (a, b), carry)
        check(lambda a, b: fn(b, a), (a, b), carry)
    else:
        check(fn, (a, b), carry)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    axes=st.permutations([0, 1, 2]),
    dim=st.integers(-3, 2),
    keep=st.booleans(),
    which=st.integers(0, 8),
    seed=st.integers(0, 10**6),
)
def test_reductions_over_strides(axes: list[int], dim: int, keep: bool, which: int, seed: int) -> None:
    functions: list[Callable[[Tensor], Any]] = [
        lambda x: x.sum(dim, keepdim=keep),
        lambda x: x.mean(dim, keepdim=keep),
        lambda x: x.amax(dim, keepdim=keep),
        lambda x: x.max(dim, keepdim=keep),
        lambda x: x.var(dim, keepdim=keep),
        lambda x: x.logsumexp(dim, keepdim=keep),
        lambda x: torch.linalg.vector_norm(x, dim=dim, keepdim=keep),
        lambda x: x.softmax(dim),
        lambda x: x.cumsum(dim),
    ]
    check(functions[which], (draw(seed, 3, 4, 5).permute(*axes),))
