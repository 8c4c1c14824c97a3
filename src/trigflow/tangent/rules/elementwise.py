"""Elementwise functions: the tangent is the derivative times the incoming tangent.

A derivative of an elementwise function is a diagonal matrix, so PyTorch's own backward kernels, which compute
`grad * f'(x)` in one pass over memory, are the tangent kernels as well.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trigflow.tangent.dispatch import fallback
from trigflow.tangent.dual import Dual, Handler, has_dual, no_grad, pair
from trigflow.tangent.table import register

aten = torch.ops.aten
_threshold = aten.threshold_backward.default
_silu = aten.silu_backward.default
_gelu = aten.gelu_backward.default
_sigmoid = aten.sigmoid_backward.default
_tanh = aten.tanh_backward.default
_leaky_relu = aten.leaky_relu_backward.default
_elu = aten.elu_backward.default
_softplus = aten.softplus_backward.default
_hardtanh = aten.hardtanh_backward.default
_log_sigmoid = aten.log_sigmoid_backward.default

Derivative = Callable[..., Tensor]


def unary(derivative: Derivative) -> Handler:
    """Handler of `y = f(x, settings)` from `derivative(x, y, dx, settings) -> dy`.

    Where f computes in another precision than that of x (autocast), the derivative does as well. Complex numbers,
    for which some of the formulas below do not hold, are left to the fallback unless it is in `HOLOMORPHIC`.
    """

    def handler(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        if type(input) is not Dual or (args and has_dual(args)) or (kwargs and has_dual(kwargs)):
            return fallback(func, input, *args, **kwargs)
        if input.primal.is_complex() and derivative not in HOLOMORPHIC:
            return fallback(func, input, *args, **kwargs)
        x, dx = input.primal, input.tangent
        y = func(x, *args, **kwargs)
        with no_grad():
            if y.dtype != x.dtype and not x.is_complex():
                x, dx = x.to(y.dtype), dx.to(y.dtype)
            return pair(y, derivative(x, y, dx, *args, **kwargs))

    return handler


def _log_sigmoid_tangent(x: Tensor, y: Tensor, dx: Tensor) -> Tensor:
    # The CPU kernel wants exp(-|x|), which its forward keeps; the CUDA kernel ignores the buffer.
    return _log_sigmoid(dx, x, torch.exp(-x.abs()) if x.device.type == "cpu" else x)


def _selu(x: Tensor, y: Tensor, dx: Tensor, inplace: bool = False) -> Tensor:
    return _elu(dx, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0, False, x)


def _silu_tangent(x: Tensor, y: Tensor, dx: Tensor, inplace: bool = False) -> Tensor:
    if x.is_complex():  # the kernel of PyTorch conjugates
        s = torch.sigmoid(x)
        return dx * s * (1 + x * (1 - s))
    return _silu(dx, x)


def _glu(x: Tensor, y: Tensor, dx: Tensor, dim: int = -1) -> Tensor:
    """Of `y = a s(b)`: `da s + y (1 - s) db`, with halves a and b of x."""
    s = torch.sigmoid(x.chunk(2, dim)[1])
    da, db = dx.chunk(2, dim)
    return torch.addcmul(da * s, (1 - s).mul_(y), db)


TABLE: dict[str, Derivative] = {
    # exponentials and logarithms
    "exp": lambda x, y, dx: dx * y,
    "exp2": lambda x, y, dx: (dx * y).mul_(math.log(2)),
    "expm1": lambda x, y, dx: torch.addcmul(dx, dx, y),
    "log": lambda x, y, dx: dx / x,
    "log2": lambda x, y, dx: (dx / x).mul_(1 / math.log(2)),
    "log10": lambda x, y, dx: (dx / x).mul_(1 / math.log(10)),
    "log1p": lambda x, y, dx: dx / (x + 1),
    # trigonometry
    "sin": lambda x, y, dx: torch.cos(x).mul_(dx),
    "cos": lambda x, y, dx: torch.sin(x).neg_().mul_(dx),
    "tan": lambda x, y, dx: torch.addcmul(dx, dx * y, y),
    "asin": lambda x, y, dx: dx * torch.rsqrt(1 - x * x),
    "acos": lambda x, y, dx: -dx * torch.rsqrt(1 - x * x),
    "atan": lambda x, y, dx: dx / (x * x).add_(1),
    "sinh": lambda x, y, dx: torch.cosh(x).mul_(dx),
    "cosh": lambda x, y, dx: torch.sinh(x).mul_(dx),
    "asinh": lambda x, y, dx: dx * torch.rsqrt((x * x).add_(1)),
    "acosh": lambda x, y, dx: dx * torch.rsqrt((x * x).sub_(1)),
    "atanh": lambda x, y, dx: dx / (1 - x * x),
    "deg2rad": lambda x, y, dx: dx * (math.pi / 180),
    "rad2deg": lambda x, y, dx: dx * (180 / math.pi),
    # powers
    "sqrt": lambda x, y, dx: dx / (2 * y),
    "rsqrt": lambda x, y, dx: (dx * y).mul_(y).mul_(y).mul_(-0.5),
    "square": lambda x, y, dx: (dx * x).mul_(2),
    "reciprocal": lambda x, y, dx: (dx * y).mul_(y).neg_(),
    "abs": lambda x, y, dx: (x.sgn().conj() * dx).real if x.is_complex() else torch.sgn(x).mul_(dx),
    # error functions
    "erf": lambda x, y, dx: (-x * x).exp_().mul_(dx).mul_(2 / math.sqrt(math.pi)),
    "erfc": lambda x, y, dx: (-x * x).exp_().mul_(dx).mul_(-2 / math.sqrt(math.pi)),
    "erfinv": lambda x, y, dx: (y * y).exp_().mul_(dx).mul_(math.sqrt(math.pi) / 2),
    "lgamma": lambda x, y, dx: dx * torch.digamma(x),
    # activations
    "sigmoid": lambda x, y, dx: _sigmoid(dx, y),
    "tanh": lambda x, y, dx: _tanh(dx, y),
    "silu": _silu_tangent,
    "gelu": lambda x, y, dx, approximate="none": _gelu(dx, x, approximate=approximate),
    "relu": lambda x, y, dx, inplace=False: _threshold(dx, y, 0),
    "relu6": lambda x, y, dx, inplace=False: _hardtanh(dx, x, 0.0, 6.0),
    "leaky_relu": lambda x, y, dx, negative_slope=0.01, inplace=False: _leaky_relu(dx, x, negative_slope, False),
    "elu": lambda x, y, dx, alpha=1.0, scale=1.0, input_scale=1.0, inplace=False: _elu(dx, alpha, scale, input_scale, False, x),
    "celu": lambda x, y, dx, alpha=1.0, inplace=False: _elu(dx, alpha, 1.0, 1.0 / alpha, False, x),
    "selu": _selu,
    "softplus": lambda x, y, dx, beta=1, threshold=20: _softplus(dx, x, beta, threshold),
    "mish": lambda x, y, dx, inplace=False: aten.mish_backward.default(dx, x),
    "logsigmoid": _log_sigmoid_tangent,
    "hardtanh": lambda x, y, dx, min_val=-1.0, max_val=1.0, inplace=False: _hardtanh(dx, x, min_val, max_val),
    "hardswish": lambda x, y, dx, inplace=False: aten.hardswish_backward.default(dx, x),
    "hardsigmoid": lambda x, y, dx, inplace=False: aten.hardsigmoid_backward.default(dx, x),
    "softshrink": lambda x, y, dx, lambd=0.5: aten.softshrink_backward.default(dx, x, lambd),
    "hardshrink": lambda x, y, dx, lambd=0.5: aten.hardshrink_backward.default(dx, x, lambd),
    "softsign": lambda x, y, dx: dx / (x.abs() + 1).square_(),
    "tanhshrink": lambda x, y, dx: dx * torch.tanh(x).square_(),
    "threshold": lambda x, y, dx, threshold, value, inplace=False: _threshold(dx, x, threshold),
    "logit": lambda x, y, dx, eps=None: aten.logit_backward.default(dx, x, eps),
    "nan_to_num": lambda x, y, dx, *args, **kwargs: torch.where(x.isfinite(), dx, 0.0),
    "glu": _glu,
    "frac": lambda x, y, dx: dx,
}

HOLOMORPHIC = {TABLE[name] for name in "exp log sin cos sinh cosh sqrt square reciprocal abs silu".split()}
"""Derivatives that hold for complex numbers as they stand; `abs` is not holomorphic, but its line knows them."""

for _name, _derivative in TABLE.items():
    register(unary(_derivative), _name, f"special.{_name}")
for _name in "sin cos tan sinh cosh tanh".split():
    register(unary(TABLE[f"a{_name}"]), f"arc{_name}")
register(unary(TABLE["abs"]), "absolute", "Tensor.__abs__")
register(unary(TABLE["sigmoid"]), "special.expit")
register(unary(TABLE["logsigmoid"]), "log_sigmoid")
register(unary(TABLE["lgamma"]), "special.gammaln")
