"""Results as JSON, as a table and as a picture."""

from __future__ import annotations

import builtins
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from studies import figure as pictures
from studies.figure import DPI, WIDTH, figure
from studies.results import Results, Summary, load_results, save_results
from studies.spec import Arm, Draw, Study
from studies.study_table import label, report, show, table, terms
from tiny_study import STUDY, made_up
from trigflow.runtime.errors import UserError

FIGURES: dict[str, list[float | str]] = {
    "normalized": [1.0, 1.2],
    "clipped": [2.0, "diverged"],
    "continued": ["failed", "missing"],
    "solver": [3.0, 3.2],
}


@pytest.fixture
def results() -> Results:
    return made_up(STUDY, FIGURES)


def row(text: str, arm: str) -> list[str]:
    """The cells of the first row of an arm."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {arm} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_json_keeps_everything(results: Results, tmp_path: Path) -> None:
    save_results(results, tmp_path / "results.json")
    again = load_results(tmp_path / "results.json")
    assert again == results
    assert report(again) == report(results)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "study": 3}'])
def test_other_files_are_no_results(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"expected a (results\.json|JSON file)") as caught:
        load_results(tmp_path / "results.json")
    assert "\n" not in str(caught.value)


def test_the_table_has_means_errors_and_ends(results: Results) -> None:
    text = table(results)
    assert row(text, "arm")[1:3] == ["Fréchet distance, 1 step", "Fréchet distance, 2 steps"]
    assert row(text, "normalized")[1:] == ["1.10 ± 0.10", "1.10 ± 0.10", "100", "9", "2", "0", "0"]
    assert row(text, "clipped")[1:] == ["2", "2", "100", "9", "1", "1", "0"]
    assert row(text, "continued")[1:3] == ["–", "–"]
    assert row(text, "continued")[-3:] == ["0", "0", "2"]
    assert row(text, "solver")[3:5] == ["", ""]  # nothing was trained


def test_terms_say_what_is_equal_and_what_the_teacher_does(results: Results) -> None:
    assert "Every arm trains for the iterations in the table." in terms(results)
    assert "Teacher: Fréchet distance 2.00 ± 0.00 with 63 evaluations; real against real: 0.500 ± 0.000." in terms(results)
    seconds = dataclasses.replace(results, study=dataclasses.replace(STUDY, budget="seconds"))
    assert "the same training time" in terms(seconds)


def test_the_report_has_verdicts_and_bad_ends(results: Results) -> None:
    text = report(results)
    assert text.startswith(f"# {STUDY.title}\n\n{STUDY.claim}\n")
    assert "* normalized against clipped, 2.fd: holds (2 seeds); better by 1, clipped diverged in 1" in text
    assert "* clipped, seed 1, diverged: of a reason" in text
    assert "* continued, seed 0, failed: of a reason" in text


GUIDED = Study(
    name="guided",
    title="Scales",
    claim="None.",
    arms=(Arm("a"), Arm("b", draws=(Draw(1), Draw(2)))),
    draws=tuple(Draw(steps, guidance=scale) for scale in (1.0, 2.0) for steps in (1, 2)),
    over="guidance",
    shown=("1.fd", "1.recall", "2.fd"),
)
STEPS = dataclasses.replace(GUIDED, name="steps", draws=(Draw(1), Draw(2), Draw(4)), over="steps", shown=("fd",), log_axis=True)
PLACED = Study(
    name="placed",
    title="Places",
    claim="None.",
    arms=(Arm("level"), Arm("eight", x=8, line="steps"), Arm("many", x=512, line="steps")),
    axis="N",
    log_axis=True,
    shown=("1.fd", "2.fd", "2.ratio"),
)


def test_tables_over_scales_and_steps_have_a_row_for_each() -> None:
    text = table(made_up(GUIDED, {"a": [1.0, 2.0], "b": [3.0, 3.0]}))
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert [r[:2] for r in rows] == [["a", "1"], ["a", "2"], ["b", "1"]]
    assert rows[1][2:5] == ["1.50 ± 0.50", "0.250 ± 0.000", "1.50 ± 0.50"]
    text = table(made_up(STEPS, {"a": [1.0, 2.0], "b": [3.0, 3.0]}))
    assert [line.split("|")[2].strip() for line in text.splitlines()[2:]] == ["1", "2", "4", "1", "2"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("1.fd", "Fréchet distance, 1 step"),
        ("2@1.5.recall", "recall, 2 steps, scale 1.5"),
        ("fd", "Fréchet distance"),
        ("2.ratio", "distance over the teacher's, 2 steps"),
        ("teacher.fd", "Fréchet distance, teacher"),
        ("grad_norm_max", "largest norm of the gradient"),
        ("loss_first", "loss first"),
        ("loss_by_time.7", "loss by time, item 7"),
    ],
)
def test_figures_have_words(name: str, words: str) -> None:
    assert label(name) == words


def test_numbers_have_the_digits_that_make_sense() -> None:
    assert show(Summary(None, None, 0)) == "–"
    assert show(Summary(2.3456, None, 1)) == "2.35"
    assert show(Summary(0.5, 0.0123, 3)) == "0.500 ± 0.012"
    assert show(Summary(1234.5, 10.2, 3)) == "1,234 ± 10"
    assert show(Summary(3e7, 1e6, 3)) == "3.00e+07 ± 1.0e+06"


@pytest.mark.parametrize("study", [STUDY, GUIDED, STEPS, PLACED], ids=lambda study: study.name)
@pytest.mark.parametrize("empty", [False, True], ids=["measured", "nothing measured"])
def test_the_figure_fits_a_column_and_is_made_from_json_alone(study: Study, empty: bool, tmp_path: Path) -> None:
    value: list[float | str] = ["diverged", "failed"] if empty else [1.0, 1.5]
    save_results(made_up(study, {arm.name: value for arm in study.arms}), tmp_path / "results.json")
    figure(load_results(tmp_path / "results.json"), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.width == round(WIDTH * DPI)
        assert picture.info["dpi"] == pytest.approx((DPI, DPI), abs=0.1)
        dark = sum(picture.convert("L").histogram()[:128])
    assert dark > 1000
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def drawn(results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of a figure."""
    from matplotlib.figure import Figure

    panels: list[Any] = []
    save = Figure.savefig

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        panels.extend(self.axes)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", watched)
    figure(results, tmp_path / "figure.png")
    return panels


