"""`trigflow ema`, and the options of guidance, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from training.tiny import all_digits, tiny_config
from trigflow.codecs.pictures import make_grid
from trigflow.evaluation.evaluate_model import evaluations
from trigflow.models.model import load
from trigflow.runtime.files import read_json
from trigflow.training.config import read_config
from trigflow.training.trainer import Trainer

Cli = Callable[..., Any]
FEW = ["--loop.iterations", 2, "--loop.batch-size", 8, "--loop.sample-every", 0, "--quiet"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with 8 snapshots of each length; only `ema` folders may be added."""
    folder = tmp_path_factory.mktemp("ema") / "run"
    changes = {"loop.iterations": 16, "ema.snapshot_every": 2}
    Trainer(tiny_config(changes), folder, dataset=all_digits(), progress=False).run()
    return folder


def check_mistake(result: Any, words: str) -> None:
    assert result.code == 2
    assert result.out == ""
    lines = result.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("trigflow: error: ")
    assert words in lines[0]
    assert lines[0].count(";") >= 2


def test_ema_writes_a_model_folder(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "model"
    result = cli("ema", run_folder, "--sigma-rel", 0.07, "--out", out, "--quiet")
    assert result.code == 0
    error = read_json(out / "reconstruction.json", "facts")["expected_error"]
    assert result.out == (
        f"{out}: sigma_rel 0.07 at iteration 16, from 16 snapshots; expected error {error:.1e} of the distance the "
        "weights have moved\n"
    )
    assert result.err == ""
    assert error < 1e-3
    assert sorted(path.name for path in out.iterdir()) == ["model.json", "network.safetensors", "reconstruction.json"]
    picture = tmp_path / "x.png"
    assert cli("sample", out, "--num", 4, "--steps", 3, "--out", picture, "--quiet").code == 0
    expected = make_grid(load(out, "cpu").sample(4, steps=3))
    assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(expected))
    facts = json.loads(cli("info", out, "--json").out)
    assert facts["origin"]["ema_sigma_rel"] == 0.07


def test_ema_has_a_place_of_its_own(cli: Cli, run_folder: Path) -> None:
    result = cli("ema", "--sigma-rel", 0.1, "--iteration", 12, run_folder)
    out = run_folder / "ema" / "00000012-0.1"
    assert result.code == 0
    assert result.out.startswith(f"{out}: sigma_rel 0.1 at iteration 12, from 12 snapshots")
    assert "reconstructing" in result.err
    own = load(out, "cpu").network.state_dict()
    from trigflow.runtime.files import read_tensors

    stored = read_tensors(run_folder / "ema" / "00000012-0.1.safetensors", "snapshot")
    for name, value in stored.items():
        torch.testing.assert_close(own[name], value, rtol=1e-5, atol=1e-6)
    check_mistake(cli("ema", run_folder, "--sigma-rel", 0.1, "--iteration", 12), "expected a new or empty folder")


