"""Operators between numbers, constants and tensors that carry tangents: in either order, as in a plain run."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tangent.helpers import check, draw
from trigflow.tangent import jvp

ARITHMETIC = [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.mod]


def positive(seed: int, *shape: int) -> Tensor:
    return draw(seed, *shape).abs() + 0.5


@pytest.mark.parametrize("function", ARITHMETIC)
@pytest.mark.parametrize("shape", [(7, 5), (5,), (1,), ()])
def test_a_constant_tensor_on_either_side(function: Callable[..., Any], shape: tuple[int, ...]) -> None:
    """A class derived from Tensor is asked first by Python, also on the right: the division of a constant must not
    become a product with a reciprocal, which rounds in another way."""
    constant = positive(1, *shape)
    x = positive(2, 7, 5)
    check(lambda x: function(constant, x), (x,))
    check(lambda x: function(x, constant), (x,))


@pytest.mark.parametrize("function", ARITHMETIC)
def test_the_graph_is_that_of_a_plain_run(function: Callable[..., Any]) -> None:
    constant, x = positive(1, 7, 5), positive(2, 7, 5).requires_grad_()
    out = jvp(lambda x: function(constant, x), (x,), (torch.ones(7, 5, dtype=torch.float64),))[0]
    assert type(out.grad_fn) is type(function(constant, x).grad_fn)


@pytest.mark.parametrize("function", ARITHMETIC[:-1])  # PyTorch has no forward derivative of a number modulo a tensor
@pytest.mark.parametrize("number", [3, 0.7])
def test_a_number_on_either_side(function: Callable[..., Any], number: float) -> None:
    x = positive(2, 7, 5)
    check(lambda x: function(number, x), (x,))
    check(lambda x: function(x, number), (x,))


def test_matrix_products_with_a_constant() -> None:
    a, b = draw(1, 4, 5), draw(2, 5, 3)
    check(lambda x: a @ x, (b,))
    check(lambda x: x @ b, (a,))


def test_checkpointing_saves_the_factors_in_the_order_of_a_plain_run() -> None:
    """The second run of a checkpointed region is plain, and must save tensors of the same shapes in the same order."""
    constant, x = draw(1, 7, 5), draw(2, 1, 5).requires_grad_()

    def fn(x: Tensor) -> Any:
        return checkpoint(lambda x: (constant * x) @ x.mT, x, use_reentrant=False)

    out, tangent = jvp(fn, (x,), (torch.ones(1, 5, dtype=torch.float64),))
    gradient = torch.autograd.grad(out.sum(), x)[0]
    plain = torch.autograd.grad(((constant * x) @ x.mT).sum(), x)[0]
    assert torch.equal(gradient, plain)
    assert tangent.any()
