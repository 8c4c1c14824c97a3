"""Whether what a study expects holds: paired by seed, by mean and standard error."""

import math
from dataclasses import dataclass

from trigflow.lab.study.results import HIGHER_IS_BETTER, Results, standard_error
from trigflow.lab.study.spec import Expect

STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
"""Student's t at 97.5 % for 1, 2, ... 20 degrees of freedom, one fewer than seeds: the standard errors that a mean difference
must exceed to be called settled at the level of 5 %."""

BEYOND = 1e6
"""Times the largest measured difference that a divergence may be worse."""


@dataclass(frozen=True)
class Verdict:
    """What became of an expectation.

    Attributes:
        expect: it.
        outcome: holds, does not hold, or not settled.
        difference: mean over seeds by how much the expected arm is better, in the units of the figure; with `within`, by how
            much it is better than `within` times the other. Pairs in which an arm diverged are not in it; None without pairs.
        error: standard error of that mean; None with fewer than two pairs.
        n: seeds that were compared, divergences included.
        better_diverged, worse_diverged: seeds among them in which only that arm diverged.
        text: all of this in a sentence.
    """

    expect: Expect
    outcome: str
    difference: float | None
    error: float | None
    n: int
    better_diverged: int
    worse_diverged: int
    text: str


def judge(results: Results) -> list[Verdict]:
    """A verdict for each expectation of the study.

    For every seed in which both arms have been run, the difference of the figure is taken. The expectation holds when the
    mean difference lies beyond its confidence interval of 95 % (Student's t) in its direction, does not hold when it does so
    in the other, and is not settled in between, or by a single seed. An arm that diverged has lost against one that did not,
    by a difference of unknown size, at least that of the largest that was measured: the outcome is one that some size gives
    and no other size contradicts. Where both diverged there is nothing to compare, and a failed or missing cell is left out.
    """
    return [judge_one(results, expect) for expect in results.study.expectations]


def judge_one(results: Results, expect: Expect) -> Verdict:
    """The verdict on one expectation."""
    figures = (expect.figure, expect.against or expect.figure)
    better, worse = results.of(expect.better), results.of(expect.worse)
    measured: list[float] = []
    lost = won = 0
    for seed in sorted(better.keys() & worse.keys()):
        pair = better[seed], worse[seed]
        diverged = [cell.status == "diverged" for cell in pair]
        if any(cell.status in ("failed", "missing") for cell in pair) or all(diverged):
            continue
        if any(diverged):
            lost, won = lost + diverged[0], won + diverged[1]
            continue
        mine, other = (results.value(cell, name) for cell, name in zip(pair, figures, strict=True))
        if mine is not None and other is not None:
            measured.append(_advantage(expect, mine, other))
    largest = max(map(abs, measured), default=0.0) or 1.0
    found = {_outcome([*measured, *[size] * won, *[-size] * lost]) for size in (largest, BEYOND * largest)}
    found -= {"not settled"}
    outcome = found.pop() if len(found) == 1 else "not settled"
    difference = math.fsum(measured) / len(measured) if measured else None
    n, error = len(measured) + won + lost, standard_error(measured)
    text = _sentence(expect, outcome, difference, error, n, lost, won)
    return Verdict(expect, outcome, difference, error, n, lost, won, text)


def _advantage(expect: Expect, mine: float, other: float) -> float:
    """By how much the arm expected to be better is so."""
    if expect.figure.rpartition(".")[2] in HIGHER_IS_BETTER:
        return mine - other / (expect.within or 1.0)
    return (expect.within or 1.0) * other - mine


def _outcome(differences: list[float]) -> str:
    error = standard_error(differences)
    if error is None:
        return "not settled"
    mean = math.fsum(differences) / len(differences)
    if abs(mean) <= critical(len(differences)) * error:
        return "not settled"
    return "holds" if mean > 0 else "does not hold"


def critical(n: int) -> float:
    """Standard errors that settle a mean of n differences, n >= 2."""
    freedom = n - 1
    return STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.5 / freedom


def _sentence(expect: Expect, outcome: str, difference: float | None, error: float | None, n: int, lost: int, won: int) -> str:
    against = "" if expect.against in (None, expect.figure) else f" by {expect.against}"
    within = "" if expect.within is None else f" within {expect.within:g}x"
    what = f"{expect.better} against {expect.worse}{against}, {expect.figure}{within}"
    found = [] if difference is None else [f"better by {difference:.3g}" + ("" if error is None else f" ± {error:.2g}")]
    found += [f"{arm} diverged in {count}" for arm, count in ((expect.better, lost), (expect.worse, won)) if count]
    seeds = f"{n} seed{'' if n == 1 else 's'}"
    by = f" by {seeds}" if outcome == "not settled" else f" ({seeds})"
    return f"{what}: {outcome}{by}" + (f"; {', '.join(found)}" if found else "")
