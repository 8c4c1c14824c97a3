"""Norms of any order, distances, and functions of complex numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tangent.helpers import check, draw, no_fallback, reference, relative_error
from trigflow.tangent import jvp

ORDERS = [0, 0.5, 1, 2, 3, 3.5, -1, math.inf, -math.inf]


@settings(max_examples=50, derandomize=True, deadline=None)
@given(
    order=st.sampled_from(ORDERS),
    dim=st.sampled_from([None, 0, -1, (0, 2), (1,), (0, 1, 2)]),
    keep=st.booleans(),
    axes=st.permutations([0, 1, 2]),
    seed=st.integers(0, 1000),
)
def test_norms(order: float, dim: Any, keep: bool, axes: list[int], seed: int) -> None:
    x = draw(seed, 3, 4, 2).permute(*axes)
    # PyTorch gives a norm of order zero no derivative at all; it is constant wherever it has one.
    zeros = torch.zeros_like(torch.linalg.vector_norm(x, 0, dim, keep)) if order == 0 else None
    check(lambda x: torch.linalg.vector_norm(x, order, dim, keep), (x,), expected=zeros)
    no_fallback(lambda x: torch.linalg.vector_norm(x, order, dim, keep), x)
    no_fallback(lambda x: torch.norm(x, 3.0, 1), x)


def test_norms_of_complex_numbers() -> None:
    def fn(x: Tensor, order: float) -> Tensor:
        return torch.linalg.vector_norm(torch.view_as_complex(x), order, dim=1)

    for order in (1, 2, 3.5, math.inf):
        check(lambda x: fn(x, order), (draw(1, 3, 4, 2),))  # noqa: B023


def euclidean(a: Tensor, b: Tensor, p: float) -> Tensor:
    """What cdist computes, in functions that have a forward derivative."""
    gap = (a.unsqueeze(-2) - b.unsqueeze(-3)).abs()
    return gap.amax(-1) if math.isinf(p) else gap.pow(p).sum(-1).pow(1 / p)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    p=st.sampled_from([0.7, 1.0, 2.0, 3.5, math.inf]),
    mode=st.sampled_from(["use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"]),
    rows=st.integers(1, 4),
    carry=st.sampled_from([(True, True), (True, False), (False, True)]),
    strided=st.booleans(),
)
def test_distances(p: float, mode: str, rows: int, carry: tuple[bool, bool], strided: bool) -> None:
    a, b = draw(1, 2, rows, 3), draw(2, 2, 5, 3)
    if strided:
        a, b = draw(1, 2, 3, rows).mT, draw(2, 1, 5, 6)[..., ::2]
    tangents = tuple(draw(31 + i, *x.shape) if c else None for i, (x, c) in enumerate(zip((a, b), carry, strict=True)))
    expected = reference(lambda a, b: euclidean(a, b, p), (a, b), tangents)
    check(lambda a, b: torch.cdist(a, b, p, mode), (a, b), carry, expected=expected)
    no_fallback(lambda a, b: torch.cdist(a, b, p), a, b)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, math.inf])
def test_distances_within_one_matrix(p: float) -> None:
    x, (i, j) = draw(1, 5, 3), torch.triu_indices(5, 5, 1)
    expected = reference(lambda x: euclidean(x, x, p)[i, j], (x,), (draw(31, 5, 3),))
    check(lambda x: F.pdist(x, p), (x,), expected=expected)


def test_equal_points_have_a_distance_of_tangent_zero() -> None:
    x = draw(1, 3, 2)
    _, tangent = jvp(lambda x: torch.cdist(x, x), (x,), (draw(2, 3, 2),))
    assert not tangent.diagonal().any()
    assert tangent.isfinite().all()


def rotary(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary embedding in complex numbers."""
    turned = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2)


PAIRS: dict[str, Callable[[Any, Any], Any]] = {
    "rotary": rotary,
    "polar": lambda x, a: torch.view_as_real(torch.polar(x[:, :2].abs(), a)),
    "complex": lambda x, a: torch.view_as_real(torch.complex(x[:, :2], a) * torch.complex(a, x[:, 2:]).conj()),
    "quotient": lambda x, a: (torch.complex(x[:, :2], a) / torch.complex(a, x[:, 2:])).abs(),
    "angle": lambda x, a: torch.complex(x[:, :2], a).angle(),
    "real and imaginary": lambda x, a: torch.complex(x[:, :2], a).real * torch.complex(x[:, 2:], a).imag,
    "sgn": lambda x, a: torch.view_as_real(torch.complex(x[:, :2], a).sgn()),
    "power": lambda x, a: torch.view_as_real(torch.complex(x[:, :2], a) ** torch.complex(a, x[:, 2:])),
    "square": lambda x, a: torch.view_as_real(torch.complex(x[:, :2], a) ** 2),
    "matmul": lambda x, a: torch.view_as_real(torch.complex(x[:, :2], a) @ torch.complex(a, x[:, 2:]).mH),
}


@pytest.mark.parametrize("carry", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", PAIRS)
def test_complex_numbers(name: str, carry: tuple[bool, bool]) -> None:
    check(PAIRS[name], (draw(1, 3, 4), draw(2, 3, 2)), carry)
    check(PAIRS[name], (draw(1, 4, 3).mT, draw(2, 3, 4)[:, ::2]), carry)


HOLOMORPHIC = "exp log sin cos sinh cosh sqrt square reciprocal tanh sigmoid asin atan log1p rsqrt".split()


@pytest.mark.parametrize("name", HOLOMORPHIC)
def test_elementwise_functions_of_complex_numbers(name: str) -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.view_as_real(getattr(torch, name)(torch.view_as_complex(x)))

    check(fn, (draw(3, 4, 3, 2),))


def test_silu_of_complex_numbers_is_right_where_pytorch_is_not() -> None:
    z, dz = torch.view_as_complex(draw(1, 5, 2)), torch.view_as_complex(draw(2, 5, 2))
    expected = reference(lambda z: z * torch.sigmoid(z), (z,), (dz,))
    _, tangent = jvp(F.silu, (z,), (dz,))
    assert relative_error(torch.view_as_real(tangent), torch.view_as_real(expected)) < 1e-14


TRANSFORMS = "fft ifft rfft ihfft fft2 ifft2 rfft2 fftn ifftn rfftn ihfftn fftshift ifftshift".split()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_fourier_transforms(name: str) -> None:
    def fn(x: Tensor) -> Tensor:
        y = getattr(torch.fft, name)(x).resolve_conj()
        return torch.view_as_real(y) if y.is_complex() else y

    check(fn, (draw(1, 3, 4, 5),))
    check(fn, (draw(1, 3, 5, 4).mT,))
    no_fallback(fn, draw(1, 3, 4, 5))


@pytest.mark.parametrize("name", ["irfft", "hfft", "irfft2", "irfftn", "hfftn"])
def test_fourier_transforms_to_real_numbers(name: str) -> None:
    check(lambda x: getattr(torch.fft, name)(torch.view_as_complex(x)), (draw(1, 3, 4, 5, 2),))


def test_a_convolution_by_fourier_transforms() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x, n=12) * torch.fft.rfft(w, n=12), n=12)[..., :8]

    for carry in [(True, True), (True, False), (False, True)]:
        check(fn, (draw(1, 2, 8), draw(2, 2, 5)), carry)
