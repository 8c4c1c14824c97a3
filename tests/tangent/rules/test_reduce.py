"""Softmax, variances, norms, extremes, sorting; functions that fall back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tangent.helpers import check, draw, no_fallback

X = (3, 4, 5)


REDUCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda x: F.softmax(x, -1),
    "torch.softmax": lambda x: torch.softmax(x, 1),
    "method softmax": lambda x: x.softmax(dim=0),
    "log_softmax": lambda x: F.log_softmax(x, dim=1),
    "softmin": lambda x: F.softmin(x, dim=1),
    "logsumexp": lambda x: torch.logsumexp(x, (0, 2)),
    "logsumexp keep": lambda x: x.logsumexp(1, keepdim=True),
    "vector_norm": torch.linalg.vector_norm,
    "vector_norm axes": lambda x: torch.linalg.vector_norm(x, dim=(0, 2), keepdim=True),
    "norm": lambda x: torch.norm(x),
    "method norm": lambda x: x.norm(dim=1, keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=1),
    "var": torch.var,
    "var axis": lambda x: x.var(1),
    "var axes": lambda x: torch.var(x, dim=(0, 2), unbiased=False, keepdim=True),
    "var correction": lambda x: torch.var(x, 1, correction=0),
    "var flag": lambda x: x.var(False),
    "std": lambda x: x.std(dim=-1),
    "var_mean": lambda x: torch.var_mean(x, dim=(1, 2), correction=0),
    "std_mean": lambda x: torch.std_mean(x),
    "amax": lambda x: x.amax((0, 1)),
    "amin": lambda x: torch.amin(x, 1, keepdim=True),
    "max": lambda x: x.max(),
    "min": lambda x: torch.min(x),
    "max axis": lambda x: x.max(1),
    "min axis": lambda x: torch.min(x, dim=-1, keepdim=True),
    "sort": lambda x: torch.sort(x, 1, descending=True),
    "topk": lambda x: x.topk(2, dim=1),
    "median": lambda x: x.median(dim=1),
    "median of all": torch.median,
    "kthvalue": lambda x: x.kthvalue(2, 1),
    "cummax": lambda x: torch.cummax(x, 1),
}
FALLBACKS: dict[str, Callable[[Tensor], Any]] = {
    "prod": lambda x: x.prod(1),
    "cumprod": lambda x: x.cumprod(1),
    "1-norm": lambda x: torch.linalg.vector_norm(x, 1),
    "linalg.norm": lambda x: torch.linalg.norm(x, dim=1),
    "prelu": lambda x: F.prelu(x, torch.full((4,), 0.2, dtype=x.dtype)),
    "det": lambda x: torch.linalg.det(x[:, :4, :4] + 3 * torch.eye(4, dtype=x.dtype)),
    "fft": lambda x: torch.fft.rfft(x).abs(),
    "sinc": torch.sinc,
    "cosine_similarity": lambda x: F.cosine_similarity(x[0], x[1]),
    "diff": lambda x: torch.diff(x, dim=1),
    "mse_loss": lambda x: F.mse_loss(x, x.flip(0)),
    "lp_pool1d": lambda x: F.lp_pool1d(x, 2, 2),
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "aten silu": lambda x: torch.ops.aten.silu(x),
    "aten overload": lambda x: torch.ops.aten.mul.Tensor(x, x),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str) -> None:
    x = draw(6, *X)
    check(REDUCTIONS[name], (x,))
    check(REDUCTIONS[name], (x.transpose(0, 2).contiguous().transpose(0, 2),))
    no_fallback(REDUCTIONS[name], x)


@pytest.mark.parametrize("name", FALLBACKS)
def test_functions_without_a_rule(name: str) -> None:
    check(FALLBACKS[name], (draw(7, *X),))


def test_norms_at_zero_have_tangent_zero() -> None:
    x = torch.zeros(3, dtype=torch.float64)
    check(lambda x: torch.linalg.vector_norm(x), (x,))
