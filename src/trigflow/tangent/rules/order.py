"""Extremes, sorting, pooling by maximum: outputs that are picked elements of the input.

The tangent is picked at the same places. Where several elements reach an extreme over all elements or axes, they share the
derivative evenly, as in PyTorch.
"""

from typing import Any

import torch
from torch import Tensor

from trigflow.tangent.dual import Dual, Handler, no_grad, pair, strip
from trigflow.tangent.inplace import name_of
from trigflow.tangent.rules.arithmetic import _extreme, binary
from trigflow.tangent.rules.elementwise import unary
from trigflow.tangent.rules.reduce import _dims, _keep
from trigflow.tangent.table import register


def _shared(x: Tensor, y: Tensor, dx: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """Extreme over axes: the elements that reach it share the derivative evenly."""
    dims = _dims(dim) or None
    hits = x == (y if keepdim else _keep(y, x, dims))
    return torch.where(hits, dx, 0.0).sum(dims, keepdim=keepdim) / hits.sum(dims, keepdim=keepdim)


def picked(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """`(values, indices)` along one axis, as from max(dim), sort, topk: the tangent is picked by the same indices."""
    if type(input) is not Dual:
        return func(input, *strip(args), **strip(kwargs))
    primal = func(input.primal, *args, **kwargs)
    dim = kwargs.get("dim")
    if dim is None:
        ints = [a for a in args if not isinstance(a, bool)]
        after = name_of(func) in ("topk", "kthvalue")
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


# Pooling by maximum -------------------------------------------------------------------------------------------------


def _at(tangent: Tensor, indices: Tensor, axes: int) -> Tensor:
    """The tangent at indices into the last `axes` axes, taken as one."""
    return tangent.flatten(-axes).gather(-1, indices.flatten(-axes)).view(indices.shape)


def max_pool(with_indices: Any, axes: int) -> Handler:
    """Handler of max pooling over the last `axes` axes: the tangent at the position of each maximum."""

    def handler(func: Any, input: Any, *args: Any, return_indices: bool = False, **kwargs: Any) -> Any:
        return_indices = return_indices or func.__name__.endswith("_with_indices")
        primal, indices = with_indices(strip(input), *args, return_indices=True, **strip(kwargs))
        out = primal
        if type(input) is Dual:
            with no_grad():
                out = pair(primal, _at(input.tangent, indices, axes))
        return (out, indices) if return_indices else out

    return handler


def indexed_pool(axes: int) -> Handler:
    """Handler of the kernels behind them, which return `(values, indices)`; also of fractional pooling."""

    def handler(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        primal, indices = func(strip(input), *strip(args), **kwargs)
        if type(input) is not Dual:
            return primal, indices
        with no_grad():
            return pair(primal, _at(input.tangent, indices, axes)), indices

    return handler


for _n in (1, 2, 3):
    for _kind in ("max_pool", "adaptive_max_pool", "fractional_max_pool"):
        _pool = getattr(torch.nn.functional, f"{_kind}{_n}d", None)
        register(max_pool(_pool, _n), f"nn.functional.{_kind}{_n}d")
        register(max_pool(_pool, _n), f"nn.functional.{_kind}{_n}d_with_indices")
    for _kind in ("max_pool{}d_with_indices", "adaptive_max_pool{}d", "fractional_max_pool{}d"):
        register(indexed_pool(_n), f"_C._nn.{_kind.format(_n)}", f"_VF.{_kind.format(_n)}")
