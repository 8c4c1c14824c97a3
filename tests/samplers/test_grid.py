import math

import pytest
import torch

from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.samplers import sigma_grid

PROCESS = TrigFlow(sigma_data=0.5, sigma_min=0.002, sigma_max=80.0)


@pytest.mark.parametrize("steps", [1, 2, 18, 63])
def test_grid_runs_from_t_max_down_to_zero(steps: int) -> None:
    times = sigma_grid(PROCESS, steps)
    assert (times.shape, times.dtype) == ((steps + 1,), torch.float64)
    assert times[0].item() == pytest.approx(PROCESS.t_max, abs=1e-12)
    assert times[-1] == 0
    assert bool((times.diff() < 0).all())


def test_grid_is_even_in_the_seventh_root_of_sigma() -> None:
    roots = PROCESS.sigma_from_time(sigma_grid(PROCESS, 10)[:-1]) ** (1 / 7)
    spacing = roots.diff()
    torch.testing.assert_close(spacing, spacing.mean().expand(9), rtol=1e-9, atol=0)
    assert (roots[-1] ** 7).item() == pytest.approx(0.002, rel=1e-9)


def test_rho_one_is_even_in_sigma() -> None:
    sigmas = PROCESS.sigma_from_time(sigma_grid(PROCESS, 5, rho=1.0)[:-1])
    torch.testing.assert_close(sigmas, torch.linspace(80, 0.002, 5, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("steps", [0, -3])
def test_grid_needs_a_step(steps: int) -> None:
    with pytest.raises(UserError, match=r"grid of .* steps; expected at least 1; raise steps"):
        sigma_grid(PROCESS, steps)


@pytest.mark.parametrize("rho", [0.0, -7.0, math.nan, math.inf])
def test_grid_needs_a_positive_rho(rho: float) -> None:
    with pytest.raises(UserError, match=r"rho=.*; expected a finite number > 0; .+"):
        sigma_grid(PROCESS, 4, rho)
