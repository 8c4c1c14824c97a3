"""One training step of a network, plain and with the engine, and what both must have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent.helpers import draw, reference, same
from trigflow.tangent import jvp


def randomize(net: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Every parameter at random, so that no block or output starts at zero."""
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(draw(1000 + i, *p.shape) * (0.5 if p.ndim == 1 else p[0].numel() ** -0.5))
    return net.to(dtype)


def set_dropout(net: nn.Module, p: float) -> nn.Module:
    """The network in training mode with this probability in each of its dropout modules."""
    found = [module for module in net.modules() if isinstance(module, nn.Dropout)]
    assert found
    for module in found:
        module.p = p
    return net.train()


def directions(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A fixed random tangent for each input."""
    return tuple(torch.empty_like(x).copy_(draw(31 + i, *x.shape)) for i, x in enumerate(inputs))


def oracle(fn: Callable[..., Any], inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...], seed: int = 0) -> Any:
    """Tangent by `torch.func.jvp`, which has no rule for the fused kernels of attention, with the draws of `seed`."""
    torch.manual_seed(seed)
    with sdpa_kernel(SDPBackend.MATH):
        return reference(fn, inputs, tangents)


@dataclass
class Step:
    """What one forward and backward left behind.

    Attributes:
        out: output of the network.
        tangent: its tangent, None for a plain step.
        gradients: of the inputs, then of the parameters.
        draws: state of the random generator.
    """

    out: Tensor
    tangent: Tensor | None
    gradients: list[Tensor | None]
    draws: Tensor


def step(net: nn.Module, fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], engine: bool, seed: int = 0) -> Step:
    """A training step of `net` on a fixed random functional of `fn(*inputs)`, which calls it."""
    net.zero_grad()
    torch.manual_seed(seed)
    leaves = tuple(x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs)
    tangent = None
    if engine:
        out, tangent = jvp(fn, leaves, directions(inputs))
    else:
        out = fn(*leaves)
    (out.float() * draw(9, *out.shape)).sum().backward()
    parameters = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    return Step(out, tangent, [*[x.grad for x in leaves], *parameters], torch.get_rng_state())


def assert_same_step(net: nn.Module, fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], seed: int = 0) -> Tensor:
    """Output, gradients and random draws of both steps agree bit for bit; returns the tangent, which is not zero."""
    plain = step(net, fn, inputs, engine=False, seed=seed)
    dual = step(net, fn, inputs, engine=True, seed=seed)
    assert torch.equal(dual.out, plain.out)
    assert dual.out.stride() == plain.out.stride()
    assert torch.equal(dual.draws, plain.draws)
    assert all(same(a, b) for a, b in zip(dual.gradients, plain.gradients, strict=True))
    assert any(g is not None and g.any() for g in dual.gradients)
    tangent = dual.tangent
    assert tangent is not None
    assert tangent.dtype == dual.out.dtype
    assert tangent.stride() == dual.out.stride()
    assert tangent.grad_fn is None
    assert not tangent.requires_grad
    assert tangent.isfinite().all()
    assert torch.linalg.vector_norm(tangent.double()) > 1e-3 * torch.linalg.vector_norm(dual.out.detach().double())
    return tangent


def central_difference(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...], h: float) -> Tensor:
    """`(8 (f(x + h dx) - f(x - h dx)) - (f(x + 2h dx) - f(x - 2h dx))) / 12h`, exact to order h^4."""
    with torch.no_grad():

        def gap(width: float) -> Tensor:
            ahead, behind = (fn(*[x + s * width * dx for x, dx in zip(inputs, tangents, strict=True)]) for s in (1, -1))
            return ahead - behind

        return (8 * gap(h) - gap(2 * h)) / (12 * h)
