"""docs/results.md is what benchmarks/results.py makes of the committed results."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scripts import load_script
from studies import FINDINGS, STUDIES, Arm, Draw, Study
from studies.results import CellResult, Results, save_results

ROOT = Path(__file__).parents[2]
MACHINE = {"processor": "Abacus", "threads": 1, "device": "cpu", "python": "3.0", "torch": "2.0", "trigflow": "0.0"}


def _load() -> ModuleType:
    return load_script("results")


PAGE = _load()


def results_of(study: Study, base: str, fd: dict[str, list[float]], **changes: Any) -> Results:
    """Results with these one- and two-step distances by arm, one for each seed; infinity for a cell that diverged."""
    cells = [
        CellResult(
            arm, seed, "done" if value < 1e9 else "diverged", "" if value < 1e9 else "weights are not finite",
            teacher=f"teachers/{seed}", iterations=1200, seconds={"train": 60.0}, machine=0,
            scores={} if value > 1e9 else {d: {"fd": value, "precision": 0.5, "recall": 0.5, "nfe": 1} for d in "12"},
        )
        for arm, values in fd.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip
    teachers = {
        f"teachers/{seed}": CellResult("teacher", seed, "done", scores={"32": {"fd": 0.5, "fd_real": 0.8, "nfe": 63}})
        for seed in range(3)
    }
    command = f"trigflow study {study.name} --base {base}"  # as it was when the first results were made
    made = Results(study, base, (0, 1, 2), 2000, tuple(cells), teachers, {}, {}, command, (MACHINE,))
    return dataclasses.replace(made, **changes)


WORSE = {"normalized": [0.61, 0.60, 0.62], "clipped": [0.7, 0.99, 0.6], "raw": [0.95, 0.93, float("inf")]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    tangent = results_of(STUDIES["tangent"], "digits", WORSE)
    weighting = results_of(
        dataclasses.replace(STUDIES["weighting"], expectations=STUDIES["weighting"].expectations[:2]),
        "mnist",
        {"adaptive weighting": [0.9, 0.92, 0.91], "no weighting": [0.5, 0.51, 0.5]},
    )
    for results in (tangent, weighting):
        save_results(results, tmp_path / "in" / f"study-{results.study.name}-{results.base}.json")
    return tmp_path / "in"


def part(page: str, title: str) -> str:
    """From a heading that begins so to the next of its level."""
    level = title.split()[0]
    found = re.search(rf"^{re.escape(title)}.*?(?=^{level} |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[0]


# The committed page --------------------------------------------------------------------------------------------------


def test_the_committed_page_is_the_one_that_the_committed_results_give() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page == PAGE.page(ROOT / "benchmarks" / "results"), "write it with: python benchmarks/results.py"


def test_everything_the_committed_page_links_to_is_there() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in page.splitlines()}
    targets = re.findall(r"\]\(([^)]+)\)", page)
    assert len(targets) >= len(STUDIES)
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in headings, target
        else:
            assert (ROOT / "docs" / target).exists(), target


def test_every_committed_study_is_one_that_can_be_run() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("study-*.json"):
        raw = json.loads(path.read_text(encoding="utf-8"))
        assert raw["study"]["name"] in STUDIES
        assert path.name == f"study-{raw['study']['name']}-{raw['base']}.json"


# Pages of made-up results --------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_results(folder: Path) -> None:
    page = PAGE.page(folder)
    section = part(page, "## Tangents")
    assert STUDIES["tangent"].claim in section
    assert "| normalized | 0.610 ± 0.006 | 0.610 ± 0.006 |" in section
    assert "| raw | 0.940 ± 0.010 |" in section
    assert "raw, seed 2, diverged: weights are not finite" in section
    assert (
        "Made on Abacus, 1 thread (Python 3.0, PyTorch 2.0, trigflow 0.0). To repeat it: `python -m studies tangent" in section
    )
    assert "![Tangents: normalized, clipped, raw, digits](results/tangent-digits.png)" in section


def test_what_does_not_hold_is_said_plainly(folder: Path) -> None:
    page = PAGE.page(folder)
    rows = [line for line in part(page, "## Summary").splitlines() if "Weighting over time" in line]
    assert [("not measured yet" in row, "**does not hold**" in row) for row in rows] == [(True, False), (False, True)]
    assert "| 0 / 2 / 0 | adaptive weighting better than no weighting (" in rows[1]
    section = part(page, "## Weighting over time")
    assert "### mnist: does not hold" in section
    assert re.search(r"\*\*does not hold\*\* \| -0\.407 ± 0\.00\d+ \| 3 \|", section)


def test_divergence_counts_against_an_arm(folder: Path) -> None:
    row = next(line for line in PAGE.page(folder).splitlines() if line.startswith("| normalized better than raw"))
    assert "| **holds** | +0.335 ± 0.005, raw diverged in 1 | 3 |" in row


def test_the_summary_has_every_finding_and_what_is_missing(folder: Path) -> None:
    summary = part(PAGE.page(folder), "## Summary")
    for letter, study in FINDINGS.items():
        assert f"[{letter[0]}. {study.title}](#" in summary
    assert summary.count("not measured yet") == sum(len(study.bases) for study in STUDIES.values()) - 2


@pytest.mark.parametrize(
    ("outcomes", "word"),
    [
        ([], "makes no claim"),
        (["holds", "holds"], "holds"),
        (["holds", "not settled"], "holds in part"),
        (["holds", "does not hold"], "holds in part"),
        (["not settled", "does not hold"], "does not hold"),
        (["not settled"], "not settled"),
    ],
)
def test_one_word_for_all_expectations(outcomes: list[str], word: str) -> None:
    class Verdict:
        def __init__(self, outcome: str) -> None:
            self.outcome = outcome

    assert PAGE.summary_of([Verdict(outcome) for outcome in outcomes]) == word


def test_a_study_on_other_data_is_shown_too(folder: Path) -> None:
    save_results(results_of(STUDIES["tangent"], "own", WORSE), folder / "study-tangent-own.json")
    assert "### own: holds in part" in part(PAGE.page(folder), "## Tangents")


def test_notes_explain_without_figures(folder: Path) -> None:
    notes = folder / "notes.json"
    notes.write_text(json.dumps({"tangent-digits": "Muon hides the size of the tangent, in fp32 and bf16 alike."}))
    assert "Muon hides the size" in part(PAGE.page(folder), "## Tangents")
    notes.write_text(json.dumps({"tangent-digits": "It is 2.5 times better."}))
    with pytest.raises(SystemExit, match=r"the note on tangent-digits has the figure 2\.5"):
        PAGE.page(folder)
    notes.write_text(json.dumps({"tangent-mars": "Nothing."}))
    with pytest.raises(SystemExit, match="speaks of tangent-mars"):
        PAGE.page(folder)


def test_bars_of_whole_demos(folder: Path) -> None:
    bars = [
        {"what": "ratio", "measured": 1.0723, "bar": "<= 1.1", "met": True},
        {"what": "skipped", "measured": 3, "bar": "<= 0", "met": False},
        {"what": "seconds", "measured": 3167.5, "bar": "<= 3600", "met": True},
    ]
    mean = {"fd": {"teacher": 0.5, "student_1": 0.8, "student_2": 0.54, "real": 0.36}}
    raw = {
        "command": "python benchmarks/digits.py", "machine": MACHINE, "mean": mean, "bars": bars, "reports": [{}] * 20,
    }  # fmt: skip
    (folder / "seeds.json").write_text(json.dumps(raw))
    section = part(PAGE.page(folder), "## Default settings")
    assert "| ratio | 1.07 | <= 1.1 | met |" in section
    assert "| skipped | 3 | <= 0 | **missed** |" in section
    assert "| seconds | 3,168 | <= 3600 | met |" in section
    assert "mean over seeds: teacher 0.500, student with one evaluation 0.800, with two 0.540" in section
    assert "20 seeds. Made by `python benchmarks/digits.py` on Abacus" in section


def test_expectations_in_words() -> None:
    arms = (Arm("A"), Arm("B"))
    study = Study("s", "S", "C.", arms, draws=(Draw(1), Draw(2)), expectations=STUDIES["steps"].expectations[:1])
    results = results_of(study, "digits", {"sCD": [0.5, 0.6, 0.5]})
    (verdict,) = PAGE.judge(results)
    assert PAGE.what(verdict) == "sCD: Fréchet distance, 2 steps better than Fréchet distance, 1 step"


def test_the_command_writes_page_and_figures_and_checks_them(folder: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    arguments = ["--results", str(folder), "--docs", str(docs)]
    assert PAGE.main([*arguments, "--check"]) == 1
    assert PAGE.main(arguments) == 0
    assert PAGE.main([*arguments, "--check"]) == 0
    assert sorted(path.name for path in (docs / "results").iterdir()) == ["tangent-digits.png", "weighting-mnist.png"]
    (docs / "results.md").write_text("other")
    assert PAGE.main([*arguments, "--check"]) == 1
