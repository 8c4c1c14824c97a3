"""Evaluation: figures against what they are made of, and descriptions of run folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from training.tiny import all_digits, digits, tiny_trainer
from trigflow.data import ImageDataset
from trigflow.evaluation import evaluate, feature_extractor
from trigflow.evaluation.evaluate_model import _real_images, evaluate_model, evaluations, find_times, make_reference, score
from trigflow.models.model import Model, load
from trigflow.runtime.errors import UserError
from trigflow.samplers import nfe
from trigflow.training.describe import describe_run


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Model:
    return load(teacher_folder, "cpu")


@pytest.fixture(scope="module")
def student(student_folder: Path) -> Model:
    return load(student_folder, "cpu")


class Counting:
    """A velocity network that counts its evaluations per sample, guidance branches included."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.samples = 0
        forward = model.network.forward

        def counted(x: torch.Tensor, t: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
            self.samples += len(x)
            return forward(x, t, **conditions)

        monkeypatch.setattr(model.network, "forward", counted)


@pytest.mark.parametrize("solver", ["heun", "dpm2s", "dpm++2m", "ddim"])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("steps", [1, 5])
def test_evaluations_of_a_teacher_are_the_calls_of_its_network(
    steps: int, guidance: float, solver: str, teacher: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(teacher, monkeypatch)
    teacher.sample(3, steps=steps, solver=solver, guidance=guidance)
    assert counting.samples == 3 * evaluations(teacher, steps, solver, guidance)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("steps", [None, 1, 3])
def test_evaluations_of_a_student_are_its_steps(
    steps: int | None, guidance: float, student: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(student, monkeypatch)
    student.sample(3, steps=steps, guidance=guidance)
    assert counting.samples == 3 * evaluations(student, steps, guidance=guidance)
    assert evaluations(student, steps) == (steps or 2)


def test_the_default_teacher_takes_35_evaluations(teacher: Model) -> None:
    assert evaluations(teacher, None) == nfe("heun", 18) == 35


def test_scores_are_those_of_the_samples(student: Model) -> None:
    reference = make_reference(all_digits())
    result = score(student, reference, num=40, steps=1, seed=3)
    expected = evaluate(student.sample(40, steps=1, seed=3), all_digits().images, feature_extractor("digits"))
    for name in ("fd", "fd_real", "precision", "recall"):
        assert result[name] == pytest.approx(getattr(expected, name), rel=1e-6)
    assert (result["nfe"], result["num"]) == (1, 40)
    assert result["samples_per_second"] > 0


def test_evaluate_model(student: Model) -> None:
    result = evaluate_model(student, num=40, steps=1, guidance=1.5)
    assert list(result) == [
        "fd",
        "fd_real",
        "precision",
        "recall",
        "density",
        "coverage",
        "nfe",
        "num",
        "samples_per_second",
        "data",
        "features",
        "seeds",
    ]
    assert (result["data"], result["features"], result["num"]) == ("digits", "digits", 40)
    assert result["fd"] > result["fd_real"] > 0  # four iterations of training draw nothing like a digit


def test_real_images_score_well() -> None:
    """The measure itself: real digits in place of samples are near the floor, noise is far off."""
    first, second = all_digits().split(0.5, seed=0)
    reference = make_reference(first)
    real, noise = reference.score(second.images), reference.score(torch.randint_like(second.images, 256))
    assert real.fd < 3 * real.fd_real
    assert noise.fd > 20 * real.fd
    assert real.precision > 0.8 > 0.2 > noise.precision


def test_a_folder_may_be_called_as_data_that_come_along(student: Model, tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    for i, image in enumerate(all_digits().images[:8, 0]):
        Image.fromarray(image.numpy()).save(tmp_path / "digits" / f"{i}.png")
    result = evaluate_model(student, num=8, data=str(tmp_path / "digits"))
    assert (result["data"], result["features"]) == ("digits", "pixels")


def test_a_score_at_given_times_counts_their_evaluations(student: Model) -> None:
    assert score(student, make_reference(all_digits(), "pixels"), num=4, times=(1.5, 1.0, 0.5))["nfe"] == 3


def test_features_by_data_or_by_name(student: Model) -> None:
    assert evaluate_model(student, num=8, features="pixels")["features"] == "pixels"
    named = dataclasses.replace(all_digits(), name="photos")
    assert make_reference(named).features.shape[1] == 64  # 8x8 pixels
    assert make_reference(named, "digits").features.shape == make_reference(all_digits()).features.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": "clip"}, "unknown features 'clip'"),
        ({"features": "mnist"}, r"images of shape \(1797, 1, 8, 8\)|expects \(b, 1, 28, 28\)"),
        ({"data": "nowhere"}, "no data named 'nowhere'"),
        ({"num": 0}, "0 samples"),
        ({"num": 1}, "1 samples to measure; expected at least 4; raise --num"),
        ({"steps": 0}, "expected at least 1"),
        ({"guidance": 9.0}, "guidance 9; expected a scale in"),
    ],
)
def test_what_cannot_be_evaluated(arguments: dict[str, Any], message: str, student: Model) -> None:
    with pytest.raises(UserError, match=message) as caught:
        evaluate_model(student, **arguments)
    assert "\n" not in str(caught.value)


def test_times_are_those_of_the_smallest_distance(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, looked_at = load(student_folder, "cpu"), []
    how: dict[str, Any] = {"num": 40, "features": "pixels", "first": 7}
    with monkeypatch.context() as patch:
        patch.setattr(
            "trigflow.evaluation.evaluate_model._real_images", lambda *args: looked_at.append(1) or _real_images(*args)
        )
        times = find_times(model, steps=2, **how)
    assert len(looked_at) == 1
    assert model.times == {2: times}
    found = evaluate_model(model, steps=2, **how)["fd"]
    for middle in (0.3, 1.1, 1.45):
        model.times[2] = (times[0], middle)
        assert found <= evaluate_model(model, steps=2, **how)["fd"] * 1.01


def test_what_is_known_of_the_data_changes_no_number(student: Model) -> None:
    how: dict[str, Any] = {"num": 40, "features": "pixels", "steps": 1}
    known: list[Any] = []
    first, again, alone = (evaluate_model(student, **how, **more) for more in ({"known": known}, {"known": known}, {}))
    assert len(known) > 0
    for result in (first, again, alone):
        del result["samples_per_second"]
    assert first == again == alone


def test_a_failed_search_leaves_the_times(student_folder: Path, teacher: Model) -> None:
    model = load(student_folder, "cpu")
    model.times[2] = (model.process.t_max, 0.9)
    with pytest.raises(UserError, match="unknown features"):
        find_times(model, steps=2, features="clip")
    assert model.times == {2: (model.process.t_max, 0.9)}
    with pytest.raises(UserError, match="expected a student without segments"):
        find_times(teacher, steps=2)


def test_data_of_another_shape(student: Model, photos: Callable[..., Path]) -> None:
    folder = photos("a.png", "b.png", "c.png", "d.png")
    with pytest.raises(UserError, match=r"data of shape \(3, 10, 12\) for a model that draws \(1, 8, 8\); expected the same"):
        evaluate_model(student, num=8, data=str(folder))


# Descriptions --------------------------------------------------------------------------------------------------------


def test_a_finished_teacher(teacher_folder: Path, teacher: Model) -> None:
    facts = json.loads(describe_run(teacher_folder, as_json=True))
    assert facts["objective"] == "diffusion"
    assert facts["kind"] == "diffusion"
    assert facts["data"] == "digits"
    assert facts["finished"] is True
    assert (facts["iterations"], facts["iteration"], facts["newest checkpoint"]) == (6, 6, 6)
    assert facts["parameters"] == sum(p.numel() for p in teacher.network.parameters())
    assert facts["image shape (c, h, w)"] == [1, 8, 8]
    assert facts["classes"] == 10
    assert facts["guidance"] == "classifier-free"
    assert facts["skipped"] == 0
    written = json.loads((teacher_folder / "config.json").read_text())
    assert {"format": 2, "trigflow": written["trigflow"], **facts["config"]} == written


def test_a_finished_student_and_an_unconditional_teacher(student_folder: Path, unconditional_folder: Path) -> None:
    facts = json.loads(describe_run(student_folder, as_json=True))
    assert (facts["kind"], facts["guidance"], facts["objective"]) == ("consistency", "1 to 2.0", "scd")
    facts = json.loads(describe_run(unconditional_folder, as_json=True))
    assert (facts["classes"], facts["guidance"]) == (0, "none")


def test_the_text_says_the_same(student_folder: Path) -> None:
    text = describe_run(student_folder)
    for words in ("consistency", "1 to 2.0", "loop.batch_size", "objective.tangent.warmup", "network.width"):
        assert words in text
    lines = dict(line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  optimizer.") and "clip" not in line)
    assert lines["optimizer.lr"] == "0.002"


def test_a_run_that_has_not_finished(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    trainer.run()
    (tmp_path / "run" / "model.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    facts = json.loads(describe_run(tmp_path / "run", as_json=True))
    assert facts["finished"] is False
    assert facts["newest checkpoint"] is None
    assert "kind" not in facts
    assert "iteration" not in facts


def test_of_a_model_without_its_run_only_what_is_known_is_said(student_folder: Path, tmp_path: Path) -> None:
    """The defaults of a training are not those that it had."""
    for name in ("model.json", "network.safetensors"):
        shutil.copy(student_folder / name, tmp_path / name)
    facts = json.loads(describe_run(tmp_path, as_json=True))
    assert (facts["objective"], facts["data"], facts["iterations"]) == ("scd", "digits", None)
    assert facts["config"].keys() == {"format", "data", "process", "network"}
    assert "optimizer.lr" not in describe_run(tmp_path)
    raw = json.loads((tmp_path / "model.json").read_text())
    del raw["origin"]
    (tmp_path / "model.json").write_text(json.dumps({**raw, "origin": {"imported": "elsewhere"}}))
    facts = json.loads(describe_run(tmp_path, as_json=True))
    assert (facts["objective"], facts["data"], facts["config"].keys()) == (
        "consistency", None, {"format", "process", "network"}
    )  # fmt: skip


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"objective": 3}'])
def test_a_damaged_configuration(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"cannot be (read|used)") as caught:
        describe_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_run_at_all(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"holds no config\.json; expected a run folder written by trigflow; check"):
            describe_run(folder)


def test_data_come_from_the_origin_of_the_model(student: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_data(config: Any, progress: bool = False) -> ImageDataset:
        asked.append(config)
        return digits()

    monkeypatch.setattr("trigflow.evaluation.evaluate_model.load_data", load_data)
    model = dataclasses.replace(student, origin={"data": {"source": "photos", "resize": 8}})
    assert evaluate_model(model, num=8, steps=1)["num"] == 8
    assert (asked[0].source, asked[0].resize) == ("photos", 8)
