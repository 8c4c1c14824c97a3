"""Reductions, softmax, norms, extremes, sorting, pooling by maximum, embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trigflow.tangent.dispatch import fallback, unsupported
from trigflow.tangent.dual import Dual, Handler, no_grad, pair, strip
from trigflow.tangent.rules.arithmetic import _extreme, binary
from trigflow.tangent.rules.elementwise import unary
from trigflow.tangent.rules.plain import plain
from trigflow.tangent.rules.shape import linear
from trigflow.tangent.table import register

aten = torch.ops.aten


# Softmax -----------------------------------------------------------------------------------------------------------


def _softmax(x: Tensor, y: Tensor, dx: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """`y (dx - sum(y dx))`: symmetric in its matrix, so the backward kernel is the tangent kernel."""
    return aten._softmax_backward_data.default(dx, y, _softmax_dim(dim, x), y.dtype)  # type: ignore[no-any-return]


def _log_softmax(x: Tensor, y: Tensor, dx: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """`dx - sum(exp(y) dx)`."""
    return dx - torch.exp(y).mul_(dx).sum(_softmax_dim(dim, x), keepdim=True)


def _softmax_dim(dim: int | None, x: Tensor) -> int:
    """The axis, with the old default of torch.nn.functional.softmax where none is given."""
    return (0 if x.ndim in (0, 1, 3) else 1) if dim is None else dim


def _softmin(x: Tensor, y: Tensor, dx: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    return _softmax(x, y, -dx, dim)


def _logsumexp(x: Tensor, y: Tensor, dx: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    """`sum(softmax(x) dx)`."""
    dims = tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)
    peak = y if keepdim else _keep(y, x, dims)
    peak = peak.masked_fill(peak.isinf(), 0.0)
    return torch.exp(x - peak).mul_(dx).sum(dims, keepdim=keepdim)


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
register(unary(_softmin), "softmin")
register(unary(_logsumexp), "logsumexp", "special.logsumexp")


# Norms, variances --------------------------------------------------------------------------------------------------


def vector_norm(func: Any, x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """The Euclidean norm: `sum(x dx) / |x|`, zero at zero. Other norms go to the fallback."""
    if type(x) is not Dual or ord != 2 or x.primal.is_complex():
        return fallback(func, x, ord, dim, keepdim, dtype=dtype)
    primal = func(x.primal, ord, dim, keepdim, dtype=dtype)
    with no_grad():
        t = _sum(x.primal.to(primal.dtype) * x.tangent, _dims(dim), keepdim)
        return pair(primal, (t / primal).masked_fill_(primal == 0, 0.0))


def _sum(x: Tensor, dims: tuple[int, ...] | None, keepdim: bool) -> Tensor:
    return x.sum(dims if dims is not None else tuple(range(x.ndim)), keepdim=keepdim)


def spread(root: bool, with_mean: bool) -> Handler:
    """Handler of var, std (`root`), var_mean, std_mean: `dvar = 2 sum((x - mean) dx) / (n - correction)`."""

    def handler(
        func: Any, input: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
    ) -> Any:
        if input.primal.is_complex():
            return fallback(func, input, dim, correction=correction, keepdim=keepdim)
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        if correction is None:
            correction = 1 if unbiased in (None, True) else 0
        x, dx = input.primal, input.tangent
        dims = _dims(dim) or tuple(range(x.ndim))
        primal = func(x, dims, correction=correction, keepdim=keepdim)
        with no_grad():
            value = primal[0] if with_mean else primal
            count = 1
            for d in dims:
                count *= x.shape[d]
            mean = x.mean(dims, keepdim=True)
            freedom = count - correction
            t = (x - mean).mul_(dx).sum(dims, keepdim=keepdim).mul_(2 / freedom if freedom > 0 else math.inf)
            if root:
                t = (t / (2 * value)).masked_fill_(value == 0, 0.0)
            return pair(primal, (t, dx.mean(dims, keepdim=keepdim)) if with_mean else t)

    return handler


register(vector_norm, "linalg.vector_norm")
register(spread(root=False, with_mean=False), "var")
register(spread(root=True, with_mean=False), "std")
register(spread(root=False, with_mean=True), "var_mean")
register(spread(root=True, with_mean=True), "std_mean")


# Extremes and order -------------------------------------------------------------------------------------------------


def _shared(x: Tensor, y: Tensor, dx: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """Extreme over axes: the elements that reach it share the derivative evenly."""
    dims = _dims(dim) or None
    hits = x == (y if keepdim else _keep(y, x, dims))
    total = _sum(torch.where(hits, dx, 0.0), dims, keepdim)
    return total / _sum(hits, dims, keepdim)


def picked(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """`(values, indices)` along one axis, as from max(dim), sort, topk: the tangent is picked by the same indices."""
    if type(input) is not Dual:
        return func(input, *strip(args), **strip(kwargs))
    primal = func(input.primal, *args, **kwargs)
    dim = kwargs.get("dim")
    if dim is None:
        ints = [a for a in args if isinstance(a, int) and not isinstance(a, bool)]
        after = func.__name__ in ("topk", "kthvalue")
        dim = ints[1] if after and len(ints) > 1 else -1 if after or not ints else ints[0]
    with no_grad():
        values, indices = primal
        if indices.ndim < input.ndim:
            t = input.tangent.gather(dim, indices.unsqueeze(dim)).squeeze(dim)
        else:
            t = input.tangent.gather(dim, indices) if input.ndim else input.tangent
        return type(primal)((pair(values, t), indices))


def extreme(sign: float) -> Handler:
    """Handler of max (1) and min (-1) in their three forms: over all, along an axis, of two tensors."""
    over_all, of_two = unary(_shared), binary(_extreme(sign))

    def handler(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:
            return over_all(func, input)
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, (Tensor, Dual)):
            return of_two(func, input, other)
        return picked(func, input, *args, **kwargs)

    return handler


def middle(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """median and nanmedian: along an axis by index, over all by the elements that reach it."""
    if args or kwargs:
        return picked(func, input, *args, **kwargs)
    return unary(_shared)(func, input)


register(unary(_shared), "amax", "amin")
register(extreme(1), "max")
register(extreme(-1), "min")
register(middle, "median", "nanmedian")
register(picked, "sort", "topk", "kthvalue", "mode", "cummax", "cummin")


# Pooling by maximum, embeddings -------------------------------------------------------------------------------------


def max_pool(with_indices: Any, axes: int) -> Handler:
    """Handler of max pooling over the last `axes` axes: the tangent at the position of each maximum."""

    def handler(func: Any, input: Any, *args: Any, return_indices: bool = False, **kwargs: Any) -> Any:
        return_indices = return_indices or func.__name__.endswith("_with_indices")
        primal, indices = with_indices(input.primal, *args, return_indices=True, **kwargs)
        with no_grad():
            t = input.tangent.flatten(-axes).gather(-1, indices.flatten(-axes)).view(indices.shape)
            out = pair(primal, t)
        return (out, indices) if return_indices else out

    return handler


def embedding(func: Any, input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Rows of a table; the indices are integers, so only the table can carry a tangent."""
    if kwargs.get("max_norm") is not None:
        raise unsupported(func, "max_norm rewrites the table in place")
    if type(weight) is not Dual:
        return func(strip(input), weight, *args, **kwargs)
    primal = func(input, weight.primal, *args, **kwargs)
    with no_grad():
        return pair(primal, func(input, weight.tangent, *args, **kwargs))


for _n in (1, 2, 3):
    for _kind in ("max_pool", "adaptive_max_pool"):
        _pool = getattr(torch.nn.functional, f"{_kind}{_n}d")
        register(max_pool(_pool, _n), f"nn.functional.{_kind}{_n}d")
        register(max_pool(_pool, _n), f"nn.functional.{_kind}{_n}d_with_indices")
register(linear, "embedding")
register(embedding, "nn.functional.embedding")
register(plain, "argmax", "argmin", "argsort")
