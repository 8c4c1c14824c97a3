"""Searching the intermediate times of a consistency sampler.

The best times depend on the model, so they are measured: `score(times)` draws samples at these times and returns a number
to minimize, such as a Frechet distance. Every evaluation is expensive and usually noisy, so the search is a coarse grid
followed by parabolas fitted by least squares, rather than a bracketing method that trusts single comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trigflow.errors import UserError
from trigflow.process import TrigFlow

Score = Callable[[tuple[float, ...]], float]

EVALUATIONS_PER_TIME = 16
SWEEPS = 2
LEAST_EVALUATIONS = 5


@dataclass(frozen=True)
class Trial:
    """One evaluation of the score."""

    times: tuple[float, ...]
    score: float


@dataclass(frozen=True)
class ScheduleSearch:
    """Result of `search_times`.

    Attributes:
        times: the chosen times, `t_max` first; always one of the trials.
        score: the score measured at these times.
        trials: everything that was measured, in order.
    """

    times: tuple[float, ...]
    score: float
    trials: tuple[Trial, ...]


def search_times(
    score: Score,
    process: TrigFlow,
    steps: int,
    *,
    lower: float = 0.2,
    upper: float = 1.5,
    evaluations: int | None = None,
) -> ScheduleSearch:
    """Times `(t_max, t_1, ..., t_{steps-1})` that minimize `score`, decreasing, the searched ones in [lower, upper].

    Two steps: half of the budget on an even grid over [lower, upper], the other half at the minima of parabolas fitted to
    the trials in a shrinking window around the best one. More steps: the same for one time after the other between its
    neighbours, two sweeps from t_1 down, starting from even distances. One step: nothing to search, one evaluation.

    The winner is the trial of lowest score if it stands out from the scatter around the last parabola, and otherwise the
    trial nearest to its minimum, since the lowest of many noisy numbers is mostly luck. Drawing the same noise for every
    trial takes most of that scatter away. The search itself has no randomness.

    Args:
        score: from times to a number to minimize; a result that is not finite never wins.
        process: gives `t_max`.
        steps: evaluations of the sampler.
        lower, upper: range of the searched times, inside (0, t_max).
        evaluations: budget, never exceeded; 16 for two steps and 32 for each searched time beyond that by default.

    Raises:
        UserError: if steps < 1, the range is empty or outside (0, t_max), the budget is too small (5 for two steps, else
            10 for each searched time), or no trial gave a finite score.
    """
    searched = steps - 1
    if steps < 1:
        raise UserError(f"a schedule of {steps} steps; expected at least 1; raise steps")
    if not 0 < lower < upper < process.t_max:
        raise UserError(
            f"search range lower={lower}, upper={upper}; expected 0 < lower < upper < t_max={process.t_max:.4f}; "
            "correct the range"
        )
    sweeps = 1 if searched == 1 else SWEEPS
    if evaluations is None:
        evaluations = max(1, EVALUATIONS_PER_TIME * sweeps * searched)
    share = evaluations // max(1, sweeps * searched)
    if searched and share < LEAST_EVALUATIONS:
        raise UserError(
            f"{evaluations} evaluations for {searched} intermediate times; expected at least "
            f"{LEAST_EVALUATIONS * sweeps * searched}; raise evaluations"
        )

    trials: list[Trial] = []

    def measure(middle: list[float]) -> float:
        times = (process.t_max, *middle)
        trials.append(Trial(times, float(score(times))))
        return trials[-1].score

    # Even distances, both ends of the range left free.
    middle = [upper + (lower - upper) * k / steps for k in range(1, steps)]
    if not searched:
        measure(middle)
    known: float | None = None
    for _ in range(sweeps if searched else 0):
        for k in range(searched):
            high = upper if k == 0 else middle[k - 1]
            low = lower if k == searched - 1 else middle[k + 1]
            margin = 0.02 * (high - low)
            middle[k], known = _minimize(
                lambda t, k=k: measure([*middle[:k], t, *middle[k + 1 :]]),  # type: ignore[misc]
                low if k == searched - 1 else low + margin,
                high if k == 0 else high - margin,
                share,
                None if known is None else (middle[k], known),
            )
    best = (process.t_max, *middle)
    final = known if known is not None else trials[-1].score
    if not math.isfinite(final):
        raise UserError(
            f"no finite score in {len(trials)} trials; expected numbers to minimize; check the score function"
        )
    return ScheduleSearch(best, final, tuple(trials))


def _minimize(
    evaluate: Callable[[float], float], low: float, high: float, evaluations: int, known: tuple[float, float] | None
) -> tuple[float, float]:
    """(t, score) of the chosen trial of a function of one time in [low, high]; `known` is a trial from before."""
    grid = np.linspace(low, high, max(3, evaluations // 2))
    points = [(float(t), evaluate(float(t))) for t in grid]
    if known is not None:
        points.append(known)
    window = 2 * float(grid[1] - grid[0])
    for _ in range(evaluations - len(grid)):
        centre = _choose(points, window)[0]
        candidate = min(max(_vertex(points, centre, window), low), high)
        points.append((_step_aside(candidate, points, window, low, high), math.nan))
        points[-1] = (points[-1][0], evaluate(points[-1][0]))
        window *= 0.8
    return _choose(points, window)
