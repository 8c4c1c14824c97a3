"""Averaged weights against the explicit weighted averages that they stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trigflow.runtime.errors import UserError
from trigflow.training.config import EMAConfig
from trigflow.training.ema import EMA, ema_decay, power_exponent


class Point(nn.Module):
    """A parameter, a float buffer and an integer buffer."""

    value: Tensor
    count: Tensor

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([start], dtype=torch.float64))
        self.register_buffer("value", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def relative_width(gamma: float) -> float:
    """Standard deviation of the density `(gamma + 1) tau^gamma` on [0, 1]."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


@given(st.floats(0.01, 0.279))
@settings(max_examples=200, deadline=None)
def test_power_exponent_inverts_the_relative_width(sigma_rel: float) -> None:
    gamma = power_exponent(sigma_rel)
    assert gamma >= 0
    assert relative_width(gamma) == pytest.approx(sigma_rel, rel=1e-9)


def test_power_exponents_printed_in_the_paper() -> None:
    assert power_exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert power_exponent(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.28, 1.0, math.nan])
def test_widths_that_no_exponent_has(sigma_rel: float) -> None:
    with pytest.raises(UserError, match="relative EMA width"):
        power_exponent(sigma_rel)


def average_of(config: EMAConfig, sequence: list[float], batch_size: int = 1, start: float = -77.0) -> float:
    source = Point(start)
    ema = EMA(config, source)
    for i, value in enumerate(sequence, start=1):
        with torch.no_grad():
            source.weight.fill_(value)
        ema.update(source, i, batch_size)
    return float(ema.network.weight)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_power_average_is_the_telescoped_product(sigma_rel: float) -> None:
    """The weight of step k after n steps is exactly `(k/n)^(gamma+1) - ((k-1)/n)^(gamma+1)`."""
    sequence = [math.sin(3 * k) + 0.1 * k for k in range(1, 41)]
    n, power = len(sequence), power_exponent(sigma_rel) + 1
    expected = sum(((k / n) ** power - ((k - 1) / n) ** power) * value for k, value in enumerate(sequence, start=1))
    assert average_of(EMAConfig("power", sigma_rel=sigma_rel), sequence) == pytest.approx(expected, rel=1e-12)


def test_power_average_after_many_steps_has_the_power_profile() -> None:
    """Weights `~ tau^gamma`, whose relative width is sigma_rel again."""
    n, sigma_rel = 4000, 0.1
    gamma = power_exponent(sigma_rel)
    taus = torch.arange(1, n + 1, dtype=torch.float64)
    profile = taus**gamma / (taus**gamma).sum()
    mean, square = float((profile * taus).sum()), float((profile * taus**2).sum())
    config = EMAConfig("power", sigma_rel=sigma_rel)
    averaged_mean = average_of(config, taus.tolist())
    averaged_square = average_of(config, (taus**2).tolist())
    assert averaged_mean == pytest.approx(mean, rel=1e-3)
    assert math.sqrt(averaged_square - averaged_mean**2) == pytest.approx(math.sqrt(square - mean**2), rel=1e-2)
    assert math.sqrt(averaged_square - averaged_mean**2) / n == pytest.approx(sigma_rel, rel=1e-2)


def test_the_weights_before_training_leave_the_power_average_at_once() -> None:
    assert average_of(EMAConfig("power"), [5.0], start=1e9) == 5.0


@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_halflife_halves_the_weight_of_the_past(batch_size: int) -> None:
    halflife_images = 400
    config = EMAConfig("halflife", halflife_mimg=halflife_images / 1e6, rampup=0.0)
    steps = halflife_images // batch_size
    assert average_of(config, [0.0] * steps, batch_size, start=1.0) == pytest.approx(0.5)
    assert average_of(config, [0.0] * 3 * steps, batch_size, start=1.0) == pytest.approx(0.125)


def test_rampup_bounds_the_halflife_by_a_share_of_the_images_seen() -> None:
    config = EMAConfig("halflife", halflife_mimg=0.5, rampup=0.05)
    # 1000 images seen in batches of 10: half-life 50 images.
    assert ema_decay(config, 100, 10) == pytest.approx(2 ** (-10 / 50))
    # Ten million images seen: the half-life of half a million sets in.
    assert ema_decay(config, 1_000_000, 10) == pytest.approx(2 ** (-10 / 500_000))


def test_no_average_is_a_copy() -> None:
    assert average_of(EMAConfig("none"), [1.5, -2.25]) == -2.25


@pytest.mark.parametrize("kind", ["power", "halflife", "none"])
def test_buffers_are_copied_not_averaged(kind: Any) -> None:
    source = Point()
    ema = EMA(EMAConfig(kind), source)
    source.value.copy_(torch.tensor([1.0, 2.0]))
    source.count.fill_(7)
    ema.update(source, 5, 8)
    assert ema.network.value.tolist() == [1.0, 2.0]
    assert ema.network.count.item() == 7


def test_the_average_is_a_frozen_copy_in_eval_mode() -> None:
    source = Point(1.0).train()
    ema = EMA(EMAConfig(), source)
    assert not ema.network.training
    assert not ema.network.weight.requires_grad
    assert source.training
    assert source.weight.requires_grad
    with torch.no_grad():
        source.weight.fill_(9.0)
    assert ema.network.weight.item() == 1.0


def test_unknown_kind() -> None:
    with pytest.raises(UserError, match="unknown average 'swa'; expected power, halflife or none"):
        ema_decay(EMAConfig("swa"), 1, 1)  # type: ignore[arg-type]
