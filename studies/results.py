"""What a study has found: one JSON file, from which table, figure and verdicts are made."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dacite

from studies.spec import Study
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import read_json, write_json

FORMAT = 1


@dataclass(frozen=True)
class CellResult:
    """What came of one arm and one seed.

    Attributes:
        arm: its name.
        seed: of its teacher and student.
        status: done, diverged, failed, or missing where it has not been run (or not to its end) yet.
        reason: in one line, where it is not done.
        model: run folder below the folder of the study.
        teacher: that of its teacher, a key of `Results.teachers`.
        iterations, skipped, parameters: of the training; None where it failed.
        seconds: of the training (`train`) and of drawing and scoring (`evaluate`).
        training: figures of the training, see `studies.cell.training_figures`.
        scores: by name of the draw: fd, fd_real, precision, recall, nfe, times, seconds.
        machine: number of the machine that ended it, in `Results.machines`.
    """

    arm: str
    seed: int
    status: str
    reason: str = ""
    model: str = ""
    teacher: str = ""
    iterations: int | None = None
    skipped: int | None = None
    parameters: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    machine: int | None = None

    @property
    def best(self) -> dict[str, Any]:
        """The scores of the draw of least distance; none where there are none."""
        return min(self.scores.values(), key=lambda scores: float(scores["fd"]), default={})


@dataclass(frozen=True)
class Results:
    """The content of results.json.

    Attributes:
        study: its definition.
        base: name of the base.
        seeds: those of its cells.
        num: samples behind every score.
        cells: every arm with every seed.
        teachers: results of the teachers by run folder; arm and seed are those that came first.
        recipe: settings of the base's `teacher` and `student`, and its choices by kind of objective.
        pace: by arm, `pace` (its step time over that of the base), `seconds` and `base_seconds` of a step; empty where
            iterations are equal.
        command: what made it.
        machines: processor, threads, device and versions, see `trigflow.runtime.machine.machine`.
    """

    study: Study
    base: str
    seeds: tuple[int, ...]
    num: int
    cells: tuple[CellResult, ...]
    teachers: dict[str, CellResult]
    recipe: dict[str, Any]
    pace: dict[str, dict[str, Any]]
    command: str
    machines: tuple[dict[str, Any], ...]

    def of(self, arm: str) -> dict[int, CellResult]:
        """The cells of an arm by seed."""
        return {cell.seed: cell for cell in self.cells if cell.arm == arm}

    def count(self, arm: str, *statuses: str) -> int:
        """Cells of an arm with one of these statuses."""
        return sum(cell.status in statuses for cell in self.of(arm).values())

    def value(self, cell: CellResult, figure: str) -> float | None:
        """A figure of a cell, named as in `studies.spec.Expect`; None where it has none."""
        if cell.status in ("failed", "missing"):
            return None
        teacher = self.teachers[cell.teacher].best if cell.teacher in self.teachers else {}
        draws = {**cell.scores, "teacher": teacher}
        head, _, name = figure.rpartition(".")
        found: Any
        if head not in draws:
            training = {**cell.training, **cell.seconds, "parameters": cell.parameters}
            found, items = training.get(figure), training.get(head)
            if isinstance(items, list) and name.isdigit():
                found = dict(enumerate(items)).get(int(name))
        elif name == "ratio":
            found = draws[head]["fd"] / teacher["fd"] if teacher.get("fd") else None
        else:
            found = draws[head].get(name)
        return float(found) if isinstance(found, int | float) and math.isfinite(found) else None

    def summary(self, arm: str, figure: str) -> Summary:
        """Mean and standard error of a figure of an arm, over the cells that did not diverge."""
        return summarize(self.value(cell, figure) for cell in self.of(arm).values() if cell.status == "done")


@dataclass(frozen=True)
class Summary:
    """Mean of `n` values and its standard error, which one value has none of; no mean without values."""

    mean: float | None
    error: float | None
    n: int


def summarize(values: Iterable[float | None]) -> Summary:
    """The summary of those that are numbers; the error is `sqrt(sum (v - mean)^2 / (n - 1) / n)`."""
    finite = [value for value in values if value is not None]
    error = statistics.stdev(finite) / math.sqrt(len(finite)) if len(finite) > 1 else None
    return Summary(statistics.fmean(finite) if finite else None, error, len(finite))


def save_results(results: Results, path: Path) -> None:
    """Write results.json, whole or not at all; infinities, which JSON has none of, become null."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(results)})
    write_json(path, json.loads(text, parse_constant=lambda _: None))


def load_results(path: str | Path) -> Results:
    """Read a results.json.

    Raises:
        UserError: when it is missing, damaged or of another version.
    """
    raw = read_json(Path(path), "results")
    try:
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']}")
        return dacite.from_dict(Results, raw, dacite.Config(cast=[tuple]))
    except (KeyError, TypeError, ValueError, dacite.DaciteError) as error:
        raise UserError(
            f"'{path}' holds no results of a study ({type(error).__name__}: {error}); expected a results.json written by "
            "python -m studies; check the path"
        ) from None
