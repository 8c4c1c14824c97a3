"""Oracles for the tangent engine: torch.func.jvp for tangents, a plain run for outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trigflow.tangent import coverage, jvp


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64, low: float | None = None) -> Tensor:
    """Normal numbers, or numbers in [low, low + 2) for functions with a restricted domain."""
    g = torch.Generator().manual_seed(seed)
    if low is not None:
        return low + 2 * torch.rand(shape, generator=g, dtype=dtype)
    return torch.randn(shape, generator=g, dtype=dtype)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """`|value - expected| / |expected|`, absolute where the expected tensor is all zero."""
    assert value.shape == expected.shape
    value, expected = value.detach(), expected.detach()
    gap = torch.linalg.vector_norm(value - expected)
    norm = torch.linalg.vector_norm(expected)
    return float(gap / norm if norm > 0 else gap)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def floats(value: Any) -> list[Tensor]:
    return [leaf for leaf in tensors(value) if leaf.is_floating_point() or leaf.is_complex()]


def gradients(out: Any, inputs: list[Tensor]) -> list[Tensor | None]:
    """Gradients of a fixed random functional of the outputs."""
    total = torch.zeros((), dtype=torch.float64)
    for i, leaf in enumerate(floats(out)):
        if leaf.requires_grad:
            weight = draw(97 + i, *leaf.shape).to(leaf.dtype)
            total = total + (leaf * weight).sum().abs().double()
    if not total.requires_grad:
        return [None for _ in inputs]
    return list(torch.autograd.grad(total, inputs, allow_unused=True))


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def reference(fn: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """Tangents by torch.func.jvp, with the arguments that carry none held fixed."""
    moving = [i for i, t in enumerate(tangents) if t is not None]

    def part(*values: Tensor) -> Any:
        full = list(primals)
        for i, v in zip(moving, values, strict=True):
            full[i] = v
        return fn(*full)

    with torch.no_grad():
        return torch.func.jvp(part, tuple(primals[i].detach() for i in moving), tuple(tangents[i] for i in moving))[1]


def check(
    fn: Callable[..., Any],
    primals: tuple[Any, ...],
    carry: tuple[bool, ...] | None = None,
    tolerance: float = 1e-10,
    expected: Any = None,
) -> None:
    """Engine against oracles: tangent within tolerance; output and gradients bit-equal; no graph on the tangent."""
    carry = carry or tuple(isinstance(p, Tensor) and p.is_floating_point() for p in primals)
    tangents = tuple(
        torch.empty_like(p).copy_(draw(31 + i, *p.shape)) if c else None
        for i, (p, c) in enumerate(zip(primals, carry, strict=True))
    )
    if expected is None:
        expected = reference(fn, primals, tangents)

    inputs = [p.detach().clone().requires_grad_() if isinstance(p, Tensor) and p.is_floating_point() else p for p in primals]
    leaves = [p for p in inputs if isinstance(p, Tensor) and p.requires_grad]
    plain = fn(*inputs)
    plain_gradients = gradients(plain, leaves)
    out, tangent = jvp(fn, tuple(inputs), tangents)

    assert pytree.tree_structure(out) == pytree.tree_structure(plain) == pytree.tree_structure(tangent)
    for a, b in zip(tensors(out), tensors(plain), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert a.requires_grad == b.requires_grad
    for a, b in zip(gradients(out, leaves), plain_gradients, strict=True):
        assert same(a, b)
    for t, o in zip(tensors(tangent), tensors(out), strict=True):
        assert t.dtype == o.dtype
        assert t.shape == o.shape
        assert t.grad_fn is None
        assert not t.requires_grad
    for t, e in zip(floats(tangent), floats(expected), strict=True):
        assert relative_error(t, e) < tolerance


def no_fallback(fn: Callable[..., Any], *inputs: Any) -> None:
    """Every function that `fn` calls on a tangent has a rule of its own."""
    report = coverage(fn, *inputs)
    assert report.complete, str(report)
    assert not report.fallbacks, str(report)


def by_jacobian(fn: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """Tangents from the full Jacobian, row by row backwards: for functions that torch.func.jvp cannot take."""
    moving = [i for i, t in enumerate(tangents) if t is not None]

    def part(*values: Tensor) -> Any:
        full = list(primals)
        for i, v in zip(moving, values, strict=True):
            full[i] = v
        return tuple(floats(fn(*full)))

    rows = torch.autograd.functional.jacobian(part, tuple(primals[i].detach() for i in moving))
    return [
        sum(torch.tensordot(block, tangents[i], tangents[i].ndim) for i, block in zip(moving, blocks, strict=True))
        for blocks in rows
    ]
