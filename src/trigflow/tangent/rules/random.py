"""Dropout: the mask is drawn once, and both primal and tangent are multiplied by it."""

from typing import Any

import torch

from trigflow.tangent.dispatch import replayed_draws, traced
from trigflow.tangent.dual import Dual, Handler, dispatch_modes, no_grad, pair
from trigflow.tangent.table import register


def dropout(func: Any, input: Any, p: float = 0.5, training: bool = True, **other: Any) -> Any:
    """`x m / (1 - p)` with a mask m of the draws that PyTorch itself would make, in the same order.

    On the CPU, and where it is traced, that is a multiplication by the scaled mask; accelerators have a fused kernel, which
    hands its mask over.
    """
    training = other.get("train", training)  # as torch.dropout calls it
    x = input.primal if type(input) is Dual else input
    if not training or p == 0 or p == 1 or x.numel() == 0:
        primal = func(input.primal, p, training)
        return primal if training and p == 1 else pair(primal, input.tangent)
    if not 0 < p < 1:
        return func(x, p, training)
    graph = traced()
    if graph is None and dispatch_modes():
        # Something watches the kernels that run, as selective activation checkpointing does: run those of PyTorch.
        return redrawn(affine=False)(func, input, p, training)
    if x.device.type == "cpu" or graph is not None:
        with no_grad():
            mask = torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
        primal = x * mask
        with no_grad():
            return pair(primal, input.tangent * mask)
    primal, kept = torch.native_dropout(x, p, True)
    with no_grad():
        return pair(primal, (input.tangent * kept).mul_(1 / (1 - p)))


def redrawn(affine: bool) -> Handler:
    """Handler of dropouts whose masks are best left to PyTorch: run once more on the tangent, with the same draws.

    Dropout of whole channels is linear in x once its mask is drawn. Alpha dropout puts a constant in place of what it
    drops, is affine, and the constant is taken off again by a third run, on zeros.
    """

    def handler(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        x, dx = input.primal, input.tangent
        with replayed_draws(x.device, []) as draws:
            primal = func(x, *args, **kwargs)
            with no_grad():
                if dx.stride() != x.stride():
                    dx = torch.empty_like(x).copy_(dx)
                draws.rewind()
                tangent = func(dx, *args, **kwargs)
                if affine:
                    draws.rewind()
                    tangent = tangent - func(torch.zeros_like(x), *args, **kwargs)
        return pair(primal, tangent)

    return handler


register(dropout, "dropout")
register(redrawn(affine=False), "dropout1d", "dropout2d", "dropout3d", "feature_dropout")
register(redrawn(affine=True), "alpha_dropout", "feature_alpha_dropout")
