"""`trigflow sample --labels`, and the settings of an objective as options."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deploy.students import NAMES
from trigflow.models.model import load
from trigflow.objectives import objective_of

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def named_folder(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student with names for its classes that are no numbers."""
    folder = tmp_path_factory.mktemp("named") / "run"
    shutil.copytree(student_folder, folder)
    about = json.loads((folder / "model.json").read_text())
    about["conditioner"]["label"]["names"] = NAMES
    (folder / "model.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    ("said", "labels"), [(["three"], [3]), (["3"], [3]), (["three", "7", "zero"], [3, 7, 0]), (["007"], [7]), ([], None)]
)
def test_classes_are_said_by_name_or_number(
    said: list[str], labels: list[int] | None, named_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    options = ["--labels", *said] if said else []
    result = cli("sample", named_folder, *options, "--num", 6, "--device", "cpu", "--out", tmp_path / "drawn")
    assert result.code == 0, result.err
    expected = load(named_folder, "cpu").sample(6, labels=labels)
    drawn = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "drawn").iterdir())]
    assert np.array_equal(np.stack(drawn), expected[:, 0].numpy())


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (["cat"], "labels: there is no class 'cat'; expected one of zero, one, two"),
        (["three", "Seven"], "labels: there is no class 'Seven'; expected one of zero"),
        (["10"], "label 10 is out of range; expected 0 to 9"),
        (["-1"], "labels: there is no class '-1'"),
        (["1.5"], "labels: there is no class '1.5'"),
        ([""], "labels: there is no class ''"),
    ],
)
def test_unknown_classes_end_in_one_line(said: list[str], words: str, named_folder: Path, cli: Cli, tmp_path: Path) -> None:
    result = cli("sample", named_folder, "--labels", *said, "--out", tmp_path / "x.png")
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("trigflow: error: ")
    assert result.err.count("\n") == 1
    assert words in result.err
    assert list(tmp_path.iterdir()) == []


def shown(help: str) -> set[str]:
    """The options of the objective in a help text, by the first part of the name."""
    return {found.split(".")[0] for found in re.findall(r"--objective\.(?:no-)?([a-z][a-z0-9.-]*)", help)}


@pytest.mark.parametrize("kind", ["diffusion", "sct", "meanflow", "ct"])
def test_help_shows_the_settings_of_the_objective_that_is_asked_for(kind: str, cli: Cli) -> None:
    result = cli("train", "--objective.kind", kind, "--help")
    assert (result.code, result.err) == (0, "")
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(objective_of(kind))}
    assert shown(result.out) == fields


def test_help_of_flow_maps_and_of_diffusion_is_apart(cli: Cli) -> None:
    flow_map, diffusion = (shown(cli("train", "--objective.kind", kind, "--help").out) for kind in ("sct", "diffusion"))
    assert {"segments", "residual", "jumps", "anchor", "weighting", "tangent", "proposal"} <= flow_map
    assert not {"label-dropout", "discrete", "lambda-vsd", "fake-lr", "meanflow"} & flow_map
    assert {"label-dropout", "proposal"} <= diffusion
    assert not {"tangent", "segments", "anchor", "guidance-max", "meanflow", "discrete"} & diffusion


@pytest.mark.parametrize(
    ("old", "now"),
    [
        (["--objective.meanflow.equal", "0.25"], "--objective.anchor"),
        (["--objective.meanflow.equal=0.25"], "--objective.anchor"),
        (["--objective.meanflow.mean", "0"], "--objective.proposal.mean"),
        (["--objective.meanflow.std", "1"], "--objective.proposal.std"),
        (["--objective.meanflow.power", "1"], "--objective.power"),
    ],
)
def test_settings_of_earlier_versions_are_named_with_their_new_spelling(
    old: list[str], now: str, cli: Cli, tmp_path: Path
) -> None:
    result = cli("train", "--out", tmp_path / "run", "--objective.kind", "meanflow", *old)
    assert result.code == 2
    assert result.out == ""
    assert result.err.count("\n") == 1
    assert old[0].split("=")[0] in result.err
    assert now in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--objective.kind", "gan"], "unknown objective 'gan'; expected one of diffusion, sct"),
        (["--objective.kind", "diffusion", "--objective.segments", "2"], "objective.segments"),
        (["--objective.kind", "sct", "--objective.label-dropout", "0.2"], "objective.label-dropout"),
    ],
)
def test_settings_of_another_objective_end_in_one_line(options: list[str], words: str, cli: Cli, tmp_path: Path) -> None:
    result = cli("train", "--out", tmp_path / "run", *options)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert words in result.err
    assert list(tmp_path.iterdir()) == []
