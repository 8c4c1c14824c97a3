"""Each magnitude-preserving layer: its formula, and that it does what its name says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from networks.helpers import draw
from trigflow.networks.magnitude import EPS, MPConv, MPFourier, MPPositional, mp_cat, mp_silu, mp_sum, unit_magnitude


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def conv(*shape: Any, seed: int = 0) -> MPConv:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MPConv(*shape)


# Functions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, (1,), (2, 3), -1])
def test_unit_magnitude_formula(dim: Any) -> None:
    x = 3.7 * draw(1, 2, 5, 4, 3, dtype=torch.float64)
    expected = x / (x.square().mean(dim, keepdim=True).sqrt() + 1e-4)
    torch.testing.assert_close(unit_magnitude(x, dim), expected, rtol=1e-12, atol=0)


def test_unit_magnitude_gives_every_pixel_unit_magnitude() -> None:
    y = unit_magnitude(50 * draw(2, 3, 16, 4, 4))
    torch.testing.assert_close(y.square().mean(1).sqrt(), torch.ones(3, 4, 4), rtol=1e-4, atol=0)


def test_unit_magnitude_of_nothing_is_nothing() -> None:
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    y = unit_magnitude(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.isfinite(x.grad).all()


def test_magnitudes_beyond_half_precision() -> None:
    """The length of this vector, 192000, is no float16 number; its magnitude and the result are."""
    y = unit_magnitude(torch.full((1, 4096), 3000.0, dtype=torch.float16))
    assert y.dtype == torch.float16
    assert torch.equal(y, torch.ones_like(y))


def test_silu_keeps_the_magnitude_of_normal_numbers() -> None:
    x = draw(3, 100_000)
    torch.testing.assert_close(mp_silu(x), x * torch.sigmoid(x) / 0.596)
    assert rms(mp_silu(x)) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_sum(t: float) -> None:
    a, b = draw(4, 50_000), draw(5, 50_000)
    y = mp_sum(a, b, t)
    torch.testing.assert_close(y, ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2))
    assert rms(y) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("t", [0.3, 0.5])
def test_cat_keeps_the_magnitude_and_weighs_both_parts(t: float) -> None:
    """In total, part a contributes energy as (1 - t)^2 and part b as t^2, however many channels each has."""
    a, b = draw(6, 40, 12, 8, 8), draw(7, 40, 36, 8, 8)
    y = mp_cat(a, b, t)
    assert y.shape == (40, 48, 8, 8)
    assert rms(y) == pytest.approx(1, abs=0.02)
    energy = y.square().sum((0, 2, 3))
    assert float(energy[:12].sum() / energy[12:].sum()) == pytest.approx((1 - t) ** 2 / t**2, rel=0.03)
    torch.testing.assert_close(y[:, :12] / a, torch.full_like(a, float(y[0, 0, 0, 0] / a[0, 0, 0, 0])), rtol=1e-4, atol=0)


# Embeddings ----------------------------------------------------------------------------------------------------------


def test_fourier_features() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = MPFourier(20_000, 0.5)
    assert list(features.state_dict()) == ["freqs", "phases"]
    assert rms(features.freqs) == pytest.approx(2 * math.pi * 0.5, rel=0.02)
    assert 0 <= float(features.phases.min()) < 0.01 < 6.2 < float(features.phases.max()) < 2 * math.pi
    x = torch.tensor([-1.3, 0.0, 0.4])
    y = features(x)
    torch.testing.assert_close(y, math.sqrt(2) * torch.cos(torch.outer(x, features.freqs) + features.phases))
    torch.testing.assert_close(y.square().mean(1), torch.ones(3), rtol=0, atol=0.03)


def test_positional_features_have_exactly_unit_magnitude() -> None:
    y = MPPositional(10)(torch.tensor([0.0, 0.7, 1.5]))
    assert y.shape == (3, 10)
    torch.testing.assert_close(y.square().mean(1), torch.ones(3))
    assert float(y[1, 0]) == pytest.approx(math.sqrt(2) * math.cos(0.7))


# The layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_layer_formula(kernel: int | None) -> None:
    """Filters `w / (rms(w) + eps) / sqrt(fan in)`, times the gain."""
    layer = conv(6, 4, kernel).double()
    with torch.no_grad():
        layer.weight.mul_(draw(8, 4, dtype=torch.float64).exp().reshape(-1, *[1] * (layer.weight.ndim - 1)))
    x = draw(9, 3, 6, *((5, 4) if kernel else ()), dtype=torch.float64)
    w = layer.weight.flatten(1)
    w = w / (w.square().mean(1, keepdim=True).sqrt() + EPS) / math.sqrt(w.shape[1])
    if kernel is None:
        expected = x @ w.T
    else:
        patches = F.unfold(x, kernel, padding=kernel // 2)
        expected = (w @ patches).reshape(3, 4, 5, 4)
    torch.testing.assert_close(layer(x, gain=torch.tensor(1.7, dtype=torch.float64)), 1.7 * expected)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_layer_keeps_the_magnitude_whatever_its_weights(kernel: int | None) -> None:
    layer = conv(64, 64, kernel)
    x = draw(10, 16, 64, *((16, 16) if kernel else ()))
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(30)
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1)) if kernel else ()
    assert rms(layer(x)[inside]) == pytest.approx(1, abs=0.07)
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel", [None, 3])
def test_gradients_are_orthogonal_to_the_filters(kernel: int | None) -> None:
    layer = conv(8, 5, kernel)
    out = layer(draw(11, 4, 8, *((6, 6) if kernel else ())))
    (out * draw(12, *out.shape)).sum().backward()
    w, g = layer.weight.detach().flatten(1), layer.weight.grad.flatten(1)
    cosine = (w * g).sum(1) / w.norm(dim=1) / g.norm(dim=1)
    assert g.norm(dim=1).min() > 0.1
    assert cosine.abs().max() < 1e-3


@pytest.mark.parametrize("kernel", [None, 3])
def test_normalizing_the_weight(kernel: int | None) -> None:
    """Every filter gets unit magnitude; the layer stays the function it is; a second time changes nothing."""
    layer = conv(8, 5, kernel)
    with torch.no_grad():
        layer.weight.mul_(3)
    x = draw(13, 4, 8, *((6, 6) if kernel else ()))
    before, parameter = layer(x), layer.weight
    w = parameter.detach().flatten(1)
    expected = w / (w.square().mean(1, keepdim=True).sqrt() + EPS)
    layer.normalize_weight()
    torch.testing.assert_close(parameter.detach().flatten(1), expected)
    assert layer.weight is parameter
    assert parameter.requires_grad
    assert parameter.grad_fn is None
    torch.testing.assert_close(parameter.flatten(1).square().mean(1).sqrt(), torch.ones(5), rtol=2e-4, atol=0)
    torch.testing.assert_close(layer(x), before, rtol=2e-4, atol=2e-4)
    once, after = parameter.detach().clone(), layer(x)
    layer.normalize_weight()
    torch.testing.assert_close(parameter.detach(), once, rtol=2e-4, atol=0)
    torch.testing.assert_close(layer(x), after, rtol=1e-6, atol=1e-6)


def test_normalizing_does_not_change_the_gradient_direction() -> None:
    """A step taken from filters three times as long turns them a third as far: that is what normalizing prevents."""
    layer, x = conv(8, 5), draw(14, 16, 8)
    gradients = []
    for factor in (1.0, 3.0):
        with torch.no_grad():
            layer.weight.mul_(factor)
        layer.zero_grad()
        (layer(x) * draw(15, 16, 5)).sum().backward()
        gradients.append(layer.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0] / 3, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_and_weights(dtype: torch.dtype) -> None:
    layer, x = conv(32, 16), draw(16, 8, 32)
    exact = layer(x)
    out = layer(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.05)
    out = layer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.05)
