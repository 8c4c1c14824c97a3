"""Reading tables and images at given places: embeddings, bags of embeddings, enlarging, sampling on a grid."""

from typing import Any

import torch
from torch import Tensor

from trigflow.tangent.dispatch import Decomposed, _body, unsupported
from trigflow.tangent.dual import Dual, no_grad, pair, strip
from trigflow.tangent.rules.shape import linear
from trigflow.tangent.table import register

aten = torch.ops.aten


def embedding(func: Any, input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Rows of a table; the indices are integers, so only the table can carry a tangent."""
    if kwargs.get("max_norm") is not None:
        raise unsupported(func, "max_norm rewrites the table in place")
    if type(weight) is not Dual:
        return func(strip(input), weight, *args, **kwargs)
    primal = func(input, weight.primal, *args, **kwargs)
    with no_grad():
        return pair(primal, func(input, weight.tangent, *args, **kwargs))


def embedding_bag(
    func: Any,
    weight: Any,
    indices: Any,
    offsets: Any,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Any = None,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """Sums (mode 0), means (1) or maxima (2) of rows of a table, sums possibly weighted.

    Sums and means are linear in the table and in the weights; a maximum moves with the row that it was taken from, which
    the kernel hands over.
    """
    table, factors = strip(weight), strip(per_sample_weights)
    settings = (indices, offsets, scale_grad_by_freq, mode, sparse)
    primal = func(table, *settings, factors, *rest, **kwargs)
    with no_grad():
        t = None
        if type(weight) is Dual and mode == 2:
            rows = primal[3].clamp_min(0)
            empty = (primal[2] == 0).unsqueeze(-1)
            t = weight.tangent.gather(0, rows).masked_fill_(empty, 0.0)
        elif type(weight) is Dual:
            t = func(weight.tangent, *settings, factors, *rest, **kwargs)[0]
        if type(per_sample_weights) is Dual:
            term = func(table, *settings, per_sample_weights.tangent, *rest, **kwargs)[0]
            t = term if t is None else t.add_(term)
        return (pair(primal[0], t), *primal[1:])


_bag = Decomposed(_body(torch.nn.functional.embedding_bag))


def bagged(func: Any, *args: Any, max_norm: float | None = None, **kwargs: Any) -> Any:
    """`torch.nn.functional.embedding_bag`, which ends in the function above."""
    if max_norm is not None:
        raise unsupported(func, "max_norm rewrites the table in place")
    return _bag(func, *args, **kwargs)


def interpolate(
    func: Any, input: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *rest: Any, **kwargs: Any
) -> Any:
    """Linear in the image. Pixels doubled, as between the levels of a U-Net, are copies, for which the CPU's kernel is slow."""
    doubles = mode == "nearest" and not isinstance(scale_factor, (tuple, list)) and scale_factor == 2
    if not doubles or type(input) is not Dual or input.primal.ndim != 4 or input.primal.device.type != "cpu":
        return linear(func, input, size, scale_factor, mode, *rest, **kwargs)
    primal = func(input.primal, size, scale_factor, mode, *rest, **kwargs)
    with no_grad():
        return pair(primal, doubled(input.tangent) if primal.is_contiguous() else func(input.tangent, None, 2.0))


def doubled(x: Tensor) -> Tensor:
    """Each pixel of `(b, c, h, w)` as a cell of 2x2, `(b, c, 2 h, 2 w)`: the upper row of cells, then the lower one."""
    b, c, h, w = x.shape
    cells = x.new_empty(b, c, h, 2, w, 2)
    upper = cells[:, :, :, 0]
    upper[..., 0] = x
    upper[..., 1] = x
    cells[:, :, :, 1] = upper
    return cells.view(b, c, 2 * h, 2 * w)


def grid_sampler(func: Any, input: Any, grid: Any, interpolation_mode: int, padding_mode: int, align_corners: bool) -> Any:
    """Linear in the image `(n, c, ..., h, w)`. Along the grid `(n, ..., h', w', 2 or 3)` each output pixel has its own slope.

    The backward kernel adds the slopes over channels, so each channel goes into it as an image of its own.
    """
    x, g = strip(input), strip(grid)
    settings = (interpolation_mode, padding_mode, align_corners)
    primal = func(x, g, *settings)
    with no_grad():
        t = func(input.tangent.to(x.dtype), g, *settings) if type(input) is Dual else None
        if type(grid) is Dual:
            n, c = x.shape[:2]
            backward = aten.grid_sampler_2d_backward if x.ndim == 4 else aten.grid_sampler_3d_backward
            pages = g.unsqueeze(1).expand(n, c, *g.shape[1:]).reshape(n * c, *g.shape[1:])
            slope = backward.default(
                torch.ones_like(primal).reshape(n * c, 1, *primal.shape[2:]),
                x.reshape(n * c, 1, *x.shape[2:]),
                pages,
                *settings,
                [False, True],
            )[1]
            term = (slope.view(n, c, *g.shape[1:]) * grid.tangent.unsqueeze(1)).sum(-1)
            t = term if t is None else t.add_(term)
        return pair(primal, t)


register(linear, "embedding")
register(embedding, "nn.functional.embedding")
register(embedding_bag, "_VF.embedding_bag", "_embedding_bag")
register(bagged, "nn.functional.embedding_bag")
register(interpolate, "nn.functional.interpolate")
register(grid_sampler, "grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
register(linear, *"affine_grid affine_grid_generator".split())
