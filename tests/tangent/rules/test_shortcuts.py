"""Rules that take another way on the CPU than the function itself does: the tangent must be the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.tangent import jvp
from trigflow.tangent.attention import attention
from trigflow.tangent.attention.chunked import block_shape
from trigflow.tangent.attention.layout import arguments


def images(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, dx = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return x, dx


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 1), (2, 3, 1, 7)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_doubled_pixels(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> None:
    x, dx = (t.to(dtype) for t in images(*shape))
    if channels_last:
        x, dx = (t.contiguous(memory_format=torch.channels_last) for t in (x, dx))
    out, tangent = jvp(lambda x: F.interpolate(x, scale_factor=2.0), (x,), (dx,))
    assert torch.equal(out, F.interpolate(x, scale_factor=2.0))
    assert torch.equal(tangent, F.interpolate(dx, scale_factor=2.0))
    assert tangent.stride() == out.stride()


@pytest.mark.parametrize(
    "settings",
    [
        {"scale_factor": 2},
        {"scale_factor": 2.0, "recompute_scale_factor": True},
        {"scale_factor": 2.1},
        {"scale_factor": (2, 2)},
        {"scale_factor": (2, 1)},
        {"size": (8, 10)},
        {"size": (7, 10)},
        {"scale_factor": 2.0, "mode": "bilinear"},
        {"scale_factor": 2.0, "mode": "nearest-exact"},
    ],
)
def test_other_enlargements_keep_their_pixels(settings: dict[str, Any]) -> None:
    x, dx = images(2, 3, 4, 5)
    _, tangent = jvp(lambda x: F.interpolate(x, **settings), (x,), (dx,))
    torch.testing.assert_close(tangent, F.interpolate(dx, **settings), rtol=1e-12, atol=0)


def test_doubling_a_transposed_tangent_and_other_numbers_of_axes() -> None:
    x, dx = images(2, 3, 5, 4)
    _, tangent = jvp(lambda x: F.interpolate(x.mT, scale_factor=2), (x,), (dx,))
    assert torch.equal(tangent, F.interpolate(dx.mT, scale_factor=2))
    for shape in ((2, 3, 4), (2, 3, 2, 3, 4)):
        x, dx = images(*shape)
        _, tangent = jvp(lambda x: F.interpolate(x, scale_factor=2), (x,), (dx,))
        assert torch.equal(tangent, F.interpolate(dx, scale_factor=2))


def test_infinite_tangents_stay_where_they_are() -> None:
    x, dx = images(1, 1, 2, 2)
    dx[0, 0, 0, 1] = math.inf
    _, tangent = jvp(lambda x: F.interpolate(x, scale_factor=2), (x,), (dx,))
    assert torch.equal(tangent.isinf(), F.interpolate(dx, scale_factor=2).isinf())


def test_doubling_refuses_what_pytorch_refuses() -> None:
    x, dx = images(1, 1, 2, 2)
    with pytest.raises(ValueError, match="only one of size or scale_factor"):
        jvp(lambda x: F.interpolate(x, size=4, scale_factor=2), (x,), (dx,))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("axes", [(0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_a_strided_input_of_a_linear_layer(axes: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(4, 6, bias=bias, dtype=torch.float64)
    shape = [0, 0, 0]
    for axis, size in zip(axes, (3, 5, 4), strict=True):
        shape[axis] = size
    x, dx = images(*shape)

    def net(x: Tensor) -> Tensor:
        return layer(x.permute(axes))

    out, tangent = jvp(net, (x,), (dx,))
    derivative = torch.func.jvp(net, (x,), (dx,))[1].detach()
    torch.testing.assert_close(tangent, derivative, rtol=1e-12, atol=1e-14)
    assert not tangent.requires_grad
    out.square().sum().backward()
    grads = [p.grad for p in layer.parameters()]
    layer.zero_grad(set_to_none=True)
    expected = net(x)
    assert torch.equal(out, expected)
    expected.square().sum().backward()
    torch.testing.assert_close([p.grad for p in layer.parameters()], grads, rtol=0, atol=0)


def test_blocks_of_attention_are_shared_out_evenly_among_threads() -> None:
    q = torch.randn(64, 1, 4, 8)
    a = arguments(q, q, q, q, None, None, None, None, None, False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert block_shape(a, 13 * 16) == (12, 4, 4)
        assert block_shape(a, 1) == (1, 4, 4)
        torch.set_num_threads(1)
        assert block_shape(a, 13 * 16) == (13, 4, 4)
    finally:
        torch.set_num_threads(threads)


def test_chunked_attention_along_nothing_is_zero_and_over_no_keys_too() -> None:
    q, k = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 0, 4)
    nothing = attention(q, q, q, None, None, None, implementation="chunked")
    assert torch.equal(nothing, torch.zeros_like(q))
    over_none = attention(q, k, k, q, k, k, implementation="chunked")
    assert torch.equal(over_none, torch.zeros_like(q))
