"""Adaptive weighting and the means under every loss."""

from __future__ import annotations

import math

import pytest
import torch

from objectives.helpers import PROCESS, generator
from trigflow.objectives import AdaptiveWeight
from trigflow.objectives.objective import as_figures, per_sample_mean_square, weighted_mean
from trigflow.process import HALF_PI, TrigFlow

TIMES = torch.tensor([0.05, 0.4, 1.0, 1.5])


def test_weight_is_zero_at_the_start_and_the_same_in_every_run() -> None:
    one = AdaptiveWeight(PROCESS)
    assert torch.equal(one(TIMES), torch.zeros(4))
    two = AdaptiveWeight(PROCESS)
    with torch.no_grad():
        for weight in (one, two):
            weight.linear.weight.copy_(torch.linspace(-1, 1, 64)[None])
    assert torch.equal(one(TIMES), two(TIMES))
    assert one(TIMES).std() > 0.1


def test_weight_is_a_linear_layer_on_features_of_the_log_noise_level() -> None:
    weight = AdaptiveWeight(TrigFlow(sigma_data=1.3), features=7).double()
    with torch.no_grad():
        weight.linear.weight.normal_(generator=generator())
        weight.linear.bias.fill_(0.3)
    t = TIMES.double()
    for value, time in zip(weight(t).tolist(), t.tolist(), strict=True):
        c_noise = math.log(1.3 * math.tan(time)) / 4
        total = 0.3
        for k, (f, p) in enumerate(zip(weight.frequencies.tolist(), weight.phases.tolist(), strict=True)):
            total += weight.linear.weight[0, k].item() * math.sqrt(2) * math.cos(2 * math.pi * (f * c_noise + p))
        assert value == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_is_float32_under_autocast(dtype: torch.dtype) -> None:
    weight = AdaptiveWeight(PROCESS)
    with torch.no_grad():
        weight.linear.weight.normal_(generator=generator())
    with torch.autocast("cpu", dtype):
        inside = weight(TIMES)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, weight(TIMES))


def test_weight_is_finite_close_to_both_ends() -> None:
    weight = AdaptiveWeight(PROCESS)
    with torch.no_grad():
        weight.linear.weight.normal_(generator=generator())
    assert torch.isfinite(weight(torch.tensor([1e-6, 1e-4, HALF_PI - 1e-4, HALF_PI - 1e-6]))).all()


def test_best_weight_is_minus_the_log_error() -> None:
    """Minimizing `exp(w) e - w` over the linear layer, an error for each of four times."""
    weight, error = AdaptiveWeight(PROCESS).double(), torch.tensor([0.01, 0.3, 2.0, 40.0], dtype=torch.float64)
    t = TIMES.double()
    optimizer = torch.optim.LBFGS(weight.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weighted_mean(error, t, weight)
        loss.backward()
        return loss

    before = closure().item()
    optimizer.step(closure)
    torch.testing.assert_close(weight(t), -error.log(), atol=1e-3, rtol=0)
    after = closure().item()
    assert after == pytest.approx(float((1 + error.log()).mean()), abs=1e-6)
    assert after < before
    assert all(p.grad.abs().max() < 1e-3 for p in weight.parameters())


def test_at_the_best_weight_every_time_counts_the_same() -> None:
    error = torch.tensor([0.01, 0.3, 2.0, 40.0], requires_grad=True)
    value = weighted_mean(error, TIMES, lambda t: -error.detach().log())
    value.backward()
    torch.testing.assert_close(error.grad * error.detach(), torch.full((4,), 0.25))


def test_weighted_mean_formula() -> None:
    error, w = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, -1.0, 0.5, 2.0])
    expected = sum(math.exp(b) * a - b for a, b in zip(error.tolist(), w.tolist(), strict=True)) / 4
    assert weighted_mean(error, TIMES, lambda t: w).item() == pytest.approx(expected, rel=1e-6)
    assert weighted_mean(error, TIMES, None).item() == 2.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_mean_square_is_computed_in_float32_or_higher(dtype: torch.dtype) -> None:
    x = torch.full((2, 3, 4, 5), 300.0, dtype=dtype)  # 300^2 is beyond float16
    x[1] = 2
    mean = per_sample_mean_square(x)
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert mean.tolist() == [90_000.0, 4.0]


def test_figures_are_detached_float32() -> None:
    figures = as_figures(a=torch.ones(2, dtype=torch.float64, requires_grad=True), b=torch.ones(2, dtype=torch.bfloat16))
    assert list(figures) == ["a", "b"]
    assert all(f.dtype == torch.float32 and not f.requires_grad for f in figures.values())
