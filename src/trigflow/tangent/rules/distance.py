"""Norms and distances.

For `y = |x|_p` over some axes, with `a = |x|` and `da = sign(x) dx` element by element::

    dy = sum((a / y)^(p - 1) da)

zero where y is zero. For p = inf the largest elements share the derivative evenly, as in PyTorch.
"""

import math
from typing import Any

import torch
from torch import Tensor

from trigflow.tangent.dispatch import fallback
from trigflow.tangent.dual import Dual, has_dual, no_grad, pair, strip
from trigflow.tangent.rules.elementwise import TABLE
from trigflow.tangent.rules.reduce import _dims, _keep
from trigflow.tangent.table import register


def _norm_tangent(x: Tensor, y: Tensor, dx: Tensor, p: float, dims: tuple[int, ...]) -> Tensor:
    """Tangent of the p-norm `y` of x over `dims`, which y keeps with length one, and so does the result."""
    if p == 2 and not x.is_complex():
        return ((x * dx).sum(dims, keepdim=True) / y).masked_fill_(y == 0, 0.0)
    a = x.abs()
    da = TABLE["abs"](x, a, dx)
    if p == 0:
        return torch.zeros_like(y)
    if p == 1:
        return da.sum(dims, keepdim=True)
    if math.isinf(p):
        hits = a == y
        return torch.where(hits, da, 0.0).sum(dims, keepdim=True) / hits.sum(dims, keepdim=True)
    slope = (a / y).pow_(p - 1).masked_fill_(a == 0, 0.0)
    return (slope * da).sum(dims, keepdim=True)


def vector_norm(func: Any, x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """`torch.linalg.vector_norm`, of any order."""
    if type(x) is not Dual or has_dual(ord):
        return fallback(func, x, ord, dim, keepdim, dtype=dtype)
    primal = func(x.primal, ord, dim, keepdim, dtype=dtype)
    dims, work = _dims(dim) or tuple(range(x.ndim)), dtype or x.dtype
    with no_grad():
        kept = _keep(primal, x.primal, dims)
        t = _norm_tangent(x.primal.to(work), kept, x.tangent.to(work), float(ord), dims)
        return pair(primal, t.reshape(primal.shape))


def cdist(func: Any, x1: Any, x2: Any, p: float = 2.0, *args: Any, **kwargs: Any) -> Any:
    """Distances between the rows of two matrices, `(..., n, k)` and `(..., m, k)` to `(..., n, m)`."""
    a, b = strip(x1), strip(x2)
    primal = func(a, b, p, *args, **kwargs)
    with no_grad():
        change: Any = 0.0
        if type(x1) is Dual:
            change = x1.tangent.unsqueeze(-2)
        if type(x2) is Dual:
            change = change - x2.tangent.unsqueeze(-3)
        gap = a.unsqueeze(-2) - b.unsqueeze(-3)
        t = _norm_tangent(gap, primal.unsqueeze(-1), change, p, (-1,))
        return pair(primal, t.squeeze(-1))


def pdist(func: Any, input: Any, p: float = 2.0) -> Any:
    """Distances between all pairs of rows of one matrix, `(n, k)` to `(n (n - 1) / 2,)`."""
    x, dx = input.primal, input.tangent
    primal = func(x, p)
    with no_grad():
        i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
        return pair(primal, _norm_tangent(x[i] - x[j], primal.unsqueeze(-1), dx[i] - dx[j], p, (-1,)).squeeze(-1))


register(vector_norm, "linalg.vector_norm")
register(cdist, "cdist")
register(pdist, "pdist")
