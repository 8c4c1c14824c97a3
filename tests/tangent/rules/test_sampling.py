"""Embeddings, bags of embeddings, sampling on a grid, writing at given places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tangent.helpers import by_jacobian, check, draw, no_fallback
from trigflow.tangent import TangentError, jvp

BOTH = [(True, True), (True, False), (False, True)]


def check_by_jacobian(fn: Callable[..., Any], primals: tuple[Any, ...], carry: tuple[bool, ...]) -> None:
    """`check` for functions that torch.func.jvp cannot take."""
    tangents = tuple(draw(31 + i, *p.shape) if c else None for i, (p, c) in enumerate(zip(primals, carry, strict=True)))
    check(fn, primals, carry, expected=by_jacobian(fn, primals, tangents))


def test_embedding_carries_the_tangent_of_its_table() -> None:
    rows = torch.tensor([[0, 2], [1, 1]])
    check(lambda w: F.embedding(rows, w), (draw(8, 3, 4),))
    check(lambda w: torch.embedding(w, rows), (draw(8, 3, 4),))
    no_fallback(lambda w: F.embedding(rows, w, padding_idx=1), draw(8, 3, 4))


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    cut=st.integers(0, 8),
    mode=st.sampled_from(["sum", "mean", "max"]),
    padding=st.sampled_from([None, 2]),
    carry=st.sampled_from(BOTH),
)
def test_bags_of_embeddings(rows: list[int], cut: int, mode: str, padding: int | None, carry: tuple[bool, bool]) -> None:
    """Bags of any length, empty ones among them."""
    offsets = torch.tensor([0, min(cut, len(rows)), len(rows)])
    table, factors = draw(1, 5, 3), draw(2, len(rows))

    def fn(table: Tensor, factors: Tensor) -> Tensor:
        weights = factors if mode == "sum" else None
        out = F.embedding_bag(torch.tensor(rows), table, offsets, mode=mode, per_sample_weights=weights, padding_idx=padding)
        return out + factors.sum()

    check_by_jacobian(fn, (table, factors), carry)
    no_fallback(fn, table, factors)


def test_renormalized_tables_are_refused() -> None:
    rows = torch.tensor([[0, 2]])
    table = 3 * draw(1, 3, 2)
    before = table.clone()
    for fn in (F.embedding, F.embedding_bag):
        with pytest.raises(TangentError, match="max_norm"):
            jvp(lambda w: fn(rows, w, max_norm=1.0), (table,), (table,))  # noqa: B023
    assert torch.equal(table, before)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    axes=st.sampled_from([2, 3]),
    mode=st.sampled_from(["bilinear", "nearest", "bicubic"]),
    padding=st.sampled_from(["zeros", "border", "reflection"]),
    align=st.booleans(),
    carry=st.sampled_from(BOTH),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_grid_sample(
    axes: int, mode: str, padding: str, align: bool, carry: tuple[bool, bool], strided: bool, seed: int
) -> None:
    mode = "bilinear" if axes == 3 and mode == "bicubic" else mode
    image, grid = draw(seed, 2, 2, *(3, 4, 2)[:axes]), draw(seed + 1, 2, *(2, 3, 1)[:axes], axes, low=-1.2)
    if strided:
        image, grid = image.movedim(1, -1).contiguous().movedim(-1, 1), grid.movedim(-1, 1).contiguous().movedim(1, -1)

    def fn(image: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(image, grid, mode=mode, padding_mode=padding, align_corners=align)

    check_by_jacobian(fn, (image, grid), carry)
    no_fallback(fn, image, grid)


def test_a_spatial_transformer() -> None:
    def fn(theta: Tensor, x: Tensor) -> Tensor:
        return F.grid_sample(x, F.affine_grid(theta, [2, 3, 4, 4], align_corners=False), align_corners=False)

    for carry in BOTH:
        check_by_jacobian(fn, (0.5 * draw(1, 2, 2, 3), draw(2, 2, 3, 4, 4)), carry)
    no_fallback(fn, draw(1, 2, 2, 3), draw(2, 2, 3, 4, 4))


INDEX = torch.tensor([[0], [2], [1]]).expand(3, 4)
WRITES: dict[str, Callable[[Any, Any], Any]] = {
    "index_add": lambda a, b: a.index_add(0, torch.tensor([0, 0, 1]), b),
    "index_add alpha": lambda a, b: torch.index_add(a, 0, torch.tensor([0, 0, 1]), b, alpha=0.5),
    "index_add keywords": lambda a, b: a.index_add(dim=0, index=torch.tensor([2, 0, 1]), source=b),
    "index_copy": lambda a, b: a.index_copy(0, torch.tensor([2, 0, 1]), b),
    "index_fill": lambda a, b: a.index_fill(0, torch.tensor([1]), b.sum()),
    "index_fill number": lambda a, b: a.index_fill(0, torch.tensor([1]), 3.0) + b,
    "index_put": lambda a, b: a.index_put((torch.tensor([0, 2]),), b[:2]),
    "index_put accumulate": lambda a, b: a.index_put((torch.tensor([0, 0]),), b[:2], accumulate=True),
    "scatter": lambda a, b: torch.scatter(a, 0, INDEX, b),
    "scatter number": lambda a, b: a.scatter(0, INDEX[:1], 2.0) + b,
    "scatter keyword number": lambda a, b: a.scatter(0, INDEX[:1], value=2.0) + b,
    "scatter_add": lambda a, b: a.scatter_add(0, INDEX, b),
    "masked_scatter": lambda a, b: a.masked_scatter(a > 0, b),
    "masked_fill": lambda a, b: a.masked_fill(torch.arange(4) > 1, b.sum()),
    "put": lambda a, b: a.put(torch.tensor([1, 5]), b[0, :2]),
    "put accumulate": lambda a, b: a.put(torch.tensor([1, 1]), b[0, :2], True),
    "select_scatter": lambda a, b: a.select_scatter(b[0], 0, 1),
    "slice_scatter": lambda a, b: a.slice_scatter(b[:, :2], 1, 0, 4, 2),
    "diagonal_scatter": lambda a, b: a.diagonal_scatter(b[0, :3]),
}


@pytest.mark.parametrize("carry", BOTH)
@pytest.mark.parametrize("name", WRITES)
def test_writing_into_a_copy(name: str, carry: tuple[bool, bool]) -> None:
    a, b = draw(4, 3, 4), draw(5, 3, 4)
    check(WRITES[name], (a, b), carry)
    check(WRITES[name], (draw(4, 4, 3).mT, draw(5, 6, 4)[::2]), carry)
    if "keyword number" not in name:
        no_fallback(WRITES[name], a, b)


@pytest.mark.filterwarnings("ignore:The reduce argument")
@pytest.mark.parametrize("carry", BOTH)
def test_scatter_that_adds(carry: tuple[bool, bool]) -> None:
    primals = (draw(4, 3, 4), draw(5, 3, 4))
    tangents = tuple(draw(6, 3, 4) if c else None for c in carry)
    _, tangent = jvp(lambda a, b: a.scatter(0, INDEX, b, reduce="add"), primals, tangents)
    _, expected = jvp(lambda a, b: a.scatter_add(0, INDEX, b), primals, tangents)
    assert torch.equal(tangent, expected)
    with pytest.raises(TangentError, match="scatter"):
        jvp(lambda a, b: a.scatter(0, INDEX, b, reduce="multiply"), primals, tangents)


@pytest.mark.parametrize("reduce", ["sum", "mean", "amax", "amin"])
def test_scatter_reduce(reduce: str) -> None:
    for carry in BOTH:
        check(lambda a, b: a.scatter_reduce(0, INDEX, b, reduce), (draw(4, 3, 4), draw(5, 3, 4)), carry)


def test_products_of_scattered_elements_are_refused() -> None:
    """PyTorch takes their forward derivative to be zero without a word."""
    a = draw(4, 3, 4)
    with pytest.raises(TangentError, match="scatter_reduce"):
        jvp(lambda a: a.scatter_reduce(0, INDEX, a, "prod"), (a,), (a,))
