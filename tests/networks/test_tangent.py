"""Whole networks under the tangent engine: torch.func.jvp for tangents, a plain run for outputs and gradients."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from networks.helpers import KINDS, SWITCHES, awake, draw, inputs, network
from trigflow.tangent import coverage, jvp


def gradients(net: nn.Module, x: Tensor, out: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((out * draw(21, *out.shape).to(out)).sum(), [x, *net.parameters()]))


def check(net: nn.Module, x: Tensor, t: Tensor, **conditions: Tensor) -> None:
    """Tangent to 1e-10 relative; output and gradients bit by bit; the same random draws everywhere."""
    directions = (draw(22, *x.shape).to(x), draw(23, *t.shape).to(t))

    # torch.func.jvp needs contiguous group norms, and attention without the fused kernels.
    copy = deepcopy(net).to(memory_format=torch.contiguous_format)

    def forward(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t, **conditions)

    def reference(x: Tensor, t: Tensor) -> Tensor:
        return copy(x, t, **conditions)

    def fresh(run: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(24)
            return run()

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, expected = fresh(lambda: torch.func.jvp(reference, (x.contiguous(), t), directions))
    assert expected.norm() > 1e-2

    x = x.detach().requires_grad_()
    plain = fresh(lambda: forward(x, t))
    plain_gradients = gradients(net, x, plain)
    out, tangent = fresh(lambda: jvp(forward, (x, t), directions))
    assert torch.equal(out, plain)
    for a, b in zip(gradients(net, x, out), plain_gradients, strict=True):
        assert torch.equal(a, b)
    assert not tangent.requires_grad
    assert (tangent - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_switch(kind: str, switch: str) -> None:
    net = awake(network(kind, **SWITCHES[switch])).double()
    check(net, *inputs(kind, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_and_guidance(kind: str) -> None:
    net = awake(network(kind, num_classes=3, takes=("guidance",))).double()
    scales = torch.tensor([1.0, 1.4, 2.0], dtype=torch.float64)
    check(net, *inputs(kind, dtype=torch.float64), label=torch.tensor([0, 3, 1]), guidance=scales)
    check(net, *inputs(kind, dtype=torch.float64), guidance=scales)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_in_training(kind: str) -> None:
    """The tangent passes through the mask of the same forward."""
    net = awake(network(kind, dropout=0.3)).double().train()
    check(net, *inputs(kind, dtype=torch.float64))
    check(net.eval(), *inputs(kind, dtype=torch.float64))


@pytest.mark.parametrize("attention", [(0,), (0, 1)])
def test_attention(attention: tuple[int, ...]) -> None:
    check(awake(network("unet", attention=attention)).double(), *inputs("unet", dtype=torch.float64))


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (11, 5), (8, 8)])
@pytest.mark.parametrize("patch", [1, 2, 3])
def test_sizes_and_patches(patch: int, size: tuple[int, int]) -> None:
    net = awake(network("unet", width=4, patch=patch, mult=(1, 2, 1))).double()
    check(net, draw(25, 2, 2, *size, dtype=torch.float64), torch.tensor([0.4, 1.3], dtype=torch.float64))


def test_everything_together() -> None:
    settings = {"attention": (1,), "patch": 2, "dropout": 0.2, "num_classes": 2, "takes": ("guidance",), "channels": 3}
    net = awake(network("unet", **settings)).double().train()
    x, t = draw(26, 3, 3, 7, 9, dtype=torch.float64), torch.tensor([0.1, 0.8, 1.5], dtype=torch.float64)
    check(net, x, t, label=torch.tensor([2, 1, 0]), guidance=torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64))


def test_channels_last() -> None:
    net = awake(network("unet", attention=(1,))).double().to(memory_format=torch.channels_last)
    x, t = inputs("unet", dtype=torch.float64)
    check(net, x.contiguous(memory_format=torch.channels_last), t)


@pytest.mark.parametrize("kind", KINDS)
def test_no_part_of_a_network_needs_the_slow_path(kind: str) -> None:
    settings: dict[str, Any] = {"attention": (0, 1), "patch": 2} if kind == "unet" else {}
    net = awake(network(kind, time_map="log", dropout=0.1, **settings)).train()
    report = coverage(net, *inputs(kind))
    assert report.complete, str(report)
    assert not report.fallbacks, str(report)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_tangent_is_finite_and_near(kind: str, dtype: torch.dtype) -> None:
    net = awake(network(kind))
    x, t = inputs(kind)
    directions = (draw(27, *x.shape), draw(28, *t.shape))
    _, exact = jvp(net, (x, t), directions)
    with torch.autocast("cpu", dtype):
        plain = net(x, t)
        out, tangent = jvp(net, (x, t), directions)
    assert torch.equal(out, plain)
    assert tangent.dtype == out.dtype
    assert (tangent.float() - exact).norm() < 0.05 * exact.norm()
