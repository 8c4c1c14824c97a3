"""Recordings of calls, and the sizes that they are made for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trigflow.deploy.fixed import PADDING, SIZES, cut
from trigflow.deploy.traced import operations
from trigflow.runtime.errors import UserError

X, T = torch.linspace(-1, 1, 12).reshape(3, 4), torch.tensor([0.1, 0.2, 0.3])
LABEL = torch.tensor([2, 0, 1])


def in_place(x: Tensor, t: Tensor) -> Tensor:
    y = x * 2
    y.add_(t[:, None]).mul_(x)
    return y + y.sum(dim=1, keepdim=True)


def several_results(x: Tensor, t: Tensor) -> Tensor:
    low, high = x.sort(dim=1)[0].split(2, dim=1)
    return torch.cat([high, low * t[:, None]], dim=1)


def constants(x: Tensor, t: Tensor) -> Tensor:
    return x @ torch.eye(4) + torch.arange(4) * torch.tensor(0.5)


def labels(x: Tensor, t: Tensor) -> Tensor:
    return x[:, :3] * F.one_hot(LABEL, 3)


@pytest.mark.parametrize("call", [in_place, several_results, constants, labels])
def test_a_recording_computes_what_was_called(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    recorded = operations(call, [X, T])
    for scale in (1.0, -0.7):
        assert torch.equal(recorded(scale * X, T + scale), call(scale * X, T + scale))


def item(x: Tensor, t: Tensor) -> Tensor:
    return x if t[0].item() > 0 else -x


def truth(x: Tensor, t: Tensor) -> Tensor:
    return x if (t > 0).all() else -x


def equality(x: Tensor, t: Tensor) -> Tensor:
    return x if torch.equal(x, x + t[:, None]) else -x


def guessed_classes(x: Tensor, t: Tensor) -> Tensor:
    return x[:, :3] * F.one_hot(LABEL)


@pytest.mark.parametrize("call", [item, truth, equality, guessed_classes])
def test_looking_at_a_value_is_refused(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(UserError, match="looks at a value") as caught:
        operations(call, [X, T])
    assert "\n" not in str(caught.value)
    assert torch.equal(call(X, T), call(X, T)), "and nothing is recorded any more"


@pytest.mark.parametrize("most", range(len(SIZES)))
def test_batches_are_cut_into_recorded_sizes(most: int) -> None:
    """Every one: random ones seldom find the few rows that take the most parts."""
    sizes = SIZES[: most + 1]
    for rows in range(1, 601):
        parts = cut(rows, sizes)
        assert set(parts) <= set(sizes), rows
        assert rows <= sum(parts) <= rows + PADDING, rows
        assert sum(parts) - parts[-1] < rows, f"{rows}: a part is empty"
        # The largest size again and again, each other one once that is not sooner padded to, and one that is padded.
        assert len(parts) <= rows // sizes[-1] + sum(size > PADDING for size in sizes[:-1]) + 1, rows


def test_sizes_by_example() -> None:
    found = {rows: cut(rows, SIZES) for rows in (1, 3, 5, 17, 33, 40, 56, 60, 64, 300)}
    assert found == {
        1: [1],
        3: [4],
        5: [8],
        17: [16, 1],
        33: [32, 1],
        40: [32, 8],
        56: [64],
        60: [64],
        64: [64],
        300: [256, 32, 16],
    }
