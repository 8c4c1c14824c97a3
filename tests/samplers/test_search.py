import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.samplers import search_times

PROCESS = TrigFlow()
Times = tuple[float, ...]
Score = Callable[[Times], float]


def quadratic(optimum: float, noise: float = 0.0, seed: int = 0) -> Score:
    rng = np.random.default_rng(seed)

    def score(times: Times) -> float:
        return 3 + 2 * (times[1] - optimum) ** 2 + noise * float(rng.standard_normal())

    return score


@pytest.mark.parametrize("optimum", [0.25, 0.77, 1.1, 1.49])
def test_finds_the_minimum_of_a_quadratic(optimum: float) -> None:
    result = search_times(quadratic(optimum), PROCESS, 2)
    assert result.times == (PROCESS.t_max, pytest.approx(optimum, abs=1e-6))
    assert result.score == pytest.approx(3, abs=1e-9)


def test_finds_the_minimum_of_a_skewed_curve() -> None:
    result = search_times(lambda ts: math.log(ts[1] / 1.1) ** 2 + max(0.0, ts[1] - 1.2), PROCESS, 2, evaluations=20)
    assert result.times[1] == pytest.approx(1.1, abs=0.01)


@pytest.mark.parametrize(("slope", "optimum"), [(1.0, 0.2), (-1.0, 1.5)])
def test_minimum_at_an_end_of_the_range(slope: float, optimum: float) -> None:
    assert search_times(lambda ts: slope * ts[1], PROCESS, 2).times[1] == pytest.approx(optimum)


@pytest.mark.parametrize("optimum", [0.6, 1.1])
def test_finds_the_minimum_of_a_noisy_quadratic(optimum: float) -> None:
    """Noise of 0.02 hides differences below 0.1 in t from a single comparison; the fit averages it out."""
    found = [search_times(quadratic(optimum, 0.02, seed), PROCESS, 2).times[1] for seed in range(20)]
    errors = np.abs(np.array(found) - optimum)
    assert errors.mean() < 0.04
    assert errors.max() < 0.15


def test_one_lucky_trial_does_not_win() -> None:
    calls = 0

    def score(times: Times) -> float:
        nonlocal calls
        calls += 1
        ripple = 0.05 * math.cos(400 * times[1])  # deterministic stand-in for noise
        return (times[1] - 0.9) ** 2 + ripple

    result = search_times(score, PROCESS, 2, evaluations=24)
    assert calls == len(result.trials)
    assert result.times[1] == pytest.approx(0.9, abs=0.15)


def bowl(*optimum: float) -> Score:
    """A quadratic with its minimum at the given intermediate times, neighbours coupled."""

    def score(times: Times) -> float:
        d = [t - o for t, o in zip(times[1:], optimum, strict=True)]
        return sum(x * x for x in d) + 0.5 * sum(a * b for a, b in pairwise(d))

    return score


def test_coordinate_descent_over_two_times() -> None:
    result = search_times(bowl(1.2, 0.6), PROCESS, 3)
    assert result.times[0] == PROCESS.t_max
    assert result.times[1:] == pytest.approx((1.2, 0.6), abs=0.02)
    assert result.score < 1e-3


def test_coordinate_descent_over_three_noisy_times() -> None:
    rng, exact = np.random.default_rng(0), bowl(1.3, 0.8, 0.4)
    result = search_times(lambda ts: exact(ts) + 0.005 * float(rng.standard_normal()), PROCESS, 4)
    assert result.times[1:] == pytest.approx((1.3, 0.8, 0.4), abs=0.15)
    assert exact(result.times) < 0.02


def test_order_is_kept_even_when_the_score_wants_another() -> None:
    """All times are drawn to the same value; every trial must stay a valid schedule."""
    result = search_times(bowl(0.6, 0.6, 0.6), PROCESS, 4)
    for trial in result.trials:
        assert trial.times[0] == PROCESS.t_max
        assert all(late < early for early, late in pairwise(trial.times))
        assert 0.2 <= trial.times[-1] <= trial.times[1] <= 1.5
    assert result.score < 0.02


@pytest.mark.parametrize(("steps", "evaluations"), [(2, 5), (2, 12), (3, 20), (4, 45)])
def test_every_trial_is_recorded_within_the_budget(steps: int, evaluations: int) -> None:
    measured: list[tuple[Times, float]] = []

    def score(times: Times) -> float:
        measured.append((times, sum((t - 0.5) ** 2 for t in times[1:])))
        return measured[-1][1]

    result = search_times(score, PROCESS, steps, evaluations=evaluations)
    assert [(trial.times, trial.score) for trial in result.trials] == measured
    assert len(measured) <= evaluations
    assert (result.times, result.score) in measured


def test_search_is_deterministic() -> None:
    first, second = (search_times(quadratic(0.9, 0.05, seed=3), PROCESS, 2) for _ in range(2))
    assert first == second


def test_one_step_has_nothing_to_search() -> None:
    result = search_times(lambda ts: float(len(ts)), PROCESS, 1)
    assert result.times == (PROCESS.t_max,)
    assert (result.score, len(result.trials)) == (1.0, 1)


def test_scores_that_are_not_finite_never_win() -> None:
    result = search_times(lambda ts: math.nan if ts[1] < 0.7 else (ts[1] - 0.9) ** 2, PROCESS, 2)
    assert result.times[1] == pytest.approx(0.9, abs=0.02)
    assert math.isfinite(result.score)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_no_finite_score_is_an_error(steps: int) -> None:
    with pytest.raises(UserError, match=r"no finite score in \d+ trials; .*; check the score function"):
        search_times(lambda ts: math.nan, PROCESS, steps)


def test_mistakes_say_what_was_expected() -> None:
    with pytest.raises(UserError, match="0 steps; expected at least 1"):
        search_times(quadratic(1.0), PROCESS, 0)
    for lower, upper in ((0.0, 1.0), (1.0, 1.0), (1.2, 0.3), (0.2, 1.57)):
        with pytest.raises(UserError, match=r"search range .*; expected 0 < lower < upper < t_max=1.5645"):
            search_times(quadratic(1.0), PROCESS, 2, lower=lower, upper=upper)
    with pytest.raises(UserError, match=r"4 evaluations for 1 intermediate times; expected at least 5"):
        search_times(quadratic(1.0), PROCESS, 2, evaluations=4)
    with pytest.raises(UserError, match=r"19 evaluations for 2 intermediate times; expected at least 20"):
        search_times(quadratic(1.0), PROCESS, 3, evaluations=19)
