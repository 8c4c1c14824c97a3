"""The command line: whole journeys, and one clear line for every mistake."""

from __future__ import annotations

import base64
import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import programs
from trigflow.cli import entry as cli_module
from trigflow.cli.commands import COMMANDS
from trigflow.cli.training import Info
from trigflow.models.model import load
from trigflow.training.checkpoint import list_checkpoints
from trigflow.training.config import read_config
from trigflow.training.trainer import Trainer
from trigflow.version import __version__

Cli = Callable[..., Any]
Photos = Callable[..., Path]

FEW = ["--loop.iterations", "3", "--loop.batch-size", "4", "--loop.sample-every", "0", "--loop.checkpoint-every", "2"]
SMALL = ["--network.width", "8", "--network.mult", "1", "2", "--network.blocks", "1", "--network.attention", "1"]
SMALL += ["--network.conditioning.width", "8"]
TINY = [*FEW, *SMALL]
CLASSES = [f"{name}/{i}.png" for name in ("cats", "dogs") for i in range(4)]


def files_below(folder: Path) -> dict[str, int]:
    """Every file and folder below, with its time of change."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def trigflow(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return programs.run(["-m", "trigflow", *args], cwd=cwd, environment=environment)


# Devices, versions and pipes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["sample", "evaluate", "bench", "serve", "train", "distill", "convert", "encode", "reference"]
)
def test_a_device_that_does_not_exist_is_said_with_its_option(command: str, cli: Cli, tmp_path: Path) -> None:
    option = "--loop.device" if command in ("train", "distill") else "--device"
    places = [] if command == "train" else [tmp_path / "none"]
    out = [] if command in ("sample", "evaluate", "bench", "serve") else ["--out", tmp_path / "out"]
    result = cli(command, *places, *out, option, "mps")
    assert (result.code, result.out) == (2, "")
    assert "device 'mps' cannot be used (there is none here); expected cpu, cuda or auto" in result.err
    assert result.err.endswith(f"; change {option}\n")
    assert len(result.err) < 200
    assert list(tmp_path.iterdir()) == []


def test_dry_shows_the_settings_of_a_machine_with_another_device(cli: Cli, tmp_path: Path) -> None:
    result = cli("train", "--preset", "digits", "--loop.device", "mps", "--dry", "--out", tmp_path / "run")
    assert (result.code, result.err) == (0, "")
    assert "mps" in result.out


@pytest.mark.parametrize("collecting", [True, False])
def test_garbage_is_collected_after_the_import_as_before(collecting: bool) -> None:
    (gc.enable if collecting else gc.disable)()
    try:
        importlib.reload(importlib.import_module("trigflow.cli"))
        assert gc.isenabled() == collecting
    finally:
        gc.enable()


def test_the_version(cli: Cli) -> None:
    result = cli("--version")
    assert (result.code, result.out, result.err) == (0, f"trigflow {__version__}\n", "")


def test_output_that_nobody_reads_to_the_end_is_no_error(teacher_folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as unread:
        running = programs.start(["-m", "trigflow", "info", teacher_folder], stdout=unread, stderr=subprocess.PIPE)
        assert running.communicate(timeout=60)[1] == ""
    assert running.returncode == 0


def test_a_broken_pipe_elsewhere_is_an_error(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(Info, "run", broken)
    with pytest.raises(BrokenPipeError), (tmp_path / "out").open("w") as out, contextlib.redirect_stdout(out):
        cli_module.main(["info", "run"])


@pytest.mark.parametrize("command", ["info", "sample", "plan", "distill"])
def test_a_path_that_the_system_refuses_is_one_line(command: str, cli: Cli, tmp_path: Path) -> None:
    more = ["--out", tmp_path / "new"] if command in ("sample", "distill") else []
    check_mistake(cli, tmp_path, [command, "a" * 300, *more], "cannot be used (File name too long); expected a path")


def test_an_error_of_the_system_without_a_path_is_raised(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Info, "run", Mock(side_effect=ConnectionResetError))
    with pytest.raises(ConnectionResetError):
        cli_module.main(["info", "run"])


# Help ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, cli: Cli) -> None:
    result = cli(command, "--help")
    assert result.code == 0
    assert f"Example: trigflow {command}" in " ".join(result.out.split())
    assert result.err == ""


def test_help_of_all(cli: Cli) -> None:
    result = cli("--help")
    assert result.code == 0
    for command in COMMANDS:
        assert command in result.out


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["paint"],
        ["train"],
        ["train", "--out", "x", "--flavour", "mint"],
        ["train", "--out", "x", "--iterations", "many"],
        ["train", "--out", "x", "--optimizer.lr", "fast"],
        ["train", "--out", "x", "--optimizer.name", "sgd"],
        ["train", "--out", "x", "--objective.proposal.std", "-1"],
        ["train", "--out", "x", "--process.sigma-data", "0"],
        ["distill", "--out", "x"],
        ["sample"],
        ["sample", "x", "--num", "1.5"],
        ["sample", "x", "--labels", "three"],
    ],
)
def test_what_cannot_be_parsed(args: list[str], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli(*args)
    assert result.code == 2
    assert "Traceback" not in result.out + result.err
    assert len(result.err) > 20
    assert list(tmp_path.iterdir()) == []


def test_settings_of_another_objective(cli: Cli, tmp_path: Path) -> None:
    result = cli("train", "--out", tmp_path / "run", "--preset", "digits", "--objective.tangent.c", "0.2")
    assert result.code == 2
    assert "trigflow train --objective.kind diffusion --help" in result.err
    assert result.err.lower().count("unrecognized options") == 1
    assert not (tmp_path / "run").exists()


# The demo, as a user runs it -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("real") / "demo"
    result = trigflow("demo", "--quick", "--out", folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_the_demo_reports_what_it_measured(demo_folder: tuple[Path, str]) -> None:
    folder, printed = demo_folder
    figures = json.loads((folder / "report.json").read_text())
    for group, names in {
        "fd": ("teacher", "student_1", "student_2", "real"),
        "precision": ("teacher", "student_1", "student_2"),
        "recall": ("teacher", "student_1", "student_2"),
        "nfe": ("teacher",),
        "samples_per_second": ("teacher", "student_2"),
        "seconds": ("train", "distill", "total"),
    }.items():
        for name in names:
            assert figures[group][name] >= 0
    assert figures["nfe"]["teacher"] in (35, 63)
    assert figures["speedup_2"] > 1
    page = (folder / "report.html").read_text(encoding="utf-8")
    for shown in (f"{figures['fd'][name]:.2f}" for name in ("teacher", "student_1", "student_2", "real")):
        assert shown in page
        assert shown in printed
    encoded = page.split("data:image/png;base64,")[1].split('"')[0]
    assert base64.b64decode(encoded) == (folder / "samples.png").read_bytes()
    with Image.open(folder / "samples.png") as picture:
        picture.load()


def test_a_finished_demo_shows_its_report_again(demo_folder: tuple[Path, str], cli: Cli) -> None:
    folder, printed = demo_folder
    before = files_below(folder)
    result = cli("demo", "--quick", "--out", folder)
    assert (result.code, result.out) == (0, printed)
    assert files_below(folder) == before
    assert cli("demo", "--quick", "--out", folder, "--seed", 1).code == 2


def test_the_demos_folder_is_a_run(demo_folder: tuple[Path, str], cli: Cli, tmp_path: Path) -> None:
    folder, _ = demo_folder
    before = files_below(folder)
    result = cli("sample", folder, "--steps", 2, "--labels", 3, 7, "--num", 6, "--out", tmp_path / "grid.png")
    assert result.code == 0
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (4 * 28, 4 * 19)  # three by two digits of 8x8

    figures = tmp_path / "new" / "figures.json"
    result = cli("evaluate", folder, "--num", 20, "--steps", 1, "--quiet", "--out", figures)
    assert result.code == 0
    measured = json.loads(figures.read_text())
    assert (measured["nfe"], measured["num"], measured["features"]) == (1, 20, "digits")
    shown = dict(line.split() for line in result.out.splitlines())
    assert shown["fd"] == f"{measured['fd']:.4f}"

    for run, kind in ((folder, "consistency"), (folder / "teacher", "diffusion")):
        result = cli("info", run)
        assert result.code == 0
        assert kind in result.out
        facts = json.loads(cli("info", run, "--json").out)
        assert (facts["kind"], facts["finished"], facts["iteration"]) == (kind, True, 30)
    assert files_below(folder) == before


def test_ctrl_c_is_answered_and_the_run_resumed(cli: Cli, tmp_path: Path) -> None:
    """A real signal to a real process, in the middle of training."""
    out = tmp_path / "run"
    args = ["train", "--out", str(out), *SMALL, "--batch-size", "4", "--loop.sample-every", "0", "--quiet"]
    process = programs.start(
        ["-m", "trigflow", *args, "--iterations", "100000", "--loop.log-every", "1"], stderr=subprocess.PIPE
    )
    metrics = out / "metrics.jsonl"
    try:
        while not (metrics.is_file() and metrics.stat().st_size > 0):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == "trigflow: interrupted; what was saved can be resumed\n"
    done = int(list_checkpoints(out)[-1].name)
    assert done >= 1
    assert len(metrics.read_text().splitlines()) <= done
    result = cli(*args, "--iterations", done + 1, "--resume")
    assert result.code == 0, result.err
    assert int(list_checkpoints(out)[-1].name) == done + 1
    assert load(out, "cpu").sample(1).shape == (1, 1, 8, 8)


# From a user's own images to samples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_own_images_to_a_student(packed: bool, photos: Photos, cli: Cli, tmp_path: Path) -> None:
    data = photos(*CLASSES)
    if packed:
        archive = tmp_path / "photos.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for name in CLASSES:
                file.write(data / name, name)
        shutil.rmtree(data)
        data = archive
    before = files_below(data) if data.is_dir() else data.stat().st_mtime_ns
    teacher, student = tmp_path / "teacher", tmp_path / "student"

    result = cli("train", "--data", data, "--out", teacher, *TINY, "--data.flip")
    assert result.code == 0, result.err
    assert f"trigflow distill {teacher}" in result.out
    result = cli("distill", teacher, "--out", student, *FEW, "--objective.guidance-max", 2)
    assert result.code == 0, result.err
    model = load(student, "cpu")
    assert (model.kind, model.shape, model.class_names) == ("consistency", (3, 10, 12), ("cats", "dogs"))
    assert model.origin["teacher"] == str(teacher)
    assert model.origin["data"]["source"] == str(data)
    assert read_config(student).objective.tangent.warmup == 5000  # of the preset for images

    result = cli(
        "sample", student, "--num", 5, "--labels", 1, "--guidance", 1.5, "--device", "cpu", "--out", tmp_path / "pictures"
    )
    assert result.code == 0, result.err
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == [f"{i:06d}.png" for i in range(5)]
    expected = model.sample(5, labels=1, guidance=1.5)
    for path, image in zip(pictures, expected, strict=True):
        with Image.open(path) as picture:
            assert np.array_equal(np.asarray(picture), image.permute(1, 2, 0).numpy())

    options = ["--num", 5, "--labels", "dogs", "--guidance", 1.5, "--device", "cpu", "--out", tmp_path / "by-name"]
    result = cli("sample", student, *options)
    assert result.code == 0, result.err
    for path in pictures:
        assert (tmp_path / "by-name" / path.name).read_bytes() == path.read_bytes()
    result = cli("sample", student, "--labels", "cats", "birds", "--out", tmp_path / "none.png")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "labels: there is no class 'birds'; expected one of cats, dogs" in result.err

    result = cli("evaluate", student, "--num", 8)
    assert result.code == 0, result.err
    assert "pixels" in result.out
    assert (files_below(data) if data.is_dir() else data.stat().st_mtime_ns) == before


def test_images_of_any_size_with_resize(photos: Photos, cli: Cli, tmp_path: Path) -> None:
    photos("a.png", "b.png", size=(20, 31))
    data = photos("c.png", "d.jpg", size=(9, 8))
    result = cli("train", "--data", data, "--resize", 6, "--out", tmp_path / "run", *TINY)
    assert result.code == 0, result.err
    model = load(tmp_path / "run", "cpu")
    assert (model.shape, model.num_classes) == ((3, 6, 6), 0)
    assert model.origin["data"]["resize"] == 6


def test_training_goes_on_with_resume(cli: Cli, tmp_path: Path) -> None:
    args = ["train", "--out", tmp_path / "run", *TINY, "--seed", 2]
    assert cli(*args).code == 0
    result = cli(*args, "--resume", "--loop.iterations", 5)
    assert result.code == 0, result.err
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["00000004", "00000005"]


def test_a_student_from_data_alone(teacher_folder: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("train", "--out", tmp_path / "a", *TINY, "--objective.kind", "sct").code == 0
    assert cli("distill", teacher_folder, "--out", tmp_path / "b", *FEW, "--objective.kind", "sct").code == 0
    for name in ("a", "b"):
        model = load(tmp_path / name, "cpu")
        assert (model.kind, model.origin["objective"]) == ("consistency", "sct")


def test_presets_fit_the_data_unless_named(monkeypatch: pytest.MonkeyPatch, cli: Cli, photos: Photos, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(cli_module.Train, "run", lambda self: seen.append(self))
    data = photos("a.png")
    for args in (
        [],
        ["--data", "mnist"],
        ["--data=mnist"],
        ["--data.source", "mnist"],
        ["--data", str(data)],
        ["--data", "mnist", "--preset", "digits"],
        ["--preset", "images", "--data", "digits", "--network.width", "24"],
    ):
        assert cli("train", "--out", tmp_path / "run", *args).code == 0
    found = [(train.preset, train.data.source, train.network.width) for train in seen]
    assert found[0] == ("digits", "digits", 64)
    assert found[1] == found[2] == found[3] == ("mnist", "mnist", 32)
    assert found[4] == ("images", str(data), 96)
    assert found[5][:2] == ("digits", "mnist")
    assert found[6] == ("images", "digits", 24)


def test_corrupt_images_can_be_left_out(photos: Photos, cli: Cli, tmp_path: Path) -> None:
    data = photos("a.png", "b.png", "c.png")
    (data / "b.png").write_bytes((data / "b.png").read_bytes()[:60])
    result = cli("train", "--data", data, "--skip-corrupt", "--out", tmp_path / "run", *TINY)
    assert result.code == 0, result.err
    assert load(tmp_path / "run", "cpu").shape == (3, 10, 12)


def test_one_class_is_no_choice(photos: Photos, cli: Cli, tmp_path: Path) -> None:
    """A lone sub-folder is refused, with the way out: its images by themselves train without classes."""
    data = photos("only/a.png", "only/b.png")
    args = ["train", "--out", tmp_path / "run", *TINY, "--data"]
    check_mistake(cli, tmp_path, [*args, data], "train unconditionally by pointing to the folder of the images itself")
    assert cli(*args, data / "only").code == 0
    assert json.loads(cli("info", tmp_path / "run", "--json").out)["classes"] == 0
    sample = ["sample", tmp_path / "run", "--num", 2, "--steps", 2, "--out", tmp_path / "x.png"]
    check_mistake(cli, tmp_path, [*sample, "--labels", 0], "labels for an unconditional model; expected none; leave labels out")
    assert cli(*sample).code == 0


def test_grids_have_the_columns_asked_for(teacher_folder: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    result = cli("sample", teacher_folder, "--num", 5, "--steps", 1, "--columns", 5, "--out", out)
    assert (result.code, result.out.strip()) == (0, str(out))
    with Image.open(out) as picture:
        assert picture.size == (4 * 46, 4 * 10)


def test_quiet_is_silent_on_stderr(teacher_folder: Path, cli: Cli, tmp_path: Path) -> None:
    assert "img" in cli("sample", teacher_folder, "--num", 2, "--steps", 1, "--out", tmp_path / "x.png").err
    assert cli("sample", teacher_folder, "--num", 2, "--steps", 1, "--out", tmp_path / "x.png", "--quiet").err == ""
    assert cli("train", "--out", tmp_path / "run", *TINY, "--quiet").err == ""


def test_interrupted_leaves_with_130(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Trainer) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", interrupted)
    result = cli("train", "--out", tmp_path / "run", *TINY, "--quiet")
    assert (result.code, result.err) == (130, "trigflow: interrupted; what was saved can be resumed\n")


# Mistakes ------------------------------------------------------------------------------------------------------------


def check_mistake(cli: Cli, folder: Path, args: list[Any], words: str) -> None:
    """The command fails with one line that holds `words`, and changes nothing below `folder`."""
    before = files_below(folder)
    torch.manual_seed(0)
    result = cli(*args)
    assert result.code == 2, result.out
    assert result.out == ""
    assert result.err.startswith("trigflow: error: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    assert words in result.err
    assert result.err.count("; ") >= 2, "what was wrong; what was expected; what to do"
    assert files_below(folder) == before


def corrupt(data: Path) -> None:
    (data / "b.png").write_bytes(b"no image at all")


def truncate(data: Path) -> None:
    path = data / "b.png"
    path.write_bytes(path.read_bytes()[:-40])


def no_images(data: Path) -> None:
    for path in data.iterdir():
        path.unlink()


def other_size(data: Path) -> None:
    Image.new("RGB", (5, 5)).save(data / "b.png")


def constant(data: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (4, 4), (7, 7, 7)).save(data / name)


def mixed_folders(data: Path) -> None:
    (data / "sub").mkdir()
    (data / "a.png").rename(data / "sub" / "a.png")


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (shutil.rmtree, [], "expected digits, mnist, emoji, emoji-held-out, or the path of a folder, .zip or .tar of images"),
        (no_images, [], "no images found in"),
        (corrupt, [], "'b.png'; expected whole PNG, JPEG or WebP files; replace them, or leave them out with --skip-corrupt"),
        (truncate, [], "corrupt or truncated: 'b.png'"),
        (other_size, [], "images differ in size: 'a.png' is 12x10 and 'b.png' is 5x5"),
        (constant, [], "the same single colour"),
        (mixed_folders, [], "'b.png'"),
        (None, ["--data.channels", "2"], "2 channels; expected 1 (grayscale) or 3 (RGB)"),
        (None, ["--resize", "0"], "resize 0"),
        (None, ["--loop.iterations", "0"], "loop.iterations is 0"),
        (None, ["--loop.batch-size", "0"], "loop.batch_size is 0"),
        (None, ["--loop.accumulate", "3"], "loop.accumulate is 3; expected a divisor of the batch size"),
        (None, ["--optimizer.lr", "nan"], "optimizer.lr is nan"),
        (None, ["--optimizer.eps", "-1"], "optimizer.eps is -1.0"),
        (None, ["--optimizer.betas", "0.9", "1"], "optimizer.betas is (0.9, 1.0)"),
        (None, ["--ema.sigma-rel", "0.5"], "ema.sigma_rel is 0.5"),
        (None, ["--network.dropout", "1"], "network.dropout is 1.0"),
        (None, ["--network.width", "0"], "width"),
        (None, ["--network.conditioning.width", "7"], "width"),
        (None, ["--loop.device", "abacus"], "device 'abacus' cannot be used"),
        (None, ["--preset", "cifar"], "unknown preset 'cifar'; expected one of digits, mnist, emoji, images"),
        (None, ["--objective.kind", "scd"], "train without a teacher cannot distill"),
    ],
)
def test_mistakes_in_training(
    spoil: Callable[[Path], None] | None, options: list[str], words: str, cli: Cli, photos: Photos, tmp_path: Path
) -> None:
    data = photos("a.png", "b.png", "c.png")
    if spoil is not None:
        spoil(data)
    check_mistake(cli, tmp_path, ["train", "--data", data, "--out", tmp_path / "run", *TINY, *options], words)


@pytest.mark.parametrize(
    ("run", "options", "words"),
    [
        ("teacher", ["--labels", "10"], "labels: there is no class '10'; expected one of 0, 1, 2"),
        ("student", ["--labels", "3", "11"], "labels: there is no class '11'; expected one of 0, 1, 2"),
        ("student", ["--labels", "cat"], "labels: there is no class 'cat'; expected one of 0, 1, 2"),
        ("student", ["--labels", "-1"], "labels: there is no class '-1'"),
        ("student", ["--labels", "1.5"], "labels: there is no class '1.5'"),
        ("student", ["--conditions", "wind"], "--conditions wind; expected NAME=VALUE"),
        (
            "student",
            ["--conditions", "wind=1", "wind=2"],
            "--conditions wind=2; expected NAME=VALUE, such as wind=0.5,-1, each",
        ),
        (
            "student",
            ["--conditions", "wind=1,2"],
            "wind for a model that takes no such condition; expected labels; leave wind out",
        ),
        ("student", ["--gamma", "0.5"], "gamma 0.5 for this model; expected 1"),
        ("teacher", ["--gamma", "1"], "gamma 1 for a diffusion model; expected a student of any jump"),
        ("teacher", ["--steps", "0"], "expected at least 1"),
        ("student", ["--steps", "0"], "expected at least 1"),
        ("student", ["--steps", "-2"], "expected at least 1"),
        ("student", ["--num", "0"], "expected at least 1; raise --num"),
        ("teacher", ["--solver", "euler"], "euler"),
        ("student", ["--solver", "euler"], "euler"),
        ("student", ["--guidance", "2.5"], "guidance 2.5; expected a scale in [1, 2.0]"),
        ("student", ["--guidance", "nan"], "expected a finite scale"),
        ("unconditional", ["--guidance", "1.5"], "guidance 1.5 for a model without guidance"),
        ("unconditional", ["--labels", "0"], "labels for an unconditional model; expected none; leave labels out"),
        ("student", ["--columns", "0"], "0 images per row"),
        ("student", ["--device", "abacus"], "device 'abacus' cannot be used"),
        ("student", ["--out", "{tmp}/x.gif"], "unknown image ending"),
        ("student", ["--out", "{tmp}/file/x.png"], "cannot write"),
        ("student", ["--out", "{tmp}/file/folder"], "cannot write"),
        ("student", ["--out", "{tmp}/file"], "cannot write"),
        ("student", ["--out", "{tmp}/folder.png"], "cannot write"),
    ],
)
def test_mistakes_in_sampling(
    run: str,
    options: list[str],
    words: str,
    cli: Cli,
    tmp_path: Path,
    teacher_folder: Path,
    student_folder: Path,
    unconditional_folder: Path,
) -> None:
    folder = {"teacher": teacher_folder, "student": student_folder, "unconditional": unconditional_folder}[run]
    (tmp_path / "file").write_text("here")
    (tmp_path / "folder.png").mkdir()
    given = [option.format(tmp=tmp_path) for option in options]
    out = [] if "--out" in options else ["--out", tmp_path / "x.png"]
    late = "--columns" in options or ("--out" in options and not options[1].endswith(".gif"))  # found after drawing
    quiet = ["--quiet"] if late else []
    check_mistake(cli, tmp_path, ["sample", folder, "--num", 2, *given, *out, *quiet], words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--features", "clip"], "unknown features 'clip'; expected one of digits, mnist, emoji, pixels, inception, dinov2"),
        (["--data", "nowhere"], "no data named 'nowhere'"),
        (["--num", "3"], "3 samples to measure; expected at least 4; raise --num"),
        (["--steps", "0"], "expected at least 1"),
        (["--guidance", "0.5"], "guidance 0.5; expected a scale in [1, 2.0]"),
        (["--out", "{tmp}/file/x.json"], "cannot write"),
    ],
)
def test_mistakes_in_evaluation(options: list[str], words: str, cli: Cli, tmp_path: Path, student_folder: Path) -> None:
    (tmp_path / "file").write_text("here")
    check_mistake(cli, tmp_path, ["evaluate", student_folder, *(o.format(tmp=tmp_path) for o in options)], words)


def test_mistakes_in_distillation(
    cli: Cli, tmp_path: Path, photos: Photos, teacher_folder: Path, student_folder: Path, unconditional_folder: Path
) -> None:
    data = photos(*CLASSES)
    out = ["--out", tmp_path / "run", *FEW]
    for args, words in (
        ([tmp_path / "none"], "does not exist; expected a folder written by trigflow"),
        ([teacher_folder, "--data", data], "images of shape (3, 10, 12) and the teacher (1, 8, 8); expected the same"),
        ([teacher_folder, "--data", "nowhere"], "no data named 'nowhere'"),
        ([teacher_folder, "--objective.kind", "diffusion"], "distill with the diffusion objective"),
        ([teacher_folder, "--objective.guidance-max", "0.5"], "objective.guidance_max is 0.5"),
        ([teacher_folder, "--preset", "cifar"], "unknown preset 'cifar'"),
        ([teacher_folder, "--dora"], "for a teacher of trigflow's own networks"),
        ([teacher_folder, "--lora-targets", "to_q"], "for a teacher of trigflow's own networks"),
        ([teacher_folder, "--dropout-up-to", 4], "--dropout-up-to 4 without dropout; expected both; pass --dropout too"),
        ([student_folder], "the teacher is a consistency model"),
        ([unconditional_folder], "classes 10 and the teacher 0"),
    ):
        check_mistake(cli, tmp_path, ["distill", *args, *out], words)


def test_an_unconditional_teacher_gives_no_guidance(cli: Cli, tmp_path: Path, photos: Photos) -> None:
    data = photos("a.png", "b.png")
    assert cli("train", "--data", data, "--out", tmp_path / "teacher", *TINY).code == 0
    args = ["distill", tmp_path / "teacher", "--out", tmp_path / "run", *FEW, "--objective.guidance-max", 2]
    check_mistake(cli, tmp_path, args, "the teacher is unconditional; expected a class-conditional teacher")


@pytest.mark.parametrize("content", ["[1]", "{}", '{"format": 3}', '{"format": 3, "network": null}'])
def test_a_teacher_that_is_no_model(content: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model.json").write_text(content)
    check_mistake(cli, tmp_path, ["distill", tmp_path / "teacher", "--out", tmp_path / "run"], "; expected a")


def test_options_that_something_else_does_not_have(cli: Cli, tmp_path: Path) -> None:
    check_mistake(cli, tmp_path, ["plan", "digits-scd", "--lora", 8], "--lora for the recipe 'digits-scd'; expected the run")
    for option in (["--size", 64], ["--frames", 1], ["--dtype", "int8"]):
        args = ["import", tmp_path / "x.pkl", "--out", tmp_path / "run", *option]
        check_mistake(cli, tmp_path, args, "for a snapshot; expected them of a pipeline")
    args = ["reference", "digits", "--keep", 3, "--out", tmp_path / "x.npz"]
    check_mistake(cli, tmp_path, args, "3 features to keep of None images; expected 0 or more than 3")


@pytest.mark.parametrize("command", ["sample", "evaluate", "info", "distill"])
def test_folders_that_are_no_run(command: str, cli: Cli, tmp_path: Path) -> None:
    more = ["--out", tmp_path / "new"] if command in ("sample", "distill") else []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for folder in (tmp_path / "none", tmp_path / "other", tmp_path / "other" / "notes.txt"):
        check_mistake(cli, tmp_path, [command, folder, *more], "expected a")


def test_places_that_cannot_be_written(cli: Cli, tmp_path: Path, teacher_folder: Path) -> None:
    (tmp_path / "file").write_text("here")
    for args in (
        ["train", *TINY, "--out", tmp_path / "file" / "run"],
        ["train", *TINY, "--out", tmp_path / "file"],
        ["distill", teacher_folder, *FEW, "--out", tmp_path / "file" / "run"],
        ["demo", "--quick", "--out", tmp_path / "file" / "run"],
    ):
        check_mistake(cli, tmp_path, args, "cannot write")


def test_runs_are_neither_overwritten_nor_mixed(cli: Cli, tmp_path: Path, teacher_folder: Path) -> None:
    run = tmp_path / "run"
    assert cli("train", "--out", run, *TINY).code == 0
    again = ["train", "--out", run, *TINY]
    check_mistake(cli, tmp_path, again, "already holds a run; expected a new folder; choose another --out, or --resume")
    check_mistake(cli, tmp_path, [*again, "--resume", "--seed", 1], "has loop.seed = 0, now it is 1; expected the same")
    check_mistake(cli, tmp_path, [*again, "--resume", "--optimizer.lr", 1], "has optimizer.lr = ")
    check_mistake(cli, tmp_path, [*again, "--resume", "--data.flip"], "has data.flip = False, now it is True")
    check_mistake(cli, tmp_path, ["distill", teacher_folder, "--out", run, *FEW], "already holds a run")
    check_mistake(cli, tmp_path, ["demo", "--quick", "--out", run], "holds no demo")


def test_weights_of_another_network(cli: Cli, tmp_path: Path, teacher_folder: Path, unconditional_folder: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "model.json"):
        shutil.copy(teacher_folder / name, run)
    shutil.copy(unconditional_folder / "network.safetensors", run)
    for args in (["sample", run, "--out", tmp_path / "x.png"], ["evaluate", run], ["info", run]):
        check_mistake(cli, tmp_path, args, "belongs to another network (1 missing, first 'conditioning.label.weight')")


def test_damaged_checkpoints(cli: Cli, tmp_path: Path) -> None:
    args = ["train", "--out", tmp_path / "run", *TINY]
    assert cli(*args).code == 0
    newest = list_checkpoints(tmp_path / "run")[-1]
    tensors = newest / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    check_mistake(cli, tmp_path, [*args, "--resume"], "cannot be read")
    (newest / "state.json").write_text("{}")
    check_mistake(cli, tmp_path, [*args, "--resume"], "delete this checkpoint to resume from the one before")
    shutil.rmtree(newest)
    assert cli(*args, "--resume").code == 0


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    result = trigflow("train", "--data", "nowhere", "--out", tmp_path / "run", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("trigflow: error: no data named 'nowhere' and nothing at that path; expected ")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
