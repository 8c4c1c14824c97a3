"""Softmax and its relatives, variances."""

import math
from typing import Any

import torch
from torch import Tensor

from trigflow.tangent.dispatch import fallback
from trigflow.tangent.dual import Handler, no_grad, pair
from trigflow.tangent.rules.elementwise import unary
from trigflow.tangent.table import register

aten = torch.ops.aten


# Softmax -----------------------------------------------------------------------------------------------------------


def _softmax(x: Tensor, y: Tensor, dx: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """`y (dx - sum(y dx))`: symmetric in its matrix, so the backward kernel is the tangent kernel."""
    return aten._softmax_backward_data.default(dx, y, _softmax_dim(dim, x), y.dtype)


def _log_softmax(x: Tensor, y: Tensor, dx: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """`dx - sum(exp(y) dx)`."""
    return dx - torch.exp(y).mul_(dx).sum(_softmax_dim(dim, x), keepdim=True)


def _softmax_dim(dim: int | None, x: Tensor) -> int:
    """The axis, with the old default of torch.nn.functional.softmax where none is given."""
    return (0 if x.ndim in (0, 1, 3) else 1) if dim is None else dim


def _logsumexp(x: Tensor, y: Tensor, dx: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    """`sum(softmax(x) dx)`."""
    peak = y if keepdim else _keep(y, x, _dims(dim))
    peak = peak.masked_fill(peak.isinf(), 0.0)
    return torch.exp(x - peak).mul_(dx).sum(dim, keepdim=keepdim)


def _keep(y: Tensor, x: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """A reduced tensor with its reduced axes back, of length one."""
    if x.ndim == 0:
        return y
    kept = set(range(x.ndim)) if not dims else {d % x.ndim for d in dims}
    return y.reshape([1 if i in kept else n for i, n in enumerate(x.shape)])


def _dims(dim: Any) -> tuple[int, ...] | None:
    return None if dim is None else tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)


register(unary(_softmax), "softmax", "special.softmax", "_safe_softmax")
register(unary(_log_softmax), "log_softmax", "special.log_softmax")
register(unary(lambda x, y, dx, dim=None, *args, **kwargs: _softmax(x, y, -dx, dim)), "softmin")
register(unary(_logsumexp), "logsumexp", "special.logsumexp")


# Variances ---------------------------------------------------------------------------------------------------------


def spread(name: str) -> Handler:
    """Handler of var, std, var_mean, std_mean: `dvar = 2 sum((x - mean) dx) / (n - correction)`."""
    function, root, with_mean = getattr(torch, name), name.startswith("std"), name.endswith("mean")

    def handler(
        func: Any, input: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
    ) -> Any:
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        if correction is None:
            correction = 1 if unbiased in (None, True) else 0
        if input.primal.is_complex():
            return fallback(function, input, dim, correction=correction, keepdim=keepdim)
        x, dx = input.primal, input.tangent
        dims = _dims(dim) or tuple(range(x.ndim))
        primal = function(x, dims, correction=correction, keepdim=keepdim)
        with no_grad():
            value = primal[0] if with_mean else primal
            mean = x.mean(dims, keepdim=True)
            freedom = math.prod(x.shape[d] for d in dims) - correction
            t = (x - mean).mul_(dx).sum(dims, keepdim=keepdim).mul_(2 / freedom if freedom > 0 else math.inf)
            if root:
                t = (t / (2 * value)).masked_fill_(value == 0, 0.0)
            return pair(primal, (t, dx.mean(dims, keepdim=keepdim)) if with_mean else t)

    return handler


for _name in ("var", "std", "var_mean", "std_mean"):
    register(spread(_name), _name)
