"""Convolutions with all their settings, pooling and resampling, over drawn shapes and layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tangent.helpers import by_jacobian, check, draw, no_fallback, reference
from trigflow.tangent import jvp

CARRIES = st.sampled_from([(True,) * 3, (True, False, False), (False, True, False), (False, False, True)])


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    axes=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same", "valid"]),
    dilation=st.integers(1, 2),
    kernel=st.integers(1, 3),
    batched=st.booleans(),
    last=st.booleans(),
    carry=CARRIES,
)
def test_convolutions(
    axes: int,
    groups: int,
    stride: int,
    padding: Any,
    dilation: int,
    kernel: int,
    batched: bool,
    last: bool,
    carry: tuple[bool, ...],
) -> None:
    conv: Any = getattr(F, f"conv{axes}d")
    stride = 1 if padding == "same" else stride
    x = draw(1, *((2,) if batched else ()), 4, *[5] * axes)
    w, b = draw(2, 2 * groups, 4 // groups, *[kernel] * axes), draw(3, 2 * groups)
    if last and batched and axes == 2:
        x = x.contiguous(memory_format=torch.channels_last)

    def fn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return conv(x, w, b, stride, padding, dilation, groups)

    check(fn, (x, w, b), carry)
    check(lambda x, w: conv(x, w, groups=groups), (x, w), carry[:2] if any(carry[:2]) else (True, True))
    no_fallback(fn, x, w, b)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    axes=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    extra=st.integers(0, 1),
    dilation=st.integers(1, 2),
    carry=CARRIES,
)
def test_transposed_convolutions(
    axes: int, groups: int, stride: int, padding: int, extra: int, dilation: int, carry: tuple[bool, ...]
) -> None:
    conv: Any = getattr(F, f"conv_transpose{axes}d")
    extra = min(extra, max(stride, dilation) - 1)
    x, w, b = draw(1, 2, 4, *[3] * axes), draw(2, 4, 3, *[2] * axes), draw(3, 3 * groups)

    def fn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return conv(x, w, b, stride, padding, extra, groups, dilation)

    check(fn, (x, w, b), carry)
    no_fallback(fn, x, w, b)


def test_a_weight_normalized_in_the_forward() -> None:
    """Forced weight normalization with a gain that moves."""

    def fn(x: Tensor, w: Tensor, gain: Tensor) -> Tensor:
        return F.conv2d(x, gain * F.normalize(w.flatten(1), dim=1).view_as(w), padding="same")

    for carry in [(True, True, True), (False, True, False), (False, False, True)]:
        check(fn, (draw(1, 2, 3, 4, 4), draw(2, 5, 3, 3, 3), draw(3)), carry)


def test_the_weight_norm_of_pytorch() -> None:
    net = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 4).double())
    check(net, (draw(1, 2, 3),))
    for dim, shape in ((0, (4, 1, 1)), (2, (1, 1, 2)), (-1, ())):
        fn = lambda v, g: torch._weight_norm(v, g, dim)  # noqa: B023, E731
        v, g = draw(1, 4, 3, 2), draw(2, *shape)
        for carry in [(True, True), (True, False), (False, True)]:
            tangents = tuple(draw(31 + i, *p.shape) if carry[i] else None for i, p in enumerate((v, g)))
            check(fn, (v, g), carry, expected=by_jacobian(fn, (v, g), tangents))
        no_fallback(fn, v, g)


VOLUME = (2, 4, 4, 6, 4)
POOLS: dict[str, tuple[int, Callable[[Any], Any]]] = {
    **{
        f"{kind}{n}d {i}": (n, lambda x, f=f"{kind}{n}d", s=s: getattr(F, f)(x, **s))
        for n in (1, 2, 3)
        for kind in ("avg_pool", "max_pool")
        for i, s in enumerate(
            [
                {"kernel_size": 3, "stride": 2, "padding": 1},
                {"kernel_size": 2, "ceil_mode": True},
                {"kernel_size": 2, "stride": 1},
            ]
        )
    },
    **{
        f"adaptive_{kind}_pool{n}d": (n, lambda x, f=f"adaptive_{kind}_pool{n}d": getattr(F, f)(x, 3))
        for n in (1, 2, 3)
        for kind in ("avg", "max")
    },
    "max_pool2d dilation": (2, lambda x: F.max_pool2d(x, 2, 1, dilation=2)),
    "torch.max_pool2d": (2, lambda x: torch.max_pool2d(x, 2)),
    "max_pool2d_with_indices": (2, lambda x: torch._C._nn.max_pool2d_with_indices(x, 2)),
    "avg_pool2d without padding": (2, lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    "avg_pool2d divisor": (2, lambda x: F.avg_pool2d(x, 2, divisor_override=3)),
    "lp_pool1d": (1, lambda x: F.lp_pool1d(x.abs(), 3, 2)),
    "lp_pool2d": (2, lambda x: F.lp_pool2d(x.abs(), 2, 3, stride=1)),
    "max_unpool2d": (2, lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)),
    "max_unpool1d": (1, lambda x: F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2)),
    **{
        f"interpolate {mode} {align} {antialias}": (
            {"linear": 1, "trilinear": 3}.get(mode, 2),
            lambda x, m=mode, a=align, aa=antialias: F.interpolate(
                x, size=[5] * (x.ndim - 2), mode=m, align_corners=a, antialias=aa
            ),
        )
        for mode in ("nearest", "nearest-exact", "linear", "bilinear", "bicubic", "trilinear", "area")
        for align in ((None,) if mode in ("nearest", "nearest-exact", "area") else (True, False))
        for antialias in ((False, True) if mode in ("bilinear", "bicubic") else (False,))
    },
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_and_resampling(name: str) -> None:
    axes, fn = POOLS[name]
    x = draw(1, *VOLUME[: 2 + axes])
    check(fn, (x,))
    check(fn, (draw(1, *VOLUME[: axes + 1], 2 * VOLUME[axes + 1])[..., ::2],))
    if name != "torch.max_pool2d":
        no_fallback(fn, x)


@pytest.mark.parametrize("axes", [2, 3])
def test_fractional_pooling_draws_its_regions_once(axes: int) -> None:
    pool = getattr(F, f"fractional_max_pool{axes}d")
    samples = draw(5, 2, 4, axes, low=0.0) / 2
    check(lambda x: pool(x, 2, output_size=2, _random_samples=samples), (draw(1, *VOLUME[: 2 + axes]),))

    def fn(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return pool(x, 2, output_ratio=(0.5,) * axes)

    x, dx = draw(1, *VOLUME[: 2 + axes]), draw(2, *VOLUME[: 2 + axes])
    plain, after = fn(x), torch.rand(1)
    out, tangent = jvp(fn, (x,), (dx,))
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(out, plain)
    assert torch.equal(tangent, reference(fn, (x,), (dx,)))


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    axes=st.integers(1, 3),
    mode=st.sampled_from(["constant", "reflect", "replicate", "circular"]),
    sizes=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    value=st.sampled_from([None, 2.0]),
)
def test_padding(axes: int, mode: str, sizes: list[int], value: float | None) -> None:
    def fn(x: Tensor) -> Tensor:
        return F.pad(x, sizes[: 2 * axes], mode, value if mode == "constant" else None)

    check(fn, (draw(1, *VOLUME[: 2 + axes]),))
    no_fallback(fn, draw(1, *VOLUME[: 2 + axes]))
