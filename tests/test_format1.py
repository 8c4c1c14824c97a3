"""Run folders written by the first version of trigflow, before files had format numbers, are read as they were then.

`tests/fixtures/format1` was written by `tests/fixtures/make_format1.py`, which says what is in it, with trigflow as of commit
9ba0477. Here only public names and commands are used. Pictures are compared byte by byte, save that on another processor sums
may be rounded otherwise: one level of a few bytes. Trained weights are compared to a tolerance for the same reason.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import trigflow
from trigflow.cli import main
from trigflow.training.config import read_config

WRITTEN = Path(__file__).parent / "fixtures" / "format1"
FACTS: dict[str, Any] = json.loads((WRITTEN / "expected.json").read_text(encoding="utf-8"))
EXPECTED: dict[str, Tensor] = load_file(WRITTEN / "expected.safetensors")
MODELS = {
    "teacher": "diffusion", "scd": "consistency", "multistep": "consistency", "meanflow": "consistency",
    "discrete": "consistency", "latent": "diffusion", "middle_finished": "diffusion",
    "middle_student_finished": "consistency",
}  # fmt: skip
FIGURES = ("fd", "fd_real", "precision", "recall", "density", "coverage")


class Own(nn.Module):
    """The network that own/ was trained with: two hidden layers on pixels, time and class."""

    takes = frozenset({"label"})

    def __init__(self) -> None:
        super().__init__()
        self.null = {"label": torch.tensor(10)}
        self.label = nn.Embedding(11, 16)
        self.inp = nn.Linear(64 + 16 + 8, 48)
        self.hidden = nn.Linear(48, 48)
        self.out = nn.Linear(48, 64)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        label = self.null["label"].expand(len(x)) if label is None else label
        time = torch.cos(t[:, None] * torch.arange(8.0))
        h = torch.tanh(self.inp(torch.cat([x.flatten(1), self.label(label), time], dim=1)))
        return self.out(h + torch.tanh(self.hidden(h))).reshape(x.shape)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the folder, which is the current one: all paths in it are relative."""
    copy = tmp_path_factory.mktemp("format1") / "format1"
    shutil.copytree(WRITTEN, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(copy)
        patch.setenv("TRIGFLOW_CACHE", str(copy.parent / "cache"))
        yield copy


Command = Callable[..., str]


def exit_code(*words: object) -> int:
    """Run `trigflow` in this process."""
    try:
        main([str(word) for word in words])
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("sample", ...)` runs `trigflow sample ...` in this process and returns what it printed."""

    def run(*words: object) -> str:
        capsys.readouterr()
        code = exit_code(*words)
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return run


def load(run: str | Path) -> Any:
    return trigflow.load(run, "cpu", network=Own() if str(run) == "own" else None)


def assert_drawn(found: Tensor, expected: Tensor) -> None:
    """Latents to a tolerance; of pictures one byte in a thousand may be off by one."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if expected.is_floating_point():
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        return
    apart = (found.int() - expected.int()).abs()
    assert int(apart.max()) <= 1
    assert int((apart > 0).sum()) <= max(1, expected.numel() // 1000)


def assert_trained(run: str | Path, finished: str) -> None:
    """The averaged weights of a run are those of another one."""
    found, expected = (load_file(Path(name) / "network.safetensors") for name in (run, finished))
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def assert_resumed(run: str, stopped: str) -> None:
    """The run went on from the checkpoint: lines of metrics from before, speeds and all, are still those of the stopped run."""
    found, before = ((Path(name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for name in (run, stopped))
    assert found[:3] == before
    assert [json.loads(line)["iteration"] for line in found] == [2, 4, 6, 8, 10, 12]
    assert_trained(run, f"{stopped}_finished")


def assert_figures(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Distances closely; shares of 200 samples up to one sample that falls on the other side of a border."""
    for name in FIGURES:
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=0 if name.startswith("fd") else 0.01), name
    for name in ("nfe", "num", "data", "features", "seeds"):
        assert found[name] == expected[name], name


# Models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTS["drawn"])
def test_the_same_pictures_at_the_same_seed(name: str) -> None:
    case = FACTS["drawn"][name]
    assert_drawn(load(case["run"]).sample(seed=0, **case["arguments"]), EXPECTED[name])


@pytest.mark.parametrize("run", [*MODELS, "own"])
def test_what_is_said_of_a_model(run: str) -> None:
    model = load(run)
    assert model.kind == MODELS.get(run, "diffusion")
    assert tuple(model.shape) == ((4, 8, 8) if run == "latent" else (1, 8, 8))
    assert tuple(model.class_names) == (("cats", "dogs") if run == "latent" else tuple("0123456789"))
    assert model.default_steps() == {"diffusion": 18, "consistency": 4 if run == "multistep" else 2}[model.kind]


def test_searched_times_are_kept() -> None:
    written = json.loads(Path("scd/model.json").read_text(encoding="utf-8"))["times"]["2"]
    assert load("scd").times == {2: tuple(written)}


@pytest.mark.parametrize("run", MODELS)
def test_info_and_saving_again(run: str, command: Command, tmp_path: Path) -> None:
    facts = json.loads(command("info", run, "--json"))
    assert (facts["kind"], facts["finished"]) == (MODELS[run], True)
    assert facts["iteration"] == facts["iterations"]
    model = load(run)
    sampling: dict[str, Any] = {"decode": False} if run == "latent" else {}
    again = load(model.save(tmp_path / "again"))
    assert torch.equal(again.sample(4, **sampling), model.sample(4, **sampling))


def test_pictures_of_the_command_line(command: Command, tmp_path: Path) -> None:
    command(
        "sample", "scd", "--num", 40, "--steps", 2, "--guidance", 1.5, "--device", "cpu", "--quiet",
        "--out", tmp_path / "pictures",
    )  # fmt: skip
    files = sorted((tmp_path / "pictures").iterdir())
    found = torch.stack([torch.from_numpy(np.array(Image.open(file)))[None] for file in files])
    assert_drawn(found, EXPECTED["scd 2 steps guided"])


def test_a_student_of_an_old_teacher(command: Command, tmp_path: Path) -> None:
    command(
        "distill", "teacher", "--out", tmp_path / "student", "--iterations", 2, "--batch-size", 4,
        "--loop.sample-every", 0, "--loop.device", "cpu", "--quiet",
    )  # fmt: skip
    assert load(tmp_path / "student").kind == "consistency"


# Evaluation ----------------------------------------------------------------------------------------------------------


def test_evaluation_from_python() -> None:
    case = FACTS["evaluated"]
    written = json.loads(Path(case["file"]).read_text(encoding="utf-8"))
    assert_figures(trigflow.evaluate_model(load(case["run"]), **case["arguments"]), written)


def test_evaluation_against_a_reference_file(command: Command, tmp_path: Path) -> None:
    case, out = FACTS["against reference.npz"], tmp_path / "figures.json"
    command(
        "evaluate", case["run"], "--num", case["arguments"]["num"], "--reference", "reference.npz", "--device", "cpu",
        "--quiet", "--out", out,
    )  # fmt: skip
    assert_figures(json.loads(out.read_text(encoding="utf-8")), case["figures"])


def test_a_model_of_latents_is_evaluated_on_images() -> None:
    figures = trigflow.evaluate_model(load("latent"), num=8, steps=2, data="photos")
    assert figures["num"] == 8
    assert figures["fd"] > 0


def test_a_finished_demo_shows_its_report(command: Command) -> None:
    written = json.loads(Path("demo/report.json").read_text(encoding="utf-8"))
    printed = command("demo", "--quick", "--out", "demo")
    for name in ("teacher", "student_1", "student_2", "real"):
        assert f"{written['fd'][name]:.2f}" in printed
    assert f"{written['speedup_2']:.0f}x faster" in printed


@pytest.mark.parametrize("run", ["teacher", "scd", "meanflow"])
def test_the_doctor_reads_the_metrics(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("doctor", run, "--json") in (0, 1)  # 1 where it found something
    printed = capsys.readouterr()
    assert json.loads(printed.out)
    assert printed.err == ""


# Training goes on ----------------------------------------------------------------------------------------------------


def test_a_teacher_is_resumed_from_python() -> None:
    config = read_config("middle_finished")
    shutil.copytree("middle", "resumed")
    trigflow.train(config, "resumed", resume=True, progress=False)
    assert_resumed("resumed", "middle")


def test_a_student_with_a_fake_score_is_resumed_from_python() -> None:
    config = read_config("middle_student_finished")
    shutil.copytree("middle_student", "resumed_student")
    trigflow.distill(config, load("teacher"), "resumed_student", resume=True, progress=False)
    assert_resumed("resumed_student", "middle_student")


def test_a_teacher_is_resumed_on_the_command_line(command: Command) -> None:
    shutil.copytree("middle", "resumed_again")
    command(
        "train", "--preset", "digits", "--out", "resumed_again", "--resume", "--quiet",
        "--iterations", 12, "--batch-size", 8, "--network.width", 8, "--network.conditioning.width", 8,
        "--optimizer.warmup", 0, "--loop.device", "cpu", "--loop.log-every", 2, "--loop.sample-every", 0,
        "--loop.checkpoint-every", 0,
    )  # fmt: skip
    assert_resumed("resumed_again", "middle")


@pytest.mark.parametrize("run", ["middle", "middle_student"])
def test_checkpoints_are_listed_and_become_models(run: str, command: Command, tmp_path: Path) -> None:
    assert "6" in command("checkpoint", run)
    command("checkpoint", run, "--out", tmp_path / "so_far", "--everything")
    model = load(tmp_path / "so_far")
    assert model.kind == MODELS[f"{run}_finished"]
    assert model.sample(2, steps=2).shape == (2, 1, 8, 8)
    assert json.loads(command("info", run, "--json"))["newest checkpoint"] == 6


def test_an_average_is_made_afterwards(command: Command, tmp_path: Path) -> None:
    case = FACTS["average"]
    command("ema", case["run"], "--sigma-rel", case["sigma_rel"], "--out", tmp_path / "average", "--quiet")
    assert_drawn(load(tmp_path / "average").sample(seed=0, **case["arguments"]), EXPECTED["average"])


# Latents -------------------------------------------------------------------------------------------------------------


def test_training_on_an_old_archive_of_latents(command: Command, tmp_path: Path) -> None:
    command(
        "train", "--data", "latents.zip", "--out", tmp_path / "run", "--iterations", 2, "--batch-size", 4,
        "--network.width", 8, "--network.mult", 1, "--network.blocks", 1, "--network.attention",
        "--network.conditioning.width", 8, "--loop.sample-every", 0, "--loop.device", "cpu", "--quiet",
    )  # fmt: skip
    model, old = load(tmp_path / "run"), load("latent")
    assert (model.shape, model.class_names) == (old.shape, old.class_names)
    assert model.codec == old.codec  # measured again


def test_the_archive_is_what_was_written(folder: Path) -> None:
    with zipfile.ZipFile(folder / "latents.zip") as archive:
        described = json.loads(archive.read("dataset.json"))
    assert described["latents"]["class_names"] == ["cats", "dogs"]
    assert not os.path.isabs(described["latents"]["vae"]["name"])


# Exports -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["teacher", "scd", "multistep", "meanflow"])
def test_export_to_torchscript(run: str, command: Command, tmp_path: Path) -> None:
    """Compared with PyTorch by the command itself."""
    command("export", run, tmp_path / "exported", "--to", "torchscript")
    inputs = json.loads((tmp_path / "exported" / "model.json").read_text(encoding="utf-8"))["inputs"]
    further = {"scd": ["guidance"], "multistep": ["end"], "meanflow": ["end"]}.get(run, [])
    assert inputs == ["x", "t", "label", *further]


def test_export_to_diffusers_is_the_exported_pipeline(command: Command, tmp_path: Path) -> None:
    """The weights that were exported then, and those exported now."""
    command("export", "scd", tmp_path / "exported", "--to", "diffusers")
    weights = "network/diffusion_pytorch_model.safetensors"
    old, new = load_file(Path("pipeline") / weights), load_file(tmp_path / "exported" / weights)
    assert list(old) == list(new)
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_pipeline_exported_then_draws_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers opens it by the two files of code in it, which import classes of trigflow by the names of that time."""
    from diffusers import DiffusionPipeline

    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipe = DiffusionPipeline.from_pretrained("pipeline", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    labels = list(range(10))
    generator = torch.Generator().manual_seed(0)
    images = pipe(class_labels=labels, num_inference_steps=2, guidance_scale=1.5, generator=generator).images
    found = torch.stack([torch.from_numpy(np.array(image))[None] for image in images])
    assert_drawn(found, EXPECTED["pipeline"])
