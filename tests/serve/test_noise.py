"""The walk through noise: a torus of unit variance without a seam."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.helpers import student
from trigflow.serve.noise import NoiseSource, walk_weights

angle = st.floats(-1e3, 1e3)


@given(a=angle, b=angle)
@settings(deadline=None, derandomize=True)
def test_unit_variance_everywhere(a: float, b: float) -> None:
    assert sum(w**2 for w in walk_weights((a, b))) == pytest.approx(1, abs=1e-12)


@given(a=angle, b=angle, c=angle, d=angle)
@settings(deadline=None, derandomize=True)
def test_correlation_depends_on_the_differences_alone(a: float, b: float, c: float, d: float) -> None:
    here, there = walk_weights((a, b)), walk_weights((c, d))
    correlation = sum(v * w for v, w in zip(here, there, strict=True))
    assert correlation == pytest.approx((math.cos(a - c) + math.cos(b - d)) / 2, abs=1e-11)


def test_formula_of_the_torus() -> None:
    source = NoiseSource(student())
    a, b = 0.7, -2.1
    p, q, r, s = (
        (source.start(5, walk, 0, 3).double())
        for walk in ((0.0, 0.0), (0.0, math.pi), (math.pi / 2, math.pi / 2), (math.pi / 2, -math.pi / 2))
    )
    # At (0, 0) p, at (0, pi) q, and at (pi/2, +-pi/2) (r +- s) / sqrt 2.
    z1, z3 = (p + q) / math.sqrt(2), (p - q) / math.sqrt(2)
    z2, z4 = (r + s) / math.sqrt(2), (r - s) / math.sqrt(2)
    expected = (math.cos(a) * z1 + math.sin(a) * z2 + math.cos(b) * z3 + math.sin(b) * z4) / math.sqrt(2)
    torch.testing.assert_close(source.start(5, (a, b), 0, 3).double(), expected, rtol=0, atol=1e-6)


def test_begins_at_the_noise_of_the_seed_bit_for_bit() -> None:
    model = student()
    assert torch.equal(NoiseSource(model).start(7, (0.0, 0.0), 60, 70), model.noise(7, 0, 60, 70))


def test_period_and_variance_of_a_picture() -> None:
    source = NoiseSource(student())
    here = source.start(1, (0.4, 1.3), 0, 64)
    around = source.start(1, (0.4 + 2 * math.pi, 1.3 - 4 * math.pi), 0, 64)
    torch.testing.assert_close(here, around, rtol=0, atol=1e-5)
    assert here.std().item() == pytest.approx(0.5, rel=0.05)
    assert not torch.allclose(here, source.start(2, (0.4, 1.3), 0, 64))


def test_noises_kept_are_bounded_and_equal() -> None:
    model = student()
    small, large = NoiseSource(model, kept=8192), NoiseSource(model)
    for seed in (0, 1, 0, 2, 0):
        assert torch.equal(small.start(seed, (0.3, 0.9), 0, 2), large.start(seed, (0.3, 0.9), 0, 2))
    assert len(small._drawn.values) == 2
    assert len(large._drawn.values) == 12


def test_a_walk_changes_nothing_that_is_kept() -> None:
    source = NoiseSource(student())
    before = source.fresh(0, 0, 0, 2).clone()
    source.start(0, (0.5, 0.5), 0, 2)
    assert torch.equal(source.fresh(0, 0, 0, 2), before)
