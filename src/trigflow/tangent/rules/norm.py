"""Normalization layers.

For one group of elements, `xhat = (x - mu) r` with `r = 1 / sqrt(var + eps)`::

    dxhat = r (dx - mean(dx) - xhat mean(dx xhat))

a symmetric matrix times dx: the backward kernels of PyTorch, given no weight, compute it in one fused pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trigflow.tangent.dual import Dual, no_grad, pair, strip
from trigflow.tangent.table import register

aten = torch.ops.aten


def group_norm(func: Any, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """Mean and variance over each group of channels and all positions."""
    x, w, b = strip(input), strip(weight), strip(bias)
    n, c = x.shape[:2]
    positions = x[0, 0].numel() if n else 0
    y = func(x, num_groups, w, b, eps)
    with no_grad():
        x = _packed(x.to(y.dtype))
        _, mean, rstd = aten.native_group_norm.default(x, None, None, n, c, positions, num_groups, eps)
        t = None
        if type(input) is Dual:
            dx = input.tangent.to(y.dtype).contiguous(memory_format=_format(x))
            t = aten.native_group_norm_backward.default(
                dx, x, mean, rstd, None, n, c, positions, num_groups, [True, False, False]
            )[0]
            if w is not None:
                t = t.mul_(w.view(-1, *[1] * (x.ndim - 2)))
        if type(weight) is Dual or type(bias) is Dual:
            xhat = func(x, num_groups, None, None, eps)
            t = _scale_and_shift_tangent(t, xhat, weight, bias, (-1, *[1] * (x.ndim - 2)))
        return pair(y, t)


def _format(x: Tensor) -> torch.memory_format:
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous():
        return torch.channels_last_3d
    return torch.contiguous_format


def _packed(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_format(x))


def _scale_and_shift_tangent(t: Tensor | None, xhat: Tensor, weight: Any, bias: Any, shape: Any) -> Tensor | None:
    """Add `xhat dw + db` to the tangent."""
    if type(weight) is Dual:
        term = xhat * weight.tangent.view(shape)
        t = term if t is None else t + term
    if type(bias) is Dual:
        db = bias.tangent.view(shape)
        t = db if t is None else t + db
    return t


register(group_norm, "nn.functional.group_norm")
