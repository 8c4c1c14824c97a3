"""Products: functions linear in each tensor argument on its own.

`d f(a, b) = f(da, b) + f(a, db)`; a bias or an added term goes along by itself.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from trigflow.tangent.dispatch import fallback
from trigflow.tangent.dual import Dual, Handler, has_dual, no_grad, pair, strip
from trigflow.tangent.rules.shape import laid_out
from trigflow.tangent.table import register


def product(func: Any, *args: Any, **kwargs: Any) -> Any:
    """`f(a, b, ...)`: one term per argument that carries a tangent."""
    if kwargs:
        args, kwargs = _by_position(args, kwargs)
        if has_dual(kwargs):
            return fallback(func, *args, **kwargs)
    primals = strip(args)
    primal = func(*primals, **kwargs)
    with no_grad():
        return pair(primal, _terms(func, args, primals, **kwargs))


def _terms(func: Any, args: tuple[Any, ...], primals: tuple[Any, ...], **kwargs: Any) -> Tensor | None:
    """`f(da, b, ...) + f(a, db, ...) + ...`, None where nothing carries a tangent."""
    tangent = None
    for i, a in enumerate(args):
        if type(a) is Dual:
            try:
                term = func(*primals[:i], a.tangent, *primals[i + 1 :], **kwargs)
            except RuntimeError:  # a kernel that wants certain strides, which the primal has
                term = func(*primals[:i], laid_out(a), *primals[i + 1 :], **kwargs)
            tangent = term if tangent is None else add_to(tangent, term)
    return tangent


def add_to(total: Tensor, term: Tensor) -> Tensor:
    """`total + term`, into the memory of `total`, a fresh tensor, where the shapes allow."""
    return total.add_(term) if total.shape == term.shape and total.dtype == term.dtype else total + term


def _by_position(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tensors given by keyword (`torch.mul(input=x, other=y)`) put first, in the order of every torch product."""
    order = ("input", "self", "other", "mat2", "vec", "vec2", "tensor2")
    named = [k for k in order if k in kwargs]
    return (*args, *[kwargs[k] for k in named]), {k: v for k, v in kwargs.items() if k not in named}


def affine(bias_shape: Any) -> Handler:
    """`f(x, weight, bias, settings)`, the product of x and weight plus a bias.

    Args:
        bias_shape: `bias_shape(out)` is the shape in which the bias is added to the output.
    """

    def handler(func: Any, input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
        x, w, b = strip(input), strip(weight), strip(bias)
        primal = func(x, w, b, *args, **kwargs)
        tangent = None
        with no_grad():
            if type(input) is Dual:
                dx = input.tangent
                # For a weight on the graph PyTorch packs a strided input first, which saves a backward memory. Here is none.
                packed = dx.is_contiguous() or dx.device.type != "cpu"
                tangent = func(dx, w if packed else w.detach(), None, *args, **kwargs)
            if type(weight) is Dual:
                term = func(x, weight.tangent, None, *args, **kwargs)
                tangent = term if tangent is None else tangent.add_(term)
            if type(bias) is Dual:
                db = bias.tangent.reshape(bias_shape(primal)).to(primal.dtype)
                tangent = db.expand(primal.shape) if tangent is None else tangent.add_(db)
        return pair(primal, tangent)

    return handler


def einsum(func: Any, equation: Any, *operands: Any) -> Any:
    """`torch.einsum`, linear in every operand."""
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str):
        return fallback(func, equation, *operands)
    return product(lambda *tensors: torch.einsum(equation, *tensors), *operands)


def added_product(func: Any, input: Any, *factors: Any, beta: Any = 1, alpha: Any = 1, **named: Any) -> Any:
    """`beta input + alpha (a b)`: addmm, baddbmm, addmv, addr, addbmm."""
    if named:
        return fallback(func, input, *factors, beta=beta, alpha=alpha, **named)
    primals = strip(factors)
    primal = func(strip(input), *primals, beta=beta, alpha=alpha)
    with no_grad():
        zero = torch.zeros((), dtype=primal.dtype, device=primal.device).expand(strip(input).shape)
        tangent = _terms(functools.partial(func, zero), factors, primals, beta=0, alpha=alpha)
        if type(input) is Dual:
            term = input.tangent if beta == 1 else input.tangent * beta
            tangent = term if tangent is None else tangent + term
    return pair(primal, tangent)


def grouped(func: Any, a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """`torch.nn.functional.grouped_mm`: products of groups of rows with matrices of their own."""
    if bias is not None:
        return fallback(func, a, b, offs, bias, out_dtype)
    return product(func, a, b, offs=offs, out_dtype=out_dtype)


def bilinear(func: Any, input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    """`x1^T W x2 + b` for each output."""
    factors = (input1, input2, weight)
    primals = strip(factors)
    primal = func(*primals, strip(bias))
    with no_grad():
        tangent = _terms(func, factors, primals)
        if type(bias) is Dual:
            tangent = bias.tangent if tangent is None else tangent.add_(bias.tangent)
        return pair(primal, tangent)


def multi_product(func: Any, tensors: Any, **kwargs: Any) -> Any:
    """`torch.linalg.multi_dot` and others that take their factors as a list."""
    return product(lambda *factors: func(list(factors), **kwargs), *tensors)


register(product, *"matmul mm bmm mv dot vdot inner outer ger kron tensordot chain_matmul cross".split())
register(product, "Tensor.__matmul__", "linalg.matmul", "linalg.vecdot", "linalg.cross")
register(lambda func, a, b: product(torch.matmul, b, a), "Tensor.__rmatmul__")
register(affine(lambda out: (-1,) if out.ndim else ()), "linear")
for _d in (1, 2, 3):
    register(affine(lambda out, d=_d: (-1, *[1] * d)), f"conv{_d}d", f"conv_transpose{_d}d")
register(einsum, "einsum")
register(added_product, *"addmm baddbmm addmv addr addbmm".split())
register(multi_product, "linalg.multi_dot")
register(grouped, "_grouped_mm")
register(bilinear, "bilinear")
