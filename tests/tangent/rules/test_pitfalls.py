"""Functions whose tangent is easily lost: each was, in some version of PyTorch or of this engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tangent.helpers import check, draw, reference, relative_error
from trigflow.tangent import TangentError, jvp

X, DX = draw(1, 4), draw(2, 4)
LABELS = torch.tensor([1, 0, 2])
BOTH = [(True, True), (True, False), (False, True)]

REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "a new tensor of values": (lambda x: torch.zeros(4).new_tensor(x) + x.new_tensor(x), "new_tensor"),
    "draws around a moving mean": (lambda x: torch.normal(x, 1.0), "normal"),
    "draws of a moving deviation": (lambda x: torch.normal(0.0, x.abs()), "normal"),
    "draws in place around a moving mean": (lambda x: torch.empty(4).add_(x).normal_(x.sum(), 1.0), "normal_"),
    "bytes": (lambda x: x.untyped_storage(), "storage"),
    "a weight of a loss": (lambda x: F.nll_loss(x.reshape(1, 4).expand(3, 4), LABELS, x.abs()), "nll_loss"),
    "a target of a loss": (lambda x: F.hinge_embedding_loss(x, x.sign() + x), "hinge_embedding_loss"),
    "no derivative in PyTorch": (lambda x: torch.special.bessel_j0(x), "bessel_j0"),
    "an exact zero in PyTorch": (lambda x: torch.special.chebyshev_polynomial_t(x, 3), "chebyshev"),
    "a moving record of statistics": (
        lambda x: F.batch_norm(x.reshape(2, 2), x[:2], x[2:].abs(), training=False),
        "record of mean and variance",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    fn, word = REFUSED[name]
    with pytest.raises(TangentError, match=word):
        jvp(fn, (X,), (DX,))


def test_a_loss_of_its_input_alone_has_a_tangent() -> None:
    check(lambda x: F.nll_loss(x, LABELS, torch.ones(4, dtype=x.dtype)), (draw(1, 3, 4),))
    check(lambda x: F.hinge_embedding_loss(x, torch.ones(4, dtype=x.dtype)), (X,))
    check(lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1), (draw(1, 3, 4),))


def test_sums_of_weights_by_bin() -> None:
    bins = torch.tensor([0, 2, 2, 1])
    out, tangent = jvp(lambda w: torch.bincount(bins, w, minlength=5), (X,), (DX,))
    assert torch.equal(out, torch.bincount(bins, X, minlength=5))
    assert torch.equal(tangent, torch.bincount(bins, DX, minlength=5))


def test_the_value_of_a_step_at_zero() -> None:
    x = torch.tensor([-1.0, 0.0, 0.0, 2.0], dtype=torch.float64)
    _, tangent = jvp(lambda v: torch.heaviside(x, v), (X,), (DX,))
    assert torch.equal(tangent, torch.where(x == 0, DX, 0.0))
    assert not jvp(lambda x: torch.heaviside(x, X), (x,), (DX,))[1].any()


@pytest.mark.parametrize("carry", BOTH)
def test_signs_and_slopes(carry: tuple[bool, bool]) -> None:
    for i, shape in enumerate([(3, 4, 2), (3, 4), (4,)]):
        check(F.prelu, (draw(i, *shape), draw(9, 4 if len(shape) > 1 else 1)), carry)
    check(lambda x, w: F.prelu(x, weight=w[0]), (draw(1, 3, 4), draw(2, 2)), carry)
    out, tangent = jvp(torch.copysign, (X, draw(3, 4)), tuple(DX if c else None for c in carry))  # type: ignore[arg-type]
    assert relative_error(tangent, DX * out / X * carry[0]) < 1e-15


def test_variances_of_complex_numbers_keep_their_correction() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.var(torch.view_as_complex(x), 0, False)

    check(fn, (draw(1, 5, 3, 2),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_glu_of_half_precision(dtype: torch.dtype) -> None:
    x, dx = draw(1, 3, 8), draw(2, 3, 8)
    _, tangent = jvp(F.glu, (x.to(dtype),), (dx.to(dtype),))
    assert tangent.dtype == dtype
    assert relative_error(tangent.double(), reference(F.glu, (x,), (dx,))) < 2e-2


def test_lists_and_separate_arguments() -> None:
    for fn in (torch.meshgrid, torch.broadcast_tensors, torch.block_diag, torch.atleast_2d):
        check(lambda a, b: fn(a, b), (draw(1, 3), draw(2, 3)))  # noqa: B023
    check(lambda a, b: torch.meshgrid([a, b], indexing="xy"), (draw(1, 3), draw(2, 2)))
    check(lambda a, b: torch.atleast_3d([a, b]), (draw(1, 3), draw(2, 2)), (True, False))


def test_fallbacks_that_once_ended_the_process_or_were_wrong() -> None:
    check(lambda x: torch.ldexp(x, draw(2, 3, 4)), (draw(1, 3, 4),))
    check(lambda x: torch.view_as_real(torch.linalg.pinv(torch.view_as_complex(x))), (draw(1, 3, 2, 2),))
    check(lambda x, y: torch.ldexp(x, y), (draw(1), draw(2)))


def test_tangents_of_other_strides() -> None:
    """A kernel may want certain strides of its input, which the primal has and the tangent need not have."""
    flat = draw(1, 6)
    check(lambda x: torch.view_as_complex(x.expand(3, 2) * flat.view(3, 2)).abs(), (draw(2, 1, 2),))
    check(lambda x: (x + flat.view(2, 3)).view_as(flat), (draw(5, 1, 3),))


def test_normalization_of_an_empty_batch() -> None:
    x = torch.zeros(0, 3, 2, 2)
    out, tangent = jvp(torch.nn.BatchNorm2d(3), (x,), (x.clone(),))
    assert out.shape == tangent.shape == x.shape


@pytest.mark.parametrize("fn", [torch.remainder, torch.fmod])
def test_the_quotient_of_a_remainder_is_that_of_the_remainder(fn: Callable[..., Any]) -> None:
    """1 / 0.1 rounds to 10, and the remainder is that of nine times."""
    a, b = torch.ones(1), torch.full((1,), 0.1)
    out, tangent = jvp(fn, (a, b), (torch.zeros(1), torch.ones(1)))
    assert torch.allclose(out, a - 9 * b)
    assert torch.equal(tangent, torch.tensor([-9.0]))
    b = draw(1, 3, 4, low=0.3)
    assert torch.equal(jvp(lambda b: 2.5 % b, (b,), (b,))[1], -torch.floor(2.5 / b) * b)


OPERATORS: dict[str, Callable[..., Any]] = {
    "topk": lambda x: torch.ops.aten.topk.default(x, 1)[0],
    "kthvalue": lambda x: torch.ops.aten.kthvalue.default(x, 1)[0],
    "elu": lambda x: torch.ops.aten.elu.default(x, 0.5, 2.0, 3.0),
    "elu of torch._C._nn": lambda x: torch._C._nn.elu(x, 1.0, 2.0),
    "rsub": lambda x: torch.ops.aten.rsub.Scalar(x, 1.0, 2.0),
    "einsum": lambda x: torch.ops.aten.einsum("abc,abd->cd", [x, x.sin()]),
    "var": lambda x: torch.ops.aten.var.dim(x, [0], False),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_with_arguments_of_their_own(name: str) -> None:
    check(OPERATORS[name], (draw(1, 4, 5, 4),))


NAMED: dict[str, Callable[..., Any]] = {
    "pow": lambda x, y: torch.pow(x.abs(), exponent=y),
    "complex": lambda x, y: torch.view_as_real(torch.complex(real=x, imag=y)),
    "addcmul": lambda x, y: torch.addcmul(x, tensor1=x, tensor2=y),
    "addcdiv": lambda x, y: torch.addcdiv(input=x, tensor1=x, tensor2=y.exp(), value=2),
    "addmm": lambda x, y: torch.addmm(x, mat2=x, mat1=y, beta=2),
    "dropout": lambda x, y: torch.dropout(x, 1.0, train=False) + torch.dropout(y, p=1.0, train=True),
    "softmax": lambda x, y: torch.softmax(x, axis=0) + y.log_softmax(axis=0),
    "extremes": lambda x, y: x.max(axis=0, keepdims=True)[0] + y.amax(axis=0),
    "order": lambda x, y: torch.sort(x, axis=0)[0] + y.cummax(axis=0)[0] + x.topk(1, axis=0)[0],
    "NumPy's integers": lambda x, y: x.sort(np.int64(0))[0] + y.topk(np.int64(1), np.int64(0))[0] + x.max(np.int64(0))[0],
    "variance": lambda x, y: x.var(axis=0) + torch.linalg.vector_norm(y, axis=0, keepdims=True),
    "linear": lambda x, y: torch.cat([x.mean(axis=0, keepdims=True), y.flip(0).cumsum(axis=0)], axis=0).logsumexp(axis=0),
    "without a rule": lambda x, y: x.prod(axis=0) + y.cumprod(axis=0),
}


@pytest.mark.parametrize("name", NAMED)
def test_arguments_by_name(name: str) -> None:
    check(NAMED[name], (draw(1, 4, 4), draw(2, 4, 4)))
