"""Whether what a study expects holds: paired by seed, by mean and standard error."""

from dataclasses import dataclass

from studies.results import Results, Summary, summarize
from studies.spec import HIGHER_IS_BETTER, Expect

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
    """

    expect: Expect
    outcome: str
    difference: float | None
    error: float | None
    n: int
    better_diverged: int
    worse_diverged: int

    @property
    def text(self) -> str:
        """All of this in a sentence."""
        expect = self.expect
        against = "" if expect.against in (None, expect.figure) else f" by {expect.against}"
        within = "" if expect.within is None else f" within {expect.within:g}x"
        seeds = f"{self.n} seed{'' if self.n == 1 else 's'}"
        outcome = f"not settled by {seeds}" if self.outcome == "not settled" else f"{self.outcome} ({seeds})"
        error = "" if self.error is None else f" ± {self.error:.2g}"
        found = [] if self.difference is None else [f"better by {self.difference:.3g}{error}"]
        ends = {expect.better: self.better_diverged, expect.worse: self.worse_diverged}
        found += [f"{arm} diverged in {count}" for arm, count in ends.items() if count]
        said = f"{expect.better} against {expect.worse}{against}, {expect.figure}{within}: {outcome}"
        return f"{said}; {', '.join(found)}" if found else said


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
    better, worse = results.of(expect.better), results.of(expect.worse)
    measured: list[float] = []
    lost = won = 0
    for seed in sorted(better.keys() & worse.keys()):
        ends = better[seed].status, worse[seed].status
        if ends == ("diverged", "done"):
            lost += 1
        elif ends == ("done", "diverged"):
            won += 1
        elif ends == ("done", "done"):
            mine = results.value(better[seed], expect.figure)
            other = results.value(worse[seed], expect.against or expect.figure)
            if mine is not None and other is not None:
                measured.append(_advantage(expect, mine, other))
    largest = max(map(abs, measured), default=0.0) or 1.0
    sizes = (largest, BEYOND * largest)
    found = {_outcome(summarize([*measured, *[size] * won, *[-size] * lost])) for size in sizes} - {"not settled"}
    seen = summarize(measured)
    outcome = found.pop() if len(found) == 1 else "not settled"
    return Verdict(expect, outcome, seen.mean, seen.error, seen.n + won + lost, lost, won)


def _advantage(expect: Expect, mine: float, other: float) -> float:
    """By how much the arm expected to be better is so."""
    within = expect.within or 1.0
    higher = expect.figure.rpartition(".")[2] in HIGHER_IS_BETTER
    return mine - other / within if higher else within * other - mine


def _outcome(differences: Summary) -> str:
    mean, error, n = differences.mean, differences.error, differences.n
    if mean is None or error is None or abs(mean) <= critical(n) * error:
        return "not settled"
    return "holds" if mean > 0 else "does not hold"


def critical(n: int) -> float:
    """Standard errors that settle a mean of n differences, n >= 2."""
    freedom = n - 1
    return STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.5 / freedom
