"""The grid of solvers, and the times of few-step sampling."""

import math
from typing import Any

import pytest
import torch

from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.samplers import consistency_times, flow_map_sample, meanflow_times, search_times, segment_times, sigma_grid

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


# Times of few-step sampling -------------------------------------------------------------------------------------------


def test_default_times() -> None:
    assert consistency_times(PROCESS, 1) == (PROCESS.t_max,)
    assert consistency_times(PROCESS, 2) == (PROCESS.t_max, 1.1)
    assert consistency_times(PROCESS, 2, t_mid=0.8) == (PROCESS.t_max, 0.8)
    assert consistency_times(PROCESS, 4, t_mid=0.9) == pytest.approx((PROCESS.t_max, 0.9, 0.6, 0.3))


def test_times_are_checked() -> None:
    with pytest.raises(UserError, match="0 sampling steps; expected at least 1"):
        consistency_times(PROCESS, 0)
    for t_mid in (0.0, PROCESS.t_max, 2.0, math.nan):
        with pytest.raises(UserError, match=r"t_mid=.*; expected a time in \(0, t_max=1.5645\); use 1.1"):
            consistency_times(PROCESS, 2, t_mid)


def test_times_are_even_on_the_straight_path() -> None:
    for steps in (1, 2, 4, 10):
        times = meanflow_times(PROCESS, steps)
        assert len(times) == steps
        assert times[0] == PROCESS.t_max
        taus = [math.sin(t) / (math.cos(t) + math.sin(t)) for t in times[1:]]
        assert taus == pytest.approx([(steps - k) / steps for k in range(1, steps)])
    assert meanflow_times(PROCESS, 2)[1] == pytest.approx(math.pi / 4)
    with pytest.raises(UserError, match="0 sampling steps; expected at least 1"):
        meanflow_times(PROCESS, 0)


def test_times_of_segments_are_their_ends_but_for_the_first() -> None:
    assert segment_times(PROCESS, 1) == (PROCESS.t_max,)
    quarters = [k * math.pi / 8 for k in (3, 2, 1)]
    assert segment_times(PROCESS, 4) == pytest.approx((PROCESS.t_max, *quarters))
    with pytest.raises(UserError, match=r"^0 segments of the quarter circle; expected at least 1; raise segments$"):
        segment_times(PROCESS, 0)
    with pytest.raises(UserError, match=r"^400 segments .*; expected it to begin below t_max = 1\.5645; use fewer"):
        segment_times(PROCESS, 400)


@pytest.mark.parametrize("value", [2.0, "2", None, True])
@pytest.mark.parametrize("times", [sigma_grid, consistency_times, meanflow_times, segment_times])
def test_steps_are_whole_numbers(times: Any, value: Any) -> None:
    with pytest.raises(UserError, match=r"^(steps|segments) is .*; expected a whole number; correct the argument"):
        times(PROCESS, value)


def test_settings_of_few_steps_are_numbers() -> None:
    for call in (
        lambda: sigma_grid(PROCESS, 4, rho=None),  # type: ignore[arg-type]
        lambda: consistency_times(PROCESS, 2, t_mid="1"),  # type: ignore[arg-type]
        lambda: search_times(lambda times: 0.0, PROCESS, 2, lower="0"),  # type: ignore[arg-type]
        lambda: flow_map_sample(lambda x, t, end: x, PROCESS, torch.zeros(2, 1), (1.0,), gamma="0"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match="; expected a number; correct the argument"):
            call()
    with pytest.raises(UserError, match=r"steps is 2.5; expected a whole number"):
        search_times(lambda times: 0.0, PROCESS, 2.5)  # type: ignore[arg-type]
