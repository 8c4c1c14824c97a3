"""Searching the times of few-step sampling.

The best times depend on the model, so they are measured: `score(times)` draws samples at these times and returns a number
to minimize, such as a Frechet distance. Every evaluation is expensive and usually noisy, so the search is a coarse grid
followed by parabolas fitted by least squares, rather than a bracketing method that trusts single comparisons.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.runtime.values import number, whole

Score = Callable[[tuple[float, ...]], float]

EVALUATIONS_PER_TIME = 16  # in each sweep
LEAST_EVALUATIONS = 5
SWEEPS = 2
GRID = 7


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
    score: Score, process: TrigFlow, steps: int, *, lower: float = 0.2, upper: float = 1.5, evaluations: int | None = None
) -> ScheduleSearch:
    """Times `(t_max, t_1, ..., t_{steps-1})` that minimize `score`, decreasing, the searched ones in [lower, upper].

    Two steps: an even grid of up to 7 times over [lower, upper], then the minima of parabolas fitted to the trials in a
    window around the best one; the window shrinks while the parabola stands out from the scatter around it. More steps: the
    same for one time after the other between its neighbours, two sweeps from t_1 down, starting from even distances. One
    step: nothing to search, one evaluation.

    The winner is the trial of lowest score if it stands out from the scatter around the last parabola, and otherwise the
    trial nearest to its minimum, since the lowest of many noisy numbers is mostly luck. Drawing the same noise for every
    trial takes most of that scatter away. The search itself has no randomness.

    Args:
        score: from times to a number to minimize; a result that is not finite never wins.
        process: gives `t_max`.
        steps: evaluations of the sampler.
        lower, upper: range of the searched times, inside (0, t_max).
        evaluations: budget, never exceeded; by default 16 for two steps and 32 for each searched time of more steps.

    Raises:
        UserError: if steps < 1, the range is empty or outside (0, t_max), the budget is too small (5 for two steps, else
            10 for each searched time), or no trial gave a finite score.
    """
    whole(steps=steps)
    number(lower=lower, upper=upper)
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

    # Even distances, with both ends of the range left free.
    middle = [upper + (lower - upper) * k / steps for k in range(1, steps)]

    def along(k: int) -> Callable[[float], float]:
        return lambda t: measure([*middle[:k], t, *middle[k + 1 :]])

    found: float | None = None if searched else measure(middle)
    for k in [*range(searched)] * sweeps:
        high, low = middle[k - 1] if k > 0 else upper, middle[k + 1] if k + 1 < searched else lower
        apart = 0.02 * (high - low)  # neighbours stay distinct
        low, high = low + (apart if k + 1 < searched else 0), high - (apart if k > 0 else 0)
        known = [] if found is None else [(middle[k], found)]
        middle[k], found = _minimize(along(k), low, high, share, known)
    if found is None or not math.isfinite(found):
        raise UserError(f"no finite score in {len(trials)} trials; expected numbers to minimize; check the score function")
    return ScheduleSearch((process.t_max, *middle), found, tuple(trials))


def _minimize(
    evaluate: Callable[[float], float], low: float, high: float, evaluations: int, known: list[tuple[float, float]]
) -> tuple[float, float]:
    """The chosen (t, score) of a function of one time in [low, high]; `known` are trials from before."""
    points = list(known)

    def add(t: float) -> None:
        points.append((t, evaluate(t)))

    grid = np.linspace(low, high, min(GRID, max(3, evaluations // 2)))
    for t in grid:
        add(float(t))
    window = 2 * float(grid[1] - grid[0])
    for _ in range(evaluations - len(grid)):
        vertex, depth, scatter = _parabola(points, window)
        if window < 1e-3 * (high - low):
            break
        add(_step_aside(vertex, [t for t, _ in points], window, low, high))
        if depth > 10 * scatter:
            window *= 0.7
    vertex, _, scatter = _parabola(points, window)
    finite = [p for p in points if math.isfinite(p[1])] or points
    lowest = min(finite, key=lambda p: p[1])
    nearest = min(finite, key=lambda p: abs(p[0] - vertex))
    return lowest if lowest[1] < nearest[1] - 3 * scatter else nearest


def _parabola(points: list[tuple[float, float]], window: float) -> tuple[float, float, float]:
    """(minimum, depth, scatter) of the parabola fitted to the trials within `window` of the best one, at least five.

    The fit is made twice, the second time around the minimum of the first, so that one lucky trial decides nothing. The
    minimum is kept among the fitted trials; without upward curvature it is the lowest of them. Depth is how far the
    parabola rises over the half-width of the fitted trials, scatter the standard deviation around it.
    """
    finite = [p for p in points if math.isfinite(p[1])]
    if len(finite) < 3:
        return points[0][0], 0.0, 0.0
    centre, depth, scatter = min(finite, key=lambda p: p[1])[0], 0.0, 0.0
    for _ in range(2):
        by_distance = sorted(finite, key=lambda p: abs(p[0] - centre))
        within = sum(abs(t - centre) <= 1.001 * window for t, _ in finite)
        t, y = np.array(by_distance[: max(5, within)]).T
        middle, half = (t.max() + t.min()) / 2, (t.max() - t.min()) / 2
        u = (t - middle) / half
        basis = np.stack([u**2, u, np.ones_like(u)], axis=1)
        (a, b, c), *_ = np.linalg.lstsq(basis, y, rcond=None)
        residual = y - basis @ np.array([a, b, c])
        scatter = float(np.sqrt(np.sum(residual**2) / max(1, len(y) - 3)))
        centre = float(middle + half * np.clip(-b / (2 * a), -1, 1)) if a > 0 else float(t[np.argmin(y)])
        depth = float(a)
    return centre, depth, scatter


def _step_aside(t: float, taken: list[float], window: float, low: float, high: float) -> float:
    """t itself, or half a window to its emptier side when a trial lies there already; always in [low, high]."""
    if all(abs(t - other) >= 0.05 * window for other in taken):
        return t
    left = sum(t - window <= other < t for other in taken)
    right = sum(t < other <= t + window for other in taken)
    side = window / 2 if right <= left else -window / 2
    return min(max(t + side if low <= t + side <= high else t - side, low), high)
