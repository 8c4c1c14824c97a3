"""The doctor: every diagnosis provoked by a real training that is broken in one way, and none for sound ones."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.tiny import digits, tiny_config, tiny_trainer
from trigflow.lab.doctor import CHECKS, Diagnosis, Examination, NotSeen, examine, read_record
from trigflow.models.model import Model
from trigflow.networks import PositionalEmbedding
from trigflow.runtime.errors import UserError
from trigflow.training.trainer import Trainer

TEACHER = {
    "loop.instruments": True,
    "loop.iterations": 40,
    "loop.batch_size": 12,
    "loop.log_every": 4,
    "optimizer.lr": 5e-3,
    "optimizer.schedule": "cosine",
}
STUDENT = {**TEACHER, "objective.kind": "scd", "optimizer.lr": 1e-3, "objective.tangent.warmup": 10}
CONSTANT = {"optimizer.schedule": "constant"}
FOURIER = {"network.conditioning.time_embedding": "fourier"}
LOG_TIME = {"network.conditioning.time_map": "log"}

Trained = tuple[Model, Path]


def train(
    folder: Path, changes: dict[str, Any], teacher: Model | None = None, before: Callable[[Trainer], object] | None = None
) -> Trained:
    """A model and its run folder."""
    trainer = tiny_trainer(folder, changes, teacher=teacher)
    if before is not None:
        before(trainer)
    return trainer.run(), folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("doctor") / "teacher", TEACHER)


@pytest.fixture(scope="module")
def student(teacher: Trained, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("doctor") / "student", STUDENT, teacher[0])


def diagnosed(folder: Path) -> dict[str, Diagnosis]:
    return {diagnosis.name: diagnosis for diagnosis in examine(folder).diagnoses}


def names(examination: Examination) -> dict[str, list[str]]:
    groups = {"found": examination.diagnoses, "sound": examination.sound, "not seen": examination.not_seen}
    return {group: [outcome.name for outcome in outcomes] for group, outcomes in groups.items()}


ALL = [
    "non-finite",
    "rollbacks",
    "loss-scale",
    "spikes",
    "half-precision",
    "time-embedding",
    "tangent-end",
    "learning-rate",
    "tangent-constant",
    "adaptive-weight",
]
ALL += ["ema-short", "ema-long", "data-scale"]


# Sound runs ----------------------------------------------------------------------------------------------------------


def test_a_sound_student_has_nothing(student: Trained) -> None:
    assert names(examine(student[1])) == {"found": [], "sound": ALL, "not seen": []}


def test_a_sound_teacher_has_nothing(teacher: Trained) -> None:
    tangents = ["time-embedding", "tangent-end", "tangent-constant"]
    expected = {"found": [], "sound": [name for name in ALL if name not in tangents], "not seen": tangents}
    assert names(examine(teacher[1])) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"objective.kind": "sct"},
        {"objective.segments": 2, "loop.precision": "bf16"},
        {"objective.tangent.mode": "raw", "objective.tangent.warmup": 0, "ema.kind": "none"},
    ],
    ids=["sct", "segments", "raw"],
)
def test_other_sound_students_have_nothing(changes: dict[str, Any], teacher: Trained, tmp_path: Path) -> None:
    train(tmp_path, {**STUDENT, "loop.iterations": 24, **changes}, teacher[0])
    assert diagnosed(tmp_path) == {}


# Broken runs ---------------------------------------------------------------------------------------------------------


def test_steps_that_are_not_finite(tmp_path: Path) -> None:
    train(tmp_path, {**TEACHER, "loop.iterations": 8, "optimizer.lr": 1e18, **CONSTANT})
    found = diagnosed(tmp_path)["non-finite"]
    assert "steps were left out, the first by iteration" in found.evidence
    assert "optimizer.lr (now 1e+18)" in found.remedy


class Careless(nn.Module):
    """A network of the user's own whose time embedding runs in the precision of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.features = PositionalEmbedding(16)
        self.time = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 8))
        self.inp, self.out = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        return self.out(torch.tanh(self.inp(x) + self.time(self.features(t))[:, :, None, None]))


@pytest.mark.parametrize(("precision", "expected"), [("bf16", True), ("fp32", False)])
def test_a_time_embedding_in_half_precision(precision: str, expected: bool, tmp_path: Path) -> None:
    config = tiny_config({**TEACHER, "loop.precision": precision, "loop.iterations": 8})
    Trainer(config, tmp_path, network=Careless(), dataset=digits(), progress=False).run()
    found = diagnosed(tmp_path)
    assert ("half-precision" in found) == expected
    if expected:
        assert "bfloat16" in found["half-precision"].evidence
        assert "autocast" in found["half-precision"].remedy


def test_a_steep_time_embedding(tmp_path: Path) -> None:
    model, _ = train(tmp_path / "teacher", {**TEACHER, **FOURIER, "loop.iterations": 16})
    train(tmp_path / "student", {**STUDENT, "loop.iterations": 16}, model)
    found = diagnosed(tmp_path / "student")
    assert list(found) == ["time-embedding"]
    assert "fourier of scale 16" in found["time-embedding"].remedy
    assert diagnosed(tmp_path / "teacher") == {}  # it does not differentiate its embedding


