"""Dropout: the mask is drawn once, and both primal and tangent are multiplied by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trigflow.tangent.dual import Dual, no_grad, pair, strip
from trigflow.tangent.table import register


def dropout(func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """`x m / (1 - p)` with a mask m of the draws that PyTorch itself would make, in the same order.

    On the CPU that is a multiplication by the scaled mask; accelerators have a fused kernel, which hands its mask over.
    """
    x = input.primal if type(input) is Dual else input
    if not training or p == 0 or p == 1 or x.numel() == 0:
        return _by_itself(func, input, p, training)
    if not 0 < p < 1:
        return func(x, p, training)
    if x.device.type == "cpu":
        with no_grad():
            mask = torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
        primal = x * mask
        with no_grad():
            return pair(primal, input.tangent * mask)
    primal, kept = torch.native_dropout(x, p, True)
    with no_grad():
        return pair(primal, (input.tangent * kept).mul_(1 / (1 - p)))


def _by_itself(func: Any, input: Any, p: float, training: bool) -> Any:
    """Dropout that drops nothing or everything."""
    primal = func(input.primal, p, training)
    if training and p == 1:
        return primal
    return pair(primal, input.tangent)


def feature_dropout(func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Dropout of whole channels: one draw for each sample and channel.

    The functions of torch.nn.functional differ in how they read unbatched inputs; those go to the fallback.
    """
    from trigflow.tangent.dispatch import fallback

    x: Tensor = strip(input)
    if x.ndim < 3 or not training or not 0 < p < 1 or x.numel() == 0 or func.__name__ == "dropout1d":
        return fallback(func, input, p, training) if training else pair(func(x, p, training), input.tangent)
    if x.ndim == 3 and func.__name__ != "feature_dropout":
        return fallback(func, input, p, training)
    with no_grad():
        mask = x.new_empty((*x.shape[:2], *[1] * (x.ndim - 2))).bernoulli_(1 - p).div_(1 - p)
    primal = x * mask
    with no_grad():
        return pair(primal, input.tangent * mask)


register(dropout, "dropout")
register(feature_dropout, "dropout1d", "dropout2d", "dropout3d", "feature_dropout")
