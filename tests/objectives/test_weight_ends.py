"""The adaptive weight at the ends of the quarter circle."""

from __future__ import annotations

import math

import pytest
import torch

from objectives.helpers import PROCESS
from trigflow.objectives import AdaptiveWeight


def weight(dtype: torch.dtype) -> AdaptiveWeight:
    module = AdaptiveWeight(PROCESS)
    with torch.no_grad():
        module.linear.weight.copy_(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)))
    return module.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_time_has_a_finite_weight_and_gradient(dtype: torch.dtype) -> None:
    """The float32 number nearest to pi/2 is beyond it, where the tangent is negative."""
    ends = torch.tensor([0.0, 1e-12, 1e-6, 1.0, math.pi / 2 - 1e-6, math.pi / 2, math.nextafter(math.pi / 2, 2)], dtype=dtype)
    module = weight(dtype)
    w = module(ends)
    assert bool(w.isfinite().all())
    w.sum().backward()
    assert module.linear.weight.grad is not None
    assert bool(module.linear.weight.grad.isfinite().all())


def test_other_times_are_as_before() -> None:
    t = torch.linspace(0.001, 1.569, 50, dtype=torch.float64)
    module = weight(torch.float64)
    c_noise = torch.log(0.5 * torch.tan(t)) / 4
    features = math.sqrt(2) * torch.cos(2 * math.pi * (c_noise[:, None] * module.frequencies + module.phases))
    torch.testing.assert_close(module(t), module.linear(features)[:, 0], rtol=1e-12, atol=1e-12)


def test_the_ends_are_those_of_a_millionth() -> None:
    module = weight(torch.float64)
    near = module(torch.tensor([1e-6, math.pi / 2 - 1e-6], dtype=torch.float64))
    assert torch.equal(module(torch.tensor([0.0, math.pi / 2], dtype=torch.float64)), near)
