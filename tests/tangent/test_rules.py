"""Every rule in float64 against torch.func.jvp; outputs and gradients against a plain run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tangent.helpers import check, draw, reference, relative_error
from trigflow.tangent import TangentError, coverage, jvp

X = (3, 4, 5)
IMAGE = (2, 4, 6, 6)

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


def no_fallback(fn: Callable[..., Any], *inputs: Any) -> None:
    report = coverage(fn, *inputs)
    assert report.complete, str(report)
    assert not report.fallbacks, str(report)


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
        tangents = tuple(
            draw(31 + i, 4).to(v) if c else None for i, (v, c) in enumerate(zip((x, y), carry, strict=True))
        )
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


LINEAR: dict[str, Callable[[Tensor], Any]] = {
    "reshape": lambda x: x.reshape(2, -1),
    "view": lambda x: x.view(2, 4, 36),
    "view_as": lambda x: x.view_as(x),
    "flatten": lambda x: x.flatten(1),
    "torch.flatten": lambda x: torch.flatten(x, 2),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "expand": lambda x: x[:1].expand(3, -1, -1, -1),
    "expand_as": lambda x: x[:1].expand_as(x),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "tile": lambda x: torch.tile(x, (2, 1)),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "None index": lambda x: x[:, None, ..., ::2],
    "tensor index": lambda x: x[torch.tensor([1, 0, 1]), :, 2],
    "mask index": lambda x: x[:, torch.tensor([True, False, True, True])],
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 2),
    "t": lambda x: x.flatten(1).t(),
    "T": lambda x: x.flatten(1).T,
    "mT": lambda x: x.mT,
    "movedim": lambda x: torch.movedim(x, 1, -1),
    "swapaxes": lambda x: x.swapaxes(0, 3),
    "narrow": lambda x: x.narrow(2, 1, 3),
    "select": lambda x: x.select(1, 2),
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 0])),
    "gather": lambda x: x.gather(1, torch.zeros(2, 1, 6, 6, dtype=torch.long)),
    "take_along_dim": lambda x: torch.take_along_dim(x, torch.zeros(2, 1, 6, 6, dtype=torch.long), 1),
    "masked_select": lambda x: x.masked_select(torch.arange(6) > 3),
    "masked_fill": lambda x: x.masked_fill(torch.arange(6) > 3, 5.0),
    "diagonal": lambda x: x.diagonal(0, 2, 3),
    "diag_embed": lambda x: torch.diag_embed(x),
    "tril": lambda x: x.tril(),
    "triu": lambda x: torch.triu(x, 1),
    "flip": lambda x: x.flip(1, 2),
    "roll": lambda x: torch.roll(x, (1, 2), (2, 3)),
    "rot90": lambda x: torch.rot90(x, 1, (2, 3)),
    "unfold": lambda x: F.unfold(x, 3, padding=1),
    "sliding unfold": lambda x: x.unfold(2, 3, 2),
    "fold": lambda x: F.fold(F.unfold(x, 2, stride=2), (6, 6), 2, stride=2),
    "chunk": lambda x: x.chunk(2, 1),
    "split": lambda x: x.split(3, 1),
    "torch.split sections": lambda x: torch.split(x, [1, 3], dim=1),
    "tensor_split": lambda x: torch.tensor_split(x, 3, 1),
    "unbind": lambda x: x.unbind(1),
    "iterate": lambda x: [row * 2 for row in x],
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "contiguous": lambda x: x.mT.contiguous(),
    "clone": lambda x: x.clone(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "to itself": lambda x: x.to(x.device).to(torch.float64).double(),
    "type_as": lambda x: x.type_as(x),
    "sum": lambda x: x.sum(),
    "sum axes": lambda x: x.sum((2, 3), keepdim=True),
    "mean": lambda x: x.mean(dim=1),
    "cumsum": lambda x: x.cumsum(1),
    "trace": lambda x: x[0, 0].trace(),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad value": lambda x: F.pad(x, (1, 2, 0, 1), value=3.0),
    "pad reflect": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "pad replicate": lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"),
    "pad circular": lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "avg_pool1d": lambda x: F.avg_pool1d(x[0], 2, stride=1, padding=1),
    "avg_pool3d": lambda x: F.avg_pool3d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x[0], 4),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, (2, 3, 1)),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest-exact": lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, size=(9, 4), mode="bilinear", align_corners=True),
    "bicubic": lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic"),
    "area": lambda x: F.interpolate(x, size=3, mode="area"),
    "antialias": lambda x: F.interpolate(x, size=3, mode="bilinear", antialias=True),
    "upsample module": torch.nn.Upsample(scale_factor=2, mode="bilinear"),
    "complex and back": lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(2, 4, 6, 3, 2)) * 1j),
    "atleast_3d": lambda x: torch.atleast_3d(x[0, 0]),
    "broadcast_to": lambda x: x[:1].broadcast_to(3, 4, 6, 6),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
    "max_pool2d indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "max_pool1d": lambda x: F.max_pool1d(x[0], 2),
    "max_pool3d": lambda x: F.max_pool3d(x, 2),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear(name: str) -> None:
    x = draw(3, *IMAGE)
    check(LINEAR[name], (x,))
    no_fallback(LINEAR[name], x)


@pytest.mark.parametrize("carry", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b: torch.cat([a, b], 1),
        lambda a, b: torch.stack((a, b), dim=2),
        lambda a, b: torch.cat([b, a, b], dim=-1),
        lambda a, b: torch.hstack([a, b]),
        lambda a, b: torch.broadcast_tensors(a[:1], b),
        lambda a, b: torch.meshgrid(a[0], b[1], indexing="ij"),
        lambda a, b: a.index_add(0, torch.tensor([0, 0, 1]), b),
        lambda a, b: torch.scatter(a, 0, torch.tensor([[0], [2], [1]]).expand(3, 4), b),
        lambda a, b: a.masked_fill(torch.arange(4) > 1, b.sum()),
        lambda a, b: torch.complex(a, b).abs(),
    ],
)
def test_joined(fn: Callable[..., Any], carry: tuple[bool, bool]) -> None:
    check(fn, (draw(4, 3, 4), draw(5, 3, 4)), carry)


PRODUCTS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "matmul": (torch.matmul, ((2, 3, 4), (4, 5))),
    "operator": (lambda a, b: a @ b, ((2, 3, 4), (2, 4, 5))),
    "reflected": (lambda a, b: a.__rmatmul__(b), ((4, 5), (3, 4))),
    "mm": (torch.mm, ((3, 4), (4, 5))),
    "bmm": (torch.bmm, ((2, 3, 4), (2, 4, 5))),
    "mv": (torch.mv, ((3, 4), (4,))),
    "dot": (torch.dot, ((4,), (4,))),
    "outer": (torch.outer, ((4,), (3,))),
    "inner": (torch.inner, ((2, 4), (3, 4))),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), ((2, 3, 4), (2, 5, 4))),
    "einsum three": (lambda a, b, c: torch.einsum("ij,jk,kl->il", [a, b, c]), ((2, 3), (3, 4), (4, 5))),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=1), ((2, 3), (3, 4))),
    "linear": (F.linear, ((2, 3, 4), (5, 4), (5,))),
    "linear without bias": (F.linear, ((2, 4), (5, 4))),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, padding=1), ((2, 3, 7), (4, 3, 3), (4,))),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), ((2, 4, 7, 7), (4, 4, 3, 3), (4,))),
    "conv2d groups": (lambda x, w: F.conv2d(x, w, padding="same", groups=2), ((2, 4, 5, 5), (6, 2, 3, 3))),
    "conv3d": (lambda x, w, b: F.conv3d(x, w, bias=b, dilation=1), ((1, 2, 4, 4, 4), (3, 2, 2, 2, 2), (3,))),
    "conv_transpose1d": (lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2), ((2, 3, 5), (3, 4, 3), (4,))),
    "conv_transpose2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1, output_padding=1),
        ((2, 3, 5, 5), (3, 4, 3, 3), (4,)),
    ),
    "conv_transpose3d": (F.conv_transpose3d, ((1, 2, 3, 3, 3), (2, 3, 2, 2, 2), (3,))),
    "addmm": (lambda m, a, b: torch.addmm(m, a, b, beta=0.5, alpha=2), ((3, 5), (3, 4), (4, 5))),
    "addmm bias": (torch.addmm, ((5,), (3, 4), (4, 5))),
    "baddbmm": (lambda m, a, b: torch.baddbmm(m, a, b, alpha=0.3), ((2, 3, 5), (2, 3, 4), (2, 4, 5))),
    "multi_dot": (lambda a, b, c: torch.linalg.multi_dot([a, b, c]), ((2, 3), (3, 4), (4, 5))),
    "lerp": (torch.lerp, ((3, 4), (3, 4), (3, 4))),
    "addcdiv": (lambda x, a, b: torch.addcdiv(x, a, 3 + b.square(), value=2), ((3, 4), (4,), (3, 1))),
    "addcmul": (lambda x, a, b: torch.addcmul(x, a, b, value=2), ((3, 4), (4,), (3, 1))),
    "bilinear": (F.bilinear, ((2, 3), (2, 4), (5, 3, 4), (5,))),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    fn, shapes = PRODUCTS[name]
    values = tuple(draw(40 + i, *shape) for i, shape in enumerate(shapes))
    for bits in range(1, 2 ** len(shapes)):
        check(fn, values, tuple(bool(bits >> i & 1) for i in range(len(shapes))))
    if name != "bilinear":
        no_fallback(fn, *values)


REDUCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda x: F.softmax(x, -1),
    "torch.softmax": lambda x: torch.softmax(x, 1),
    "method softmax": lambda x: x.softmax(dim=0),
    "log_softmax": lambda x: F.log_softmax(x, dim=1),
    "softmin": lambda x: F.softmin(x, dim=1),
    "logsumexp": lambda x: torch.logsumexp(x, (0, 2)),
    "logsumexp keep": lambda x: x.logsumexp(1, keepdim=True),
    "vector_norm": torch.linalg.vector_norm,
    "vector_norm axes": lambda x: torch.linalg.vector_norm(x, dim=(0, 2), keepdim=True),
    "norm": lambda x: torch.norm(x),
    "method norm": lambda x: x.norm(dim=1, keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=1),
    "var": torch.var,
    "var axis": lambda x: x.var(1),
    "var axes": lambda x: torch.var(x, dim=(0, 2), unbiased=False, keepdim=True),
    "var correction": lambda x: torch.var(x, 1, correction=0),
    "var flag": lambda x: x.var(False),
    "std": lambda x: x.std(dim=-1),
    "var_mean": lambda x: torch.var_mean(x, dim=(1, 2), correction=0),
    "std_mean": lambda x: torch.std_mean(x),
    "amax": lambda x: x.amax((0, 1)),
    "amin": lambda x: torch.amin(x, 1, keepdim=True),
    "max": lambda x: x.max(),
    "min": lambda x: torch.min(x),
    "max axis": lambda x: x.max(1),
    "min axis": lambda x: torch.min(x, dim=-1, keepdim=True),
    "sort": lambda x: torch.sort(x, 1, descending=True),
    "topk": lambda x: x.topk(2, dim=1),
    "median": lambda x: x.median(dim=1),
    "median of all": torch.median,
    "kthvalue": lambda x: x.kthvalue(2, 1),
    "cummax": lambda x: torch.cummax(x, 1),
}
FALLBACKS: dict[str, Callable[[Tensor], Any]] = {
    "prod": lambda x: x.prod(1),
    "cumprod": lambda x: x.cumprod(1),
    "1-norm": lambda x: torch.linalg.vector_norm(x, 1),
    "linalg.norm": lambda x: torch.linalg.norm(x, dim=1),
    "prelu": lambda x: F.prelu(x, torch.full((4,), 0.2, dtype=x.dtype)),
    "det": lambda x: torch.linalg.det(x[:, :4, :4] + 3 * torch.eye(4, dtype=x.dtype)),
    "fft": lambda x: torch.fft.rfft(x).abs(),
    "sinc": torch.sinc,
    "cosine_similarity": lambda x: F.cosine_similarity(x[0], x[1]),
    "diff": lambda x: torch.diff(x, dim=1),
    "mse_loss": lambda x: F.mse_loss(x, x.flip(0)),
    "lp_pool1d": lambda x: F.lp_pool1d(x, 2, 2),
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "aten silu": lambda x: torch.ops.aten.silu(x),
    "aten overload": lambda x: torch.ops.aten.mul.Tensor(x, x),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str) -> None:
    x = draw(6, *X)
    check(REDUCTIONS[name], (x,))
    check(REDUCTIONS[name], (x.transpose(0, 2).contiguous().transpose(0, 2),))
    no_fallback(REDUCTIONS[name], x)


@pytest.mark.parametrize("name", FALLBACKS)
def test_functions_without_a_rule(name: str) -> None:
    check(FALLBACKS[name], (draw(7, *X),))


def test_norms_at_zero_have_tangent_zero() -> None:
    x = torch.zeros(3, dtype=torch.float64)
    check(lambda x: torch.linalg.vector_norm(x), (x,))


def test_embedding_carries_the_tangent_of_its_table() -> None:
    rows = torch.tensor([[0, 2], [1, 1]])
    check(lambda w: F.embedding(rows, w), (draw(8, 3, 4),))
    check(lambda w: torch.embedding(w, rows), (draw(8, 3, 4),))


NORMS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b, 1e-3), ((3, 4, 5, 2), (4,), (4,))),
    "group_norm 3d": (lambda x, w, b: F.group_norm(x, 2, w, b), ((3, 4, 7), (4,), (4,))),
    "group_norm flat": (lambda x, w, b: F.group_norm(x, 2, w, b), ((3, 4), (4,), (4,))),
    "group_norm 5d": (lambda x: F.group_norm(x, 4), ((2, 4, 3, 2, 2),)),
    "torch.group_norm": (lambda x, w, b: torch.group_norm(x, 2, w, b, 1e-3), ((3, 4, 5), (4,), (4,))),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), ((2, 3, 4), (4,), (4,))),
    "layer_norm axes": (lambda x, w, b: F.layer_norm(x, (3, 4), w, b, eps=1e-3), ((2, 3, 4), (3, 4), (3, 4))),
    "layer_norm plain": (lambda x: F.layer_norm(x, (4,)), ((2, 3, 4),)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (4,), w), ((2, 3, 4), (4,))),
    "rms_norm axes": (lambda x, w: F.rms_norm(x, (3, 4), w, eps=1e-3), ((2, 3, 4), (3, 4))),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), ((6, 3, 2, 2), (3,), (3,))),
    "batch_norm flat": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), ((6, 3), (3,), (3,))),
    "batch_norm eval": (
        lambda x, w, b: F.batch_norm(
            x, torch.arange(3, dtype=x.dtype), torch.arange(1, 4, dtype=x.dtype), w, b, False, 0.1, 1e-3
        ),
        ((6, 3, 2), (3,), (3,)),
    ),
    "torch.batch_norm": (
        lambda x, w, b: torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-3, False),
        ((6, 3, 2), (3,), (3,)),
    ),
    "torch.instance_norm": (
        lambda x, w, b: torch.instance_norm(x, w, b, None, None, True, 0.1, 1e-3, False),
        ((2, 3, 5), (3,), (3,)),
    ),
    "instance_norm": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), ((2, 3, 4, 4), (3,), (3,))),
    "instance_norm eval": (
        lambda x: F.instance_norm(
            x, torch.arange(3, dtype=x.dtype), torch.arange(1, 4, dtype=x.dtype), use_input_stats=False
        ),
        ((2, 3, 4),),
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_normalizations(name: str) -> None:
    fn, shapes = NORMS[name]
    values = tuple(draw(60 + i, *shape) for i, shape in enumerate(shapes))
    for bits in range(1, 2 ** len(shapes)):
        check(fn, values, tuple(bool(bits >> i & 1) for i in range(len(shapes))))
    no_fallback(fn, *values)


@pytest.mark.parametrize("name", [n for n in NORMS if len(NORMS[n][1][0]) == 4])
def test_normalizations_of_strided_inputs(name: str) -> None:
    fn, shapes = NORMS[name]
    rest = tuple(draw(61 + i, *shape) for i, shape in enumerate(shapes[1:]))
    x = draw(60, *shapes[0])
    last = x.contiguous(memory_format=torch.channels_last)
    wide = draw(60, *shapes[0][:-1], 2 * shapes[0][-1])
    # torch.func.jvp cannot take group_norm of these layouts; the packed input has the same values.
    for layout in (lambda v: v.contiguous(memory_format=torch.channels_last), lambda v: v.mT.contiguous().mT):
        tangents = tuple(draw(31 + i, *v.shape) for i, v in enumerate((x, *rest)))
        check(fn, (layout(x), *rest), expected=reference(fn, (x, *rest), tangents))
    sliced = lambda v, *r: fn(v[..., ::2], *r)  # noqa: E731
    packed = lambda v, *r: fn(v[..., ::2].contiguous(), *r)  # noqa: E731
    tangents = tuple(draw(31 + i, *v.shape) for i, v in enumerate((wide, *rest)))
    check(sliced, (wide, *rest), expected=reference(packed, (wide, *rest), tangents))
    assert last.shape == x.shape


def test_batch_norm_updates_its_buffers_once() -> None:
    plain, engine = torch.nn.BatchNorm1d(3).double(), torch.nn.BatchNorm1d(3).double()
    x = draw(9, 6, 3)
    plain(x)
    jvp(engine, (x,), (x,))
    assert torch.equal(plain.running_mean, engine.running_mean)
    assert torch.equal(plain.running_var, engine.running_var)
    assert int(engine.num_batches_tracked) == 1
    mean, var = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
    jvp(lambda x: torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, False), (x,), (x,))
    assert torch.equal(plain.running_mean, mean)
    assert torch.equal(plain.running_var, var)
    # These have no rule, and a second run for the tangent would update the buffers again.
    for function in (torch.native_batch_norm, torch.ops.aten._native_batch_norm_legit):
        with pytest.raises(TangentError, match="updates its buffers"):
            jvp(lambda x: function(x, None, None, mean, var, True, 0.1, 1e-5)[0], (x,), (x,))  # noqa: B023
    assert torch.equal(plain.running_mean, mean)