def test_ema_of_a_run_that_has_not_ended(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    (copy / "ema").mkdir(parents=True)
    (copy / "config.json").write_bytes((run_folder / "config.json").read_bytes())
    for path in (run_folder / "ema").iterdir():
        if path.is_file() and (path.name == "model.json" or path.name < "00000010"):
            (copy / "ema" / path.name).write_bytes(path.read_bytes())
    assert cli("ema", copy, "--sigma-rel", 0.1, "--out", tmp_path / "model", "--quiet").code == 0
    assert load(tmp_path / "model", "cpu").sample(1, steps=2).shape == (1, 1, 8, 8)


def test_ema_warns_of_a_large_error(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    result = cli("ema", run_folder, "--sigma-rel", 0.01, "--out", tmp_path / "model", "--quiet")
    assert result.code == 0
    assert (tmp_path / "model" / "network.safetensors").is_file()
    (line,) = result.err.splitlines()
    assert line.startswith("trigflow: warning: an expected error of ")
    assert "is large; expected at most 0.001; train with a lower ema.snapshot_every" in line


def test_mistakes_with_ema(cli: Cli, run_folder: Path, teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    for args, words in (
        ([run_folder, "--sigma-rel", 0.3], "relative EMA width 0.3; expected a number in (0, 0.28)"),
        ([run_folder, "--sigma-rel", "nan"], "relative EMA width nan"),
        ([run_folder, "--sigma-rel", 0.1, "--iteration", 17], "iteration 17 has no snapshots around it; expected one from 2"),
        ([run_folder, "--sigma-rel", 0.1, "--iteration", 1], "iteration 1 has no snapshots around it"),
        ([teacher_folder, "--sigma-rel", 0.1], "holds no snapshots of averaged weights"),
        ([tmp_path / "none", "--sigma-rel", 0.1], "holds no config.json; expected a run folder"),
        ([run_folder], "sigma-rel"),
        ([run_folder, "--sigma-rel", 0.1, "--out", run_folder], "expected a new or empty folder"),
        ([run_folder, "--sigma-rel", 0.1, "--out", tmp_path / "file" / "x", "--quiet"], "cannot write"),
    ):
        before = sorted(tmp_path.rglob("*"))
        check_mistake(cli("ema", *args), words)
        assert sorted(tmp_path.rglob("*")) == before


# Guidance ------------------------------------------------------------------------------------------------------------


def test_sampling_with_an_interval_and_a_negative(cli: Cli, teacher_folder: Path, run_folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    options = ["--num", 4, "--steps", 5, "--out", picture, "--quiet", "--guidance", 3, "--guidance-interval", 0.2, 20.0]
    assert cli("sample", teacher_folder, *options, "--negative", run_folder).code == 0
    model, negative = load(teacher_folder, "cpu"), load(run_folder, "cpu")
    settings: dict[str, Any] = {"steps": 5, "guidance": 3.0, "guidance_interval": (0.2, 20.0)}
    expected = model.sample(4, **settings, negative=negative)
    assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(make_grid(expected)))
    assert not torch.equal(expected, model.sample(4, **settings))
    assert not torch.equal(expected, model.sample(4, steps=5, guidance=3.0, negative=negative))


@pytest.mark.parametrize("solver", ["heun", "dpm2s", "dpm++2m", "ddim"])
def test_evaluations_inside_the_interval_count_twice(solver: str, teacher_folder: Path) -> None:
    model, counted = load(teacher_folder, "cpu"), 0
    forward = model.network.forward

    def counting(x: torch.Tensor, t: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        nonlocal counted
        counted += len(x)
        return forward(x, t, **conditions)

    model.network.forward = counting  # type: ignore[method-assign]
    for interval in ((0.2, 20.0), (0.0, 0.1), (100.0, 200.0), (0.0, 100.0), None):
        counted = 0
        settings: dict[str, Any] = {"steps": 6, "solver": solver, "guidance": 2.0, "guidance_interval": interval}
        model.sample(2, **settings)
        assert counted == 2 * evaluations(model, **settings)


def test_evaluate_reports_the_evaluations(cli: Cli, teacher_folder: Path, run_folder: Path) -> None:
    options = ["--num", 8, "--steps", 5, "--features", "pixels", "--quiet", "--guidance", 2]
    result = cli("evaluate", teacher_folder, *options, "--guidance-interval", 0.2, 20.0, "--negative", run_folder)
    assert result.code == 0
    figures = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    nfe = evaluations(load(teacher_folder, "cpu"), 5, "heun", 2.0, (0.2, 20.0))
    assert 9 < nfe < 18
    assert figures["nfe"] == str(nfe)


def test_distilling_with_an_interval_and_a_negative(cli: Cli, teacher_folder: Path, run_folder: Path, tmp_path: Path) -> None:
    guided = ["--objective.guidance-max", 2, "--objective.guidance-interval", 0.2, 2.0, "--negative", run_folder]
    result = cli("distill", teacher_folder, "--out", tmp_path / "student", *FEW, *guided)
    assert result.code == 0
    model = load(tmp_path / "student", "cpu")
    assert "guidance" in model.takes
    config = read_config(tmp_path / "student")
    assert config.objective.guidance_interval == (0.2, 2.0)
    assert config.negative == str(run_folder)


def test_mistakes_with_guidance(
    cli: Cli, teacher_folder: Path, student_folder: Path, unconditional_folder: Path, tmp_path: Path
) -> None:
    sample = ["sample", teacher_folder, "--num", 2, "--out", tmp_path / "x.png"]
    distilled = ["distill", teacher_folder, "--out", tmp_path / "run", *FEW]
    for args, words in (
        ([*sample, "--guidance-interval", 0.2, 1.0], "with guidance 1, which is none"),
        ([*sample, "--negative", teacher_folder], "with guidance 1, which is none"),
        ([*sample, "--guidance", 2, "--guidance-interval", 2.0, 1.0], "guidance interval (2, 1); expected two noise levels"),
        ([*sample, "--guidance", 2, "--guidance-interval", 2.0], "guidance-interval"),
        ([*sample, "--guidance", 2, "--negative", tmp_path / "none"], "does not exist; expected a folder written by trigflow"),
        ([*sample, "--guidance", 2, "--negative", student_folder], "the negative is a consistency model"),
        (["sample", student_folder, *sample[2:], "--guidance", 2, "--negative", teacher_folder], "expected the scale alone"),
        (["sample", unconditional_folder, *sample[2:], "--guidance", 2, "--negative", teacher_folder], "has classes 0"),
        ([*distilled, "--negative", teacher_folder], "a negative model while objective.guidance_max is 1"),
        ([*distilled, "--objective.guidance-interval", 0.2, 1], "objective.guidance_interval while objective.guidance_max"),
    ):  # fmt: skip
        check_mistake(cli(*args), words)
        assert list(tmp_path.iterdir()) == []
