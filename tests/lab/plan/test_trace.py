"""Counting operations and memory, against sums done by hand and against the same computation with values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trigflow.lab.plan.trace import TargetArithmetic, Trace, arithmetic_of
from trigflow.tangent import jvp
from trigflow.tangent.attention import attention

MIB = 2**20


def flops_of(function: Callable[[], object]) -> int:
    with Trace() as trace:
        function()
    return trace.flops


def test_a_multiply_add_is_two() -> None:
    x, w = torch.randn(5, 7), torch.randn(3, 7)
    assert flops_of(lambda: F.linear(x, w)) == 2 * 5 * 7 * 3
    assert flops_of(lambda: torch.randn(2, 5, 7) @ torch.randn(2, 7, 4)) == 2 * 2 * 5 * 7 * 4
    assert flops_of(lambda: x + x) == 0


def test_convolutions_and_their_gradients() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    conv = nn.Conv2d(3, 5, 3, padding=1)
    forward = 2 * 2 * 64 * 3 * 5 * 9
    assert flops_of(lambda: conv(x)) == forward
    assert flops_of(lambda: conv(x).sum().backward()) == 3 * forward


def test_attention_counts_products_only_once_each() -> None:
    q, k, v = (torch.randn(2, 3, length, 16, requires_grad=True) for length in (10, 12, 12))
    product = 2 * 2 * 3 * 10 * 12 * 16
    assert flops_of(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
    # Backward of fused attention: the scores again, then dP, dv, dq, dk.
    assert flops_of(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == 7 * product


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.GroupNorm(2, 8), nn.Dropout(0.3), nn.Conv2d(8, 3, 3))


def engine_step(network: nn.Module, x: Tensor) -> None:
    out, tangent = jvp(network, (x,), (torch.ones_like(x),))
    (out - tangent).square().mean().backward()


def test_tensors_without_values_count_as_those_with() -> None:
    network, x = net(), torch.randn(2, 3, 8, 8)
    engine_step(network, x)  # what is made once is made
    with Trace() as real:
        engine_step(network, x)
    with FakeTensorMode():
        network, x = net(), torch.randn(2, 3, 8, 8)
        engine_step(network.eval(), x)
        network.train()
        with Trace() as fake, arithmetic_of("cpu"):
            engine_step(network, x)
    forward = 2 * 2 * (64 * 3 * 8 * 9 + 36 * 8 * 3 * 9)
    first = 2 * 2 * 64 * 3 * 8 * 9  # whose input needs no gradient
    assert real.flops == fake.flops == 2 * forward + 2 * forward - first
    assert fake.live <= real.live


def test_memory_that_is_shared_counts_once() -> None:
    with Trace() as trace:
        x = torch.empty(MIB // 4)
        views = x[:10], x.view(2, -1), x.detach()
        x.add_(1)
        assert trace.live == MIB
        y = x + 1
        assert trace.live == trace.peak == 2 * MIB
        del x, views
        assert trace.live == MIB
        del y
    assert (trace.live, trace.peak) == (0, 2 * MIB)


def test_memory_that_grows_with_the_batch() -> None:
    with Trace(batch=7) as trace:
        weights = torch.empty(5, 3).exp()
        x = torch.empty(7, 3)
        y = x @ weights.T
        del x, y
    assert trace.peak == 4 * (15 + 15 + 21 + 35) - 60  # exp has dropped its argument
    assert trace.growing == 4 * (21 + 35)


def test_what_was_there_before_does_not_count() -> None:
    x = torch.empty(MIB // 4)
    with Trace() as trace:
        x.mul_(2)
        kept = x.view(-1, 2), x[3:]
    assert (trace.live, trace.peak) == (0, 0)
    assert len(kept) == 2


def test_memory_kept_for_the_backward_pass() -> None:
    x = torch.randn(MIB // 4, requires_grad=True)
    with Trace() as trace:
        y = x.exp().sin()  # exp keeps its output, which is the input that sin keeps
        assert trace.live == 2 * MIB
        z = y.sum()
        del y
        assert trace.live == MIB + 4
        z.backward()
        assert x.grad is not None
        assert trace.live == MIB + 4  # the gradient, and z
    assert 3 * MIB <= trace.peak <= 3 * MIB + 16


@pytest.mark.parametrize(("target", "dtype"), [("cuda", torch.float32), ("cpu", torch.bfloat16)])
def test_autocast_of_the_target(target: str, dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []

    def function(x: Tensor) -> Tensor:
        h = F.linear(x, torch.ones(4, 4))
        h = F.group_norm(h, 2)
        seen.append(h.dtype)
        return F.linear(h, torch.ones(4, 4))

    x = torch.randn(3, 4)
    with arithmetic_of(target), torch.autocast("cpu", dtype=torch.bfloat16):  # type: ignore[arg-type]
        assert function(x).dtype == torch.bfloat16
        out, tangent = jvp(function, (x,), (x,))
        assert out.dtype == tangent.dtype == torch.bfloat16
    assert seen == [dtype, dtype]
    with arithmetic_of(target):  # type: ignore[arg-type]
        assert function(x).dtype == torch.float32


def test_dropout_has_the_mask_of_the_target() -> None:
    x = torch.randn(MIB // 4, requires_grad=True)
    for target, mask in (("cuda", MIB // 4), ("cpu", MIB)):
        with Trace() as trace, TargetArithmetic(target):  # type: ignore[arg-type]
            y = F.dropout(x, 0.5)
        assert trace.live == MIB + mask
        del y


def test_dropout_drops_the_same_of_the_tangent() -> None:
    x = torch.randn(1000)
    with TargetArithmetic("cuda"):
        assert F.dropout(x, 0.5, training=False) is x
        y, dy = jvp(lambda v: F.dropout(v, 0.4), (x,), (torch.full_like(x, 2.0),))
    kept = y != 0
    assert 500 < int(kept.sum()) < 700
    assert torch.allclose(y[kept], x[kept] / 0.6)
    assert torch.equal(dy != 0, kept)


def test_tangents_of_attention_are_counted_alike_by_whatever_computes_them() -> None:
    """The chunked implementation is one operator, which keeps no scores."""
    with FakeTensorMode():
        q, k, v, dq, dk, dv = (torch.empty(3, 2, 64, 16) for _ in range(6))
        for given in ((dq, dk, dv), (dq, None, None), (None, None, dv)):
            with Trace() as plain:
                attention(q, k, v, *given, implementation="plain")
            with Trace() as chunked:
                attention(q, k, v, *given, implementation="chunked")
            assert chunked.flops == plain.flops > 0
            assert chunked.peak == 4 * q.numel() < plain.peak
