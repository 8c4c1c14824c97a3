"""Elementwise functions of one and two tensors, keywords, mixed types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tangent.helpers import check, draw, no_fallback, reference, relative_error
from trigflow.tangent import jvp

X = (3, 4, 5)


ELEMENTWISE: dict[str, Callable[[Tensor], Any]] = {
    **{
        name: getattr(torch, name)
        for name in "exp exp2 expm1 sin cos tan atan sinh cosh asinh tanh sigmoid square abs erf erfc neg positive "
        "deg2rad rad2deg frac nan_to_num absolute arctan arcsinh".split()
    },
    **{
        name: getattr(F, name)
        for name in "silu gelu relu relu6 leaky_relu elu celu selu softplus mish logsigmoid hardtanh hardswish "
        "hardsigmoid softshrink hardshrink softsign tanhshrink glu".split()
        if name != "glu"
    },
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu slope": lambda x: F.leaky_relu(x, 0.3),
    "leaky_relu negative slope": lambda x: F.leaky_relu(x, negative_slope=-0.2),
    "elu alpha": lambda x: F.elu(x, alpha=0.7),
    "celu alpha": lambda x: F.celu(x, 0.5),
    "softplus beta": lambda x: F.softplus(x, beta=3.0, threshold=2.0),
    "hardtanh bounds": lambda x: F.hardtanh(x, -0.3, 0.8),
    "threshold": lambda x: F.threshold(x, 0.2, -1.0),
    "glu": lambda x: F.glu(x, 1),
    "method sigmoid": lambda x: x.sigmoid().tanh().relu().exp(),
    "expit": torch.special.expit,
    "clamp": lambda x: torch.clamp(x, -0.5, 0.7),
    "clamp low": lambda x: x.clamp(min=0.1),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "clamp_max": lambda x: x.clamp_max(0.1),
    "clip": lambda x: torch.clip(x, max=0.2),
    "add number": lambda x: x + 2,
    "radd": lambda x: 2 + x,
    "sub number": lambda x: x - 0.5,
    "rsub": lambda x: 1 - x,
    "torch.rsub": lambda x: torch.rsub(x, 3.0),
    "torch.rsub alpha": lambda x: torch.rsub(x, 3.0, alpha=2),
    "mul number": lambda x: x * 3,
    "rmul": lambda x: 3 * x,
    "div number": lambda x: x / 3,
    "square operator": lambda x: x**2,
    "cube": lambda x: x**3,
    "power 1": lambda x: x**1,
    "power 0": lambda x: x**0 + x,
    "rpow": lambda x: 2.0**x,
    "remainder": lambda x: x % 0.7,
    "fmod": lambda x: torch.fmod(x, 0.7),
    "abs operator": lambda x: abs(-x),
    "pos operator": lambda x: +x,
}
POSITIVE: dict[str, Callable[[Tensor], Any]] = {
    **{
        name: getattr(torch, name)
        for name in "log log2 log10 log1p sqrt rsqrt reciprocal lgamma acosh".split()
        if name != "acosh"
    },
    "rdiv": lambda x: 2 / x,
    "half power": lambda x: x**0.5,
    "negative power": lambda x: x**-1.5,
    "torch.pow": lambda x: torch.pow(x, 1.7),
    "pow of number": lambda x: torch.pow(1.7, x),
    "acosh": lambda x: torch.acosh(x + 1),
    "asin": lambda x: torch.asin(x / 4),
    "acos": lambda x: torch.acos(x / 4),
    "atanh": lambda x: torch.atanh(x / 4),
    "erfinv": lambda x: torch.erfinv(x / 4),
    "logit": lambda x: torch.logit(x / 4),
    "logit eps": lambda x: torch.special.logit(x / 2 - 0.2, eps=0.2),
}

TWO: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add": lambda a, b: a + b,
    "torch.add alpha": lambda a, b: torch.add(a, b, alpha=2.5),
    "method add": lambda a, b: a.add(b, alpha=0.5),
    "sub": lambda a, b: a - b,
    "torch.sub alpha": lambda a, b: torch.sub(a, b, alpha=3),
    "rsub": lambda a, b: torch.rsub(a, b, alpha=0.5),
    "mul": lambda a, b: a * b,
    "multiply": lambda a, b: torch.multiply(a, b),
    "keywords": lambda a, b: torch.mul(input=a, other=b),
    "div": lambda a, b: a / b,
    "torch.div": lambda a, b: torch.div(a, b),
    "div floor": lambda a, b: torch.div(a, b, rounding_mode="floor") + a + b,
    "pow": lambda a, b: a**b,
    "torch.pow": torch.pow,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "max": torch.max,
    "min": lambda a, b: a.min(b),
    "fmod": torch.fmod,
    "remainder": lambda a, b: a % b,
    "atan2": torch.atan2,
    "hypot": torch.hypot,
    "logaddexp": torch.logaddexp,
    "where": lambda a, b: torch.where(torch.arange(5, device=a.device) > 2, a, b),
    "where method": lambda a, b: a.where(torch.arange(5, device=a.device) > 2, b),
    "lerp number": lambda a, b: torch.lerp(a, b.expand(a.shape) if a.ndim >= b.ndim else b, 0.3),
    "addcmul": lambda a, b: torch.addcmul(a, b, a, value=0.4),
    "addcdiv": lambda a, b: torch.addcdiv(a, a, b, value=0.4),
    "clamp tensors": lambda a, b: torch.clamp(a, min=b - 1, max=b),
    "clamp one tensor": lambda a, b: torch.clamp(a, min=b),
}
SHAPES = [((3, 4, 5), (3, 4, 5)), ((3, 4, 5), (5,)), ((4, 5), (3, 1, 5)), ((3, 4, 5), (1, 4, 1)), ((2, 5), ())]


KEYWORDS: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda x: torch.sum(input=x, dim=0),
    "softmax": lambda x: torch.softmax(input=x, dim=0),
    "silu": lambda x: F.silu(input=x),
    "cat": lambda x: torch.cat(tensors=[x, x], dim=1),
    "reshape": lambda x: torch.reshape(input=x, shape=(-1,)),
    "clamp": lambda x: torch.clamp(input=x, min=0.1),
    "var": lambda x: torch.var(input=x, dim=0),
    "vector_norm": lambda x: torch.linalg.vector_norm(x=x, dim=1),
    "group_norm": lambda x: F.group_norm(input=x, num_groups=2),
    "layer_norm": lambda x: F.layer_norm(input=x, normalized_shape=(5,)),
    "conv1d": lambda x: F.conv1d(input=x, weight=torch.ones(2, 4, 3, dtype=x.dtype), padding=1),
    "linear": lambda x: F.linear(input=x, weight=torch.ones(2, 5, dtype=x.dtype)),
    "matmul": lambda x: torch.matmul(input=torch.ones(2, 4, dtype=x.dtype), other=x),
    "add": lambda x: torch.add(input=torch.ones(5, dtype=x.dtype), other=x, alpha=2),
    "where": lambda x: torch.where(condition=x > 0, input=x, other=2 * x),
    "max": lambda x: torch.max(input=x, dim=1),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_arguments_by_keyword(name: str) -> None:
    check(KEYWORDS[name], (draw(1, 3, 4, 5),))


@pytest.mark.parametrize("carry", [(True, True), (True, False), (False, True)])
def test_mixed_types(carry: tuple[bool, bool]) -> None:
    """Integers, booleans and other precisions among the operands; the tangent follows the output."""
    a, b = draw(1, 4), draw(2, 4, dtype=torch.float32)
    steps = torch.arange(1, 5)
    for fn in (
        lambda a, b: a * b + b * steps,
        lambda a, b: (a > 0) * a - steps / (3 + b),
        lambda a, b: torch.cat([a, b]),
        lambda a, b: a**steps + b,
        lambda a, b: a.float() @ b,
        lambda a, b: torch.where(a > 0, a, b),
    ):
        x, y = a.clone(), b.clone()
        tangents = tuple(draw(31 + i, 4).to(v) if c else None for i, (v, c) in enumerate(zip((x, y), carry, strict=True)))
        out, tangent = jvp(fn, (x, y), tangents)
        assert torch.equal(out, fn(x, y))
        assert tangent.dtype == out.dtype
        assert relative_error(tangent.double(), reference(fn, (x, y), tangents).double()) < 1e-6


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name: str) -> None:
    x = draw(1, *X)
    check(ELEMENTWISE[name], (x,))
    check(ELEMENTWISE[name], (x.transpose(0, 2).contiguous().transpose(0, 2),))
    no_fallback(ELEMENTWISE[name], x)


@pytest.mark.parametrize("name", POSITIVE)
def test_elementwise_of_positive_numbers(name: str) -> None:
    x = draw(2, *X, low=0.5)
    check(POSITIVE[name], (x,))
    no_fallback(POSITIVE[name], x)


@pytest.mark.parametrize("carry", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", TWO)
def test_two_tensors(name: str, carry: tuple[bool, bool]) -> None:
    for i, (one, two) in enumerate(SHAPES):
        if name in ("where", "where method") and one == (2, 5):
            continue
        a, b = draw(10 + i, *one, low=0.5), draw(20 + i, *two, low=0.5)
        check(TWO[name], (a, b), carry)
        no_fallback(TWO[name], a, b)


def test_equal_elements_share_the_derivative_of_an_extreme() -> None:
    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    b = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    check(torch.maximum, (a, b))
    check(lambda x: x.amax(0), (torch.tensor([2.0, 5.0, 5.0], dtype=torch.float64),))
    check(lambda x: x.max(), (torch.tensor([2.0, 5.0, 5.0], dtype=torch.float64),))


def test_celu_is_more_exact_than_its_backward_in_pytorch() -> None:
    """torch rounds 1 / alpha to float32 in the derivative of celu; the tangent is exp(x / alpha) dx to full precision."""
    x, dx = -draw(1, 9).abs(), draw(2, 9)
    tangent = jvp(lambda x: F.celu(x, 0.6), (x,), (dx,))[1]
    assert relative_error(tangent, torch.exp(x / 0.6) * dx) < 1e-14


def test_piecewise_constant_functions_have_tangent_zero() -> None:
    x = draw(1, 9)
    for fn in (torch.round, torch.floor, torch.ceil, torch.trunc, torch.sign, lambda x: x // 0.3, lambda x: 2 // x):
        out, tangent = jvp(fn, (x,), (draw(2, 9),))
        assert torch.equal(out, fn(x))
        assert not tangent.any()


def test_powers_at_zero() -> None:
    base = torch.tensor([0.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    power = torch.tensor([0.0, 0.0, 3.0, 2.0], dtype=torch.float64)
    for carry in [(True, False), (True, True), (False, True)]:
        check(torch.pow, (base, power), carry)
    check(lambda x: torch.pow(0.0, x), (torch.tensor([1.0, 2.0], dtype=torch.float64),))
