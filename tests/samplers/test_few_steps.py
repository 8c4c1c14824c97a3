"""DPM-Solver++(2M) with few evaluations, against its published formulas in noise-free scalars."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from oracles.gaussian import GaussianOracle
from trigflow.process import TrigFlow
from trigflow.samplers import SOLVERS, nfe, sigma_grid

PROCESS = TrigFlow()
VARIANCES = [0.02, 0.1, 0.25, 1.0, 2.0]
GAUSSIAN = GaussianOracle(torch.tensor(VARIANCES, dtype=torch.float64))
FEW = [2, 4, 8]


def published(variance: float, x: float, times: list[float], highest: int = 2) -> float:
    """Algorithm 2 of Lu et al. 2022 for one Gaussian coordinate: alpha = cos t, sigma = sin t in units of sd, the data
    prediction D in closed form, `h_i = lambda_i - lambda_(i-1)` and `r_i = h_(i-1) / h_i`::

        D_i = (1 + 1 / (2 r_i)) D(x_(i-1)) - 1 / (2 r_i) D(x_(i-2)),      D(x_0) in the first step and in the last
        x_i = sigma_i / sigma_(i-1) x_(i-1) - alpha_i (exp(-h_i) - 1) D_i
    """

    def predict(x: float, t: float) -> float:
        return math.cos(t) * variance * x / (math.cos(t) ** 2 * variance + math.sin(t) ** 2 * 0.25)

    lambdas = [math.log(math.cos(t) / math.sin(t)) for t in times[:-1]]
    predictions: list[float] = []
    for i in range(1, len(times)):
        predictions.append(predict(x, times[i - 1]))
        mixed = predictions[-1]
        if times[i] == 0:
            x = mixed  # h is infinite
            break
        h = lambdas[i] - lambdas[i - 1]
        if i >= 2 and highest == 2:
            r = (lambdas[i - 1] - lambdas[i - 2]) / h
            mixed = (1 + 1 / (2 * r)) * predictions[-1] - predictions[-2] / (2 * r)
        x = math.sin(times[i]) / math.sin(times[i - 1]) * x - math.cos(times[i]) * (math.exp(-h) - 1) * mixed
    return x


def gains(solver: str, steps: int) -> Tensor:
    """Result per unit of noise in each coordinate; the velocity is linear, so that this is all there is."""
    return SOLVERS[solver](GAUSSIAN.velocity, torch.ones(1, 5, dtype=torch.float64), sigma_grid(PROCESS, steps))[0]


@pytest.mark.parametrize("steps", FEW)
def test_few_steps_are_those_of_the_published_algorithm(steps: int) -> None:
    """With a first step and a last of first order, and all others of second."""
    times = sigma_grid(PROCESS, steps).tolist()
    expected = torch.tensor([published(variance, 1.0, times) for variance in VARIANCES], dtype=torch.float64)
    torch.testing.assert_close(gains("dpm++2m", steps), expected, rtol=1e-9, atol=1e-12)
    first_order = torch.tensor([published(variance, 1.0, times, 1) for variance in VARIANCES], dtype=torch.float64)
    torch.testing.assert_close(gains("ddim", steps), first_order, rtol=1e-9, atol=1e-12)
    same = torch.allclose(expected, first_order, rtol=1e-6, atol=0)
    assert same == (steps == 2)  # a first step and a last are all there are


@pytest.mark.parametrize("steps", FEW)
def test_an_evaluation_a_step(steps: int) -> None:
    seen: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        return GAUSSIAN.velocity(x, t)

    SOLVERS["dpm++2m"](velocity, torch.ones(2, 5, dtype=torch.float64), sigma_grid(PROCESS, steps))
    assert len(seen) == nfe("dpm++2m", steps) == steps
    assert seen == sigma_grid(PROCESS, steps)[:-1].tolist()


def test_error_falls_with_evaluations_and_below_that_of_first_order() -> None:
    """Of the standard deviation that data have in each coordinate."""

    def error(solver: str, steps: int) -> float:
        exact = GAUSSIAN.consistency(torch.ones(1, 5, dtype=torch.float64), PROCESS.t_max)[0]
        return (gains(solver, steps) / exact - 1).abs().mean().item()

    errors = {steps: error("dpm++2m", steps) for steps in FEW}
    assert errors[2] > errors[4] > errors[8]
    assert errors[8] < 0.5 * error("ddim", 8)