@pytest.mark.parametrize("changes", [LOG_TIME, {**LOG_TIME, **FOURIER}], ids=["positional", "fourier"])
def test_a_tangent_that_diverges_at_the_end(changes: dict[str, Any], tmp_path: Path) -> None:
    model, _ = train(tmp_path / "teacher", {**TEACHER, **changes, "loop.iterations": 16})
    train(tmp_path / "student", {**STUDENT, "loop.iterations": 16}, model)
    found = diagnosed(tmp_path / "student")
    assert set(found) == {"tangent-end", "time-embedding"} if FOURIER.keys() <= changes.keys() else {"tangent-end"}
    assert "at t_max = 1.565" in found["tangent-end"].evidence
    assert "(now log," in found["tangent-end"].remedy


def test_a_student_whose_learning_rate_is_too_high(teacher: Trained, tmp_path: Path) -> None:
    train(tmp_path, {**STUDENT, **CONSTANT, "optimizer.lr": 0.3}, teacher[0])
    found = diagnosed(tmp_path)
    assert list(found) == ["learning-rate"]
    assert "optimizer.lr (now 0.3)" in found["learning-rate"].remedy
    assert "objective.tangent.warmup (now 10)" in found["learning-rate"].remedy


def test_a_student_that_went_on_is_still_compared_with_its_start(teacher: Trained, tmp_path: Path) -> None:
    """After `--resume` the lines of the log no longer say what the weights at the start had."""
    train(tmp_path, {**STUDENT, **CONSTANT, "optimizer.lr": 0.3}, teacher[0])
    path = tmp_path / "metrics.jsonl"
    first, *later = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.pop("probe_start") == first["probe_start"] for line in later)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in [first, *later]))
    assert "for the weights the student started from" in diagnosed(tmp_path)["learning-rate"].evidence


def test_a_teacher_whose_learning_rate_is_too_high(tmp_path: Path) -> None:
    train(tmp_path, {**TEACHER, **CONSTANT, "optimizer.lr": 0.5, "optimizer.warmup": 30})
    found = diagnosed(tmp_path)
    assert "learning-rate" in found
    assert "raise optimizer.warmup (now 30)" in found["learning-rate"].remedy


@pytest.mark.parametrize("weighted", [True, False])
def test_a_constant_larger_than_the_tangents(weighted: bool, teacher: Trained, tmp_path: Path) -> None:
    train(tmp_path, {**STUDENT, "objective.tangent.c": 30.0, "objective.adaptive_weight": weighted}, teacher[0])
    found = diagnosed(tmp_path)
    assert ("tangent-constant" in found) == weighted
    if weighted:
        by_time = read_record(tmp_path).by_time("loss_by_time")
        assert f"by a factor of {max(by_time) / min(by_time):.3g}" in found["tangent-constant"].evidence
        assert "objective.tangent.c (now 30)" in found["tangent-constant"].remedy


def test_a_weighting_that_explodes(tmp_path: Path) -> None:
    train(tmp_path, {**TEACHER, **CONSTANT, "optimizer.lr": 0.5})
    found = diagnosed(tmp_path)
    assert found["adaptive-weight"].title == "The adaptive weighting has exploded."
    assert "objective.adaptive-weight off" in found["adaptive-weight"].remedy


def test_a_dead_weighting(tmp_path: Path) -> None:
    train(tmp_path, TEACHER, before=lambda trainer: trainer.student.weights["weight"].requires_grad_(False))
    found = diagnosed(tmp_path)
    assert list(found) == ["adaptive-weight"]
    assert found["adaptive-weight"].title == "The adaptive weighting is dead."


def test_an_average_that_is_too_long(tmp_path: Path) -> None:
    train(tmp_path, {**TEACHER, "ema.kind": "halflife", "ema.rampup": 0.0})
    found = diagnosed(tmp_path)
    assert list(found) == ["ema-long"]
    assert "ema.halflife-mimg (now 0.5)" in found["ema-long"].remedy


@pytest.mark.parametrize("kind", ["none", "power"])
def test_an_average_that_is_too_short(kind: str, teacher: Trained, tmp_path: Path) -> None:
    """Noisy steps, which want averaging: a large rate, small batches, hardly any momentum, all times weighted alike."""
    noisy = {"optimizer.lr": 0.03, "optimizer.betas": (0.0, 0.5), "objective.adaptive_weight": False}
    small = {"loop.iterations": 60, "loop.batch_size": 8, "loop.log_every": 2, "ema.kind": kind}
    train(tmp_path, {**STUDENT, **CONSTANT, **noisy, **small}, teacher[0])
    assert list(diagnosed(tmp_path)) == (["ema-short"] if kind == "none" else [])
    if kind == "none":
        assert "ema.kind power" in diagnosed(tmp_path)["ema-short"].remedy


