"""Verdicts on made-up results: paired by seed, a confidence interval of 95 %, divergence counts as worse."""

from __future__ import annotations

import dataclasses

import pytest

from studies.judge import critical, judge, judge_one
from studies.results import summarize
from studies.spec import Expect
from tiny_study import STUDY, made_up

EXPECT = Expect("normalized", "clipped")


def outcome(normalized: list[float | str], clipped: list[float | str], expect: Expect = EXPECT) -> str:
    return judge_one(made_up(STUDY, {"normalized": normalized, "clipped": clipped}), expect).outcome


def test_differences_are_paired_by_seed() -> None:
    verdict = judge_one(made_up(STUDY, {"normalized": [1, 11, 21], "clipped": [2, 12.1, 21.9]}), EXPECT)
    assert (verdict.outcome, verdict.n) == ("holds", 3)
    assert verdict.difference == pytest.approx(1.0)
    assert verdict.error == pytest.approx(0.1 / 3**0.5)
    assert verdict.text == "normalized against clipped, 2.fd: holds (3 seeds); better by 1 ± 0.058"


def test_the_other_direction_does_not_hold() -> None:
    assert outcome([2, 2.1, 2.2], [1, 1.2, 1.1]) == "does not hold"


def test_within_two_standard_errors_nothing_is_settled() -> None:
    assert outcome([1, 2, 3], [1.5, 1.8, 3.3]) == "not settled"
    assert outcome([1.0], [9.0]) == "not settled"
    assert outcome([], []) == "not settled"


@pytest.mark.parametrize(
    ("normalized", "clipped", "expected"),
    [
        ([1, 1, 1], ["diverged"] * 3, "holds"),
        (["diverged"] * 3, [1, 1, 1], "does not hold"),
        ([1, 1, 1], ["diverged", 0.9, 0.9], "not settled"),
        ([1, 1, 1], ["diverged", "diverged", 0.9], "not settled"),
        ([1, 1, 1], ["diverged", 1.5, 1.4], "holds"),
        ([1] * 20, ["diverged"] * 4 + [1 + 0.1 * (-1) ** i for i in range(16)], "holds"),
        ([1] * 20, ["diverged"] * 4 + [0.9] * 16, "not settled"),
        (["diverged"] * 3, ["diverged"] * 3, "not settled"),
        (["diverged", 1, 1, 1], ["diverged", 2, 2, 2.1], "holds"),
        (["failed", 1, 1], [1, 2, 2.1], "holds"),
        (["missing", 1, 1], ["diverged", 2, 2.1], "holds"),
    ],
)
def test_divergence_counts_as_a_difference_of_unknown_size(
    normalized: list[float | str], clipped: list[float | str], expected: str
) -> None:
    assert outcome(normalized, clipped) == expected


def test_divergences_are_counted_and_left_out_of_the_difference() -> None:
    verdict = judge_one(made_up(STUDY, {"normalized": [1, 2, "diverged"], "clipped": ["diverged", 3, 1]}), EXPECT)
    assert (verdict.n, verdict.better_diverged, verdict.worse_diverged, verdict.difference) == (3, 1, 1, 1.0)
    assert "normalized diverged in 1, clipped diverged in 1" in verdict.text


def test_of_precision_and_recall_more_is_better() -> None:
    results = made_up(STUDY, {"normalized": [1, 1], "clipped": [1, 1]})
    low = [
        dataclasses.replace(cell, scores={"2": {"recall": 0.1 + 0.01 * cell.seed, "fd": 1.0}})
        if cell.arm == "clipped"
        else cell
        for cell in results.cells
    ]
    verdict = judge_one(dataclasses.replace(results, cells=tuple(low)), Expect("normalized", "clipped", "2.recall"))
    assert verdict.outcome == "holds"
    assert verdict.difference == pytest.approx(0.145)


def test_within_asks_for_no_more_than_so_many_times() -> None:
    within = Expect("normalized", "clipped", within=1.1)
    assert outcome([1.05, 1.06, 1.05], [1, 1, 1], within) == "holds"
    assert outcome([1.2, 1.21, 1.2], [1, 1, 1], within) == "does not hold"
    assert outcome([1.05, 1.3, 0.9], [1, 1, 1], within) == "not settled"


def test_figures_of_two_arms_may_have_two_names() -> None:
    results = made_up(STUDY, {"normalized": [1, 1.1], "solver": [2, 2.2]})
    verdicts = judge(results)
    assert [verdict.outcome for verdict in verdicts] == ["not settled", "holds"]
    assert verdicts[1].text.startswith("normalized against solver by 2.fd, 1.fd: holds")


def test_every_figure_has_a_name() -> None:
    results = made_up(STUDY, {"normalized": [3.0]})
    cell = results.cells[0]
    values = {
        "1.fd": 3.0,
        "1.ratio": 1.5,
        "2.recall": 0.25,
        "teacher.fd": 2.0,
        "grad_norm_max": 3.0,
        "loss_by_time.2": 3.0,
        "loss_by_time.1": None,
        "loss_by_time.9": None,
        "train": 9.0,
        "4.fd": None,
        "nothing": None,
    }
    assert {name: results.value(cell, name) for name in values} == values


def test_summary_is_mean_and_standard_error() -> None:
    summary = summarize([1.0, None, 2.0, 3.0])
    assert (summary.mean, summary.n) == (2.0, 3)
    assert summary.error == pytest.approx(1 / 3**0.5)
    assert (summarize([1.0]).error, summarize([]).mean) == (None, None)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 21, 22, 40])
def test_critical_values_are_those_of_students_t(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert critical(n) == pytest.approx(stats.t.ppf(0.975, n - 1), abs=0.002)
