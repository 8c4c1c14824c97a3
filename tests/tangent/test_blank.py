"""Tensors made like one that carries a tangent, to be filled by writes: rotary embeddings, sliced results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tangent.helpers import check, draw
from trigflow.tangent import jvp

X, Y = draw(1, 4, 6), draw(2, 4, 6)

BLANKS: dict[str, Callable[[Any], Any]] = {
    "empty_like": torch.empty_like,
    "zeros_like": torch.zeros_like,
    "empty_like by keyword": lambda x: torch.empty_like(input=x),
    "new_empty": lambda x: x.new_empty(4, 6),
    "new_zeros": lambda x: x.new_zeros((4, 6)),
    "new_empty_strided": lambda x: x.new_empty_strided((4, 6), (1, 4)),
}


@pytest.mark.parametrize("blank", BLANKS.values(), ids=BLANKS)
def test_filled_by_halves(blank: Callable[[Any], Any]) -> None:
    def fn(x: Any, y: Any) -> Any:
        out = blank(x)
        out[..., 0::2] = x[..., 0::2] * y[..., 1::2]
        out[..., 1::2] = torch.sin(x[..., 1::2])
        return out * y

    check(fn, (X, Y))


@pytest.mark.parametrize("blank", BLANKS.values(), ids=BLANKS)
def test_a_part_that_is_a_constant(blank: Callable[[Any], Any]) -> None:
    def fn(x: Any, y: Any) -> Any:
        out = blank(x)
        out.copy_(y.detach())
        out[:2].add_(x[:2])
        return out.square()

    check(fn, (X, Y))


def test_zeros_are_zeros() -> None:
    check(lambda x: torch.where(x > 0, x, torch.zeros_like(x)) + x.new_zeros(6), (X,))


def test_other_types_stay_plain() -> None:
    def fn(x: Any) -> Any:
        for mask in (torch.zeros_like(x, dtype=torch.bool), x.new_zeros(4, 6, dtype=torch.int64)):
            assert type(mask) is torch.Tensor
        return x * torch.zeros_like(x, dtype=torch.int64)

    assert torch.equal(jvp(fn, (X,), (Y,))[1], torch.zeros_like(X))