def names_of(panel: Any) -> list[str]:
    return [text.get_text() for text in panel.get_legend().get_texts()]


def test_bars_are_the_means_and_say_how_many_diverged(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (panel,) = drawn(results, tmp_path, monkeypatch)
    assert [text.get_text() for text in panel.get_yticklabels()] == [
        "normalized", "clipped\n(1 of 2 diverged)", "continued", "solver"
    ]  # fmt: skip
    assert [bar.get_width() for bar in panel.containers[1]][:2] == pytest.approx([1.1, 2.0])
    assert {"teacher", "1 step", "2 steps"} == set(names_of(panel))
    fonts = [*panel.get_xticklabels(), *panel.get_yticklabels(), panel.xaxis.label, *panel.get_legend().get_texts()]
    assert min(text.get_fontsize() for text in fonts) >= 8
    assert len({(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in panel.containers if hasattr(bars, "patches")}) == 2


def test_lines_join_arms_and_arms_without_a_place_are_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = made_up(PLACED, {"level": [1.0, 1.0], "eight": [3.0, 3.0], "many": [2.0, 2.0]})
    panels = drawn(results, tmp_path, monkeypatch)
    assert len(panels) == 2  # distances and ratios
    assert names_of(panels[0]) == ["teacher", "steps, 1 step", "steps, 2 steps", "level, 1 step", "level, 2 steps"]
    lines = {container.get_label(): container.lines[0] for container in panels[0].containers}
    assert lines["steps, 1 step"].get_xydata().tolist() == [[8.0, 3.0], [512.0, 2.0]]
    assert lines["level, 2 steps"].get_xydata().tolist() == [[8.0, 1.0], [512.0, 1.0]]
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines.values()}) == 4
    assert panels[0].get_xscale() == "log"
    assert panels[0].get_xlabel() == "N"


def test_lines_over_scales_are_one_for_each_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = made_up(GUIDED, {"a": [1.0, 1.0], "b": [9.0, 9.0]})
    for scores in (score for cell in results.of("b").values() for score in cell.scores.values()):
        scores["recall"] = 0.01
    distance, recall = drawn(results, tmp_path, monkeypatch)
    assert names_of(distance) == ["teacher", "a, 1 step", "a, 2 steps", "b, 1 step", "b, 2 steps"]
    assert names_of(recall) == ["a", "b"]
    assert recall.containers[0].lines[0].get_xdata().tolist() == [1.0, 2.0]
    assert distance.get_yscale() == "log"  # 9 times apart
    assert recall.get_yscale() == "linear"  # 25 times apart, but a share of all samples


def test_without_matplotlib_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"needs matplotlib, .* pip install matplotlib"):
        pictures.require_matplotlib()


def test_the_json_is_plain(results: Results, tmp_path: Path) -> None:
    strange = dataclasses.replace(results.cells[0], training={"loss": float("inf"), "by_time": (1.0, float("nan"))})
    save_results(dataclasses.replace(results, cells=(strange,)), tmp_path / "results.json")
    raw = json.loads((tmp_path / "results.json").read_text())
    assert raw["format"] == 1
    assert raw["cells"][0]["training"] == {"loss": None, "by_time": [1.0, None]}