def test_data_of_another_scale(tmp_path: Path) -> None:
    train(tmp_path, {**TEACHER, "data.normalize": "symmetric", "loop.iterations": 8})
    found = diagnosed(tmp_path)
    assert list(found) == ["data-scale"]
    assert "data.normalize to measured (now symmetric)" in found["data-scale"].remedy


def test_every_check_has_been_provoked() -> None:
    """The names above, by the tests above and those of numbers that go wrong."""
    files = (Path(__file__), Path(__file__).parents[1] / "training" / "test_guard_doctor.py")
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    assert len(ALL) == len(CHECKS)
    for name in ALL:
        assert text.count(f'"{name}"') >= 2, name


# With less to go by --------------------------------------------------------------------------------------------------


def test_without_instruments_the_weights_still_tell(teacher: Trained, student: Trained, tmp_path: Path) -> None:
    """The same embedding derivative and weighting as the log of a run with instruments has."""
    bare = tmp_path / "bare"
    train(bare, {**STUDENT, "loop.instruments": False}, teacher[0])
    seen = read_record(bare).weights
    last = read_record(student[1]).lines[-1]
    assert seen["weight_by_time"] == pytest.approx(last["weight_by_time"], rel=1e-5)
    assert seen["embedding_derivative_end"] == pytest.approx(last["embedding_derivative_end"], rel=0.02)  # averaged weights
    needed = ["half-precision", "ema-short", "ema-long", "data-scale"]
    outcome = names(examine(bare))
    assert outcome == {"found": [], "sound": [name for name in ALL if name not in needed], "not seen": needed}
    assert all("loop.instruments" in missing.reason for missing in examine(bare).not_seen)


def test_without_weights_the_log_alone(student: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(student[1] / name, folder / name)
    assert names(examine(folder)) == {"found": [], "sound": ALL, "not seen": []}
    assert not examine(folder).record.finished


def test_a_run_that_has_just_begun(teacher: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after its first line of log: what needs more of it is left open."""
    trainer = tiny_trainer(tmp_path, {**STUDENT, "objective.tangent.warmup": 1000}, teacher=teacher[0])
    step = trainer.step

    def interrupted() -> Any:
        if trainer.iteration == 5:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    outcome = examine(tmp_path)
    assert outcome.record.iteration == 4
    assert outcome.diagnoses == []
    assert "ema-short" in [missing.name for missing in outcome.not_seen]


def test_a_custom_network_needs_the_instruments(tmp_path: Path) -> None:
    config = tiny_config({**TEACHER, "objective.kind": "sct", "loop.iterations": 8, "loop.instruments": False})
    Trainer(config, tmp_path, network=Careless(), dataset=digits(), progress=False).run()
    missing = {outcome.name: outcome for outcome in examine(tmp_path).not_seen}
    assert isinstance(missing["time-embedding"], NotSeen)


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_finds_nothing(student: Trained, cli: Callable[..., Any]) -> None:
    result = cli("doctor", student[1])
    assert result.code == 0
    assert "nothing found" in result.out
    assert "half-precision" in result.out
    assert result.err == ""


def test_the_command_finds_something(tmp_path: Path, cli: Callable[..., Any]) -> None:
    train(tmp_path, {**TEACHER, "data.normalize": "symmetric", "loop.iterations": 8})
    result = cli("doctor", tmp_path)
    assert result.code == 1
    assert "1 diagnosis" in result.out
    assert all(len(line) <= 120 for line in result.out.splitlines()[1:])
    result = cli("doctor", tmp_path, "--json")
    assert result.code == 1
    facts = json.loads(result.out)
    assert [diagnosis["name"] for diagnosis in facts["diagnoses"]] == ["data-scale"]
    assert set(facts["diagnoses"][0]) == {"name", "title", "evidence", "remedy"}


@pytest.mark.parametrize("state", ["missing", "empty", "begun", "damaged"])
def test_what_cannot_be_examined(state: str, tmp_path: Path, cli: Callable[..., Any], teacher: Trained) -> None:
    folder = tmp_path / "run"
    if state != "missing":
        folder.mkdir()
    if state in ("begun", "damaged"):
        shutil.copy(teacher[1] / "config.json", folder)
    if state == "damaged":
        (folder / "metrics.jsonl").write_text("[1, 2]\n")
    result = cli("doctor", folder)
    assert result.code == 2
    assert result.err.count("\n") == 1
    with pytest.raises(UserError, match=r"; expected .*; "):
        examine(folder)


def test_examining_changes_nothing(student: Trained) -> None:
    before = {path: path.stat().st_mtime_ns for path in student[1].rglob("*")}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    examine(student[1])
    assert {path: path.stat().st_mtime_ns for path in student[1].rglob("*")} == before
    assert torch.equal(torch.get_rng_state(), state)


def test_settings_can_be_read_back(student: Trained) -> None:
    assert dataclasses.asdict(read_record(student[1]).config)["loop"]["instruments"] is True
