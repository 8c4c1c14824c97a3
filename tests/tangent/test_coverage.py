"""The report on which functions have rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tangent.helpers import draw
from trigflow.tangent import TangentError, coverage

X = draw(1, 3, 4)
WEIGHT = nn.Parameter(torch.zeros(3))


def test_kinds_and_counts() -> None:
    def fn(x: Any, rows: Any, name: str) -> Any:
        assert name == "name"
        y = F.silu(x) + F.silu(x * 2)
        y = y + x.prod(1, keepdim=True) + x.detach()
        return y[rows]

    report = coverage(fn, X, torch.tensor([0, 1]), "name")
    assert report.rules["torch.nn.functional.silu"] == 2
    assert report.fallbacks == {"torch.Tensor.prod": 1}
    assert report.constants == {"torch.Tensor.detach": 1}
    assert report.complete
    assert "fallbacks: 1 functions, 1 calls" in str(report)


def test_the_report_goes_on_past_what_cannot_be_done() -> None:
    def fn(x: Any) -> Any:
        y = WEIGHT.copy_(x.sum(1))
        return nn.ReLU(inplace=True)(y * 2 + x.sum()) + torch.exp(x.sum())

    report = coverage(fn, X)
    assert not report.complete
    assert set(report.unsupported) == {"torch.Tensor.copy_"}
    assert "made outside" in report.messages["torch.Tensor.copy_"]
    assert report.rules["torch.nn.functional.relu"] == 1
    assert report.rules["torch.exp"] == 1
    assert "copy_" in str(report)


def test_values_read_outside_torch_end_the_report() -> None:
    report = coverage(lambda x: x * float(x.sum()), X)
    assert not report.complete
    assert any("float()" in message for message in report.messages.values())


def test_nothing_is_left_behind() -> None:
    w = draw(2, 4, 4).requires_grad_()
    coverage(lambda x: x @ w, X)
    assert w.grad is None
    assert torch.is_grad_enabled()
    assert (X @ w).requires_grad


class Timed(nn.Module):
    """A network whose time is embedded in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.table, self.drop = way, nn.Embedding(10, 4).double(), nn.Dropout(0.5)

    def forward(self, x: Any, t: Any) -> Any:
        if self.way == "table":
            return self.drop(x) * self.table(t.round().long())[:, None]
        return self.drop(x) * {"unused": 1.0, "smooth": torch.sin(t)[:, None, None]}[self.way]


def test_does_the_output_move_with_the_time() -> None:
    t = torch.tensor([3.4, 4.4, 0.9], dtype=torch.float64)
    report = coverage(Timed("smooth"), X, t, time=1)
    assert report.moves is not None
    assert report.follows is not None
    assert 0.5 < report.moves / report.follows < 2
    assert "misses" not in str(report)
    table = coverage(Timed("table"), X, t, time=1)
    assert table.moves != 0  # some round up
    assert table.follows == 0
    assert table.complete
    assert "the tangent misses the time: it is rounded" in str(table)
    unused = coverage(Timed("unused"), X, t, time=1)
    assert (unused.moves, unused.follows) == (0, 0)
    steps = coverage(Timed("table"), X, torch.tensor([3, 4, 1]), time=1)
    assert "misses the time" in str(steps)
    assert coverage(Timed("smooth"), X, t).moves is None
    for time in (-1, 2):
        with pytest.raises(TangentError, match=f"time {time} of 2 inputs"):
            coverage(Timed("smooth"), X, t, time=time)
