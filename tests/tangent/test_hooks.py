"""Hooks of modules and tensors fire as in a plain run, on the same values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tangent.helpers import draw, reference
from tangent.steps import randomize
from trigflow.tangent import Dual, coverage, jvp

X, DX = draw(1, 4, 3), draw(2, 4, 3)
KINDS = ["register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook"]


def network() -> nn.Sequential:
    net = randomize(nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 2)))
    assert isinstance(net, nn.Sequential)
    return net


def seen_by(kind: str, engine: bool, net: nn.Sequential) -> tuple[list[Tensor], Tensor]:
    """The gradients that a hook on each module is given, and the gradient of the input."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, *gradients: Any) -> None:
        for group in gradients:
            seen.extend(g for g in group if g is not None)

    handles = [getattr(module, kind)(hook) for module in net]
    x = X.clone().requires_grad_()
    out = jvp(net, (x,), (DX,))[0] if engine else net(x)
    out.square().sum().backward()
    for handle in handles:
        handle.remove()
    assert x.grad is not None
    return seen, x.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_backward_hooks_of_modules(kind: str) -> None:
    plain, expected = seen_by(kind, False, network())
    dual, gradient = seen_by(kind, True, network())
    assert plain
    assert len(plain) == len(dual)
    assert all(type(b) is Tensor and torch.equal(a, b) for a, b in zip(plain, dual, strict=True))
    assert torch.equal(gradient, expected)


def test_a_backward_hook_that_changes_the_gradient() -> None:
    net = network()
    net[1].register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],))
    plain, expected = X.clone().requires_grad_(), X.clone().requires_grad_()
    net(expected).sum().backward()
    out, tangent = jvp(net, (plain,), (DX,))
    out.sum().backward()
    assert plain.grad is not None
    assert torch.equal(plain.grad, expected.grad)
    assert torch.allclose(tangent, reference(network(), (X,), (DX,)), rtol=1e-12)


def test_backward_hooks_keep_the_tangent() -> None:
    net = network()
    expected = jvp(net, (X,), (DX,))[1]
    for module in net:
        module.register_full_backward_hook(lambda module, inputs, outputs: None)
    assert torch.equal(jvp(net, (X,), (DX,))[1], expected)
    report = coverage(net, X)
    assert report.complete
    assert not report.fallbacks


def test_backward_hooks_under_checkpointing() -> None:
    net, seen = network(), []
    net[1].register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    x = X.clone().requires_grad_()

    def fn(x: Tensor) -> Any:
        return checkpoint(net, x, use_reentrant=False)

    out, tangent = jvp(fn, (x,), (DX,))
    assert torch.equal(tangent, jvp(network(), (X,), (DX,))[1])
    out.sum().backward()
    assert len(seen) == 1
    plain = X.clone().requires_grad_()
    network()(plain).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, plain.grad)


def test_forward_hooks_see_and_replace_values() -> None:
    net, seen = network(), []
    net[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    net[1].register_forward_hook(lambda module, inputs, out: seen.append(out) or out + 1)
    x = X.clone().requires_grad_()
    out, tangent = jvp(net, (x,), (DX,))
    assert torch.equal(out, net(x))
    assert torch.allclose(tangent, reference(net, (X,), (DX,)), rtol=1e-12)
    assert type(seen[0]) is Dual


def test_hooks_of_tensors_are_given_the_gradient_of_the_primal() -> None:
    seen: list[Tensor] = []

    def fn(x: Tensor) -> Tensor:
        y = x * 3
        y.register_hook(seen.append)
        return y * y

    x = X.clone().requires_grad_()
    jvp(fn, (x,), (DX,))[0].sum().backward()
    assert type(seen[0]) is Tensor
    assert torch.equal(seen[0], 6 * X)
