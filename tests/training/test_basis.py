"""What a run stands on: whatever is not as it was is found when the run is resumed, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.tiny import digits, tiny_config, tiny_trainer, untrained_teacher
from trigflow.conditions import Conditioner
from trigflow.data import Dataset, open_dataset
from trigflow.models.model import Model, load
from trigflow.runtime.errors import UserError
from trigflow.training.basis import basis_of, check_same
from trigflow.training.config import RunConfig
from trigflow.training.trainer import Trainer


def picture(path: Path, seed: int, low: int = 0, high: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.Generator(np.random.PCG64(seed)).integers(low, high, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight cats and eight dogs."""
    for number in range(16):
        picture(tmp_path / "photos" / ("cat", "dog")[number // 8] / f"{number % 8}.png", number)
    return tmp_path / "photos"


def config_of(photos: Path, iterations: int = 1) -> RunConfig:
    return tiny_config({"data.source": str(photos), "loop.iterations": iterations})


@pytest.fixture
def run(photos: Path) -> Path:
    folder = photos.parent / "run"
    Trainer(config_of(photos), folder, progress=False).run()
    return folder


def renamed(photos: Path) -> None:
    (photos / "cat").rename(photos / "zebra")


def exchanged(photos: Path) -> None:
    (photos / "cat").rename(photos / "x")
    (photos / "dog").rename(photos / "cat")
    (photos / "x").rename(photos / "dog")


def more(photos: Path) -> None:
    picture(photos / "dog" / "w.png", 99, 250, 256)


def fewer(photos: Path) -> None:
    (photos / "dog" / "7.png").unlink()


def moved(photos: Path) -> None:
    (photos / "dog" / "0.png").rename(photos / "cat" / "z.png")


def painted(photos: Path) -> None:
    picture(photos / "dog" / "3.png", 98)


def larger(photos: Path) -> None:
    for path in photos.rglob("*.png"):
        Image.open(path).resize((12, 12)).save(path)


@pytest.mark.parametrize("memory", [4.0, 0.0])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed, "the class 'zebra' is not in both"),
        (exchanged, "data of other contents"),
        (more, "data of other number of samples: 16, now 17"),
        (fewer, "data of other number of samples: 16, now 15"),
        (moved, "data of other labels"),
        (painted, "data of other contents"),
        (larger, r"data of other shape: \[1, 8, 8\], now \[1, 12, 12\]"),
    ],
)
def test_other_data_are_refused(photos: Path, run: Path, change: Callable[[Path], None], said: str, memory: float) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    change(photos)
    config = config_of(photos, 2)
    for resume in (True, "auto"):
        with pytest.raises(UserError, match=said):
            Trainer(replace(config, data=replace(config.data, memory_gib=memory)), run, resume=resume, progress=False)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_same_data_read_in_another_way_are_the_same(photos: Path, run: Path) -> None:
    """A copy with other dates, in other memory, and read by other processes."""
    shutil.copytree(photos, photos.parent / "copy")
    shutil.rmtree(photos)
    (photos.parent / "copy").rename(photos)
    config = config_of(photos, 2)
    config = replace(config, data=replace(config.data, memory_gib=0.0, workers=1))
    Trainer(config, run, resume=True, progress=False).run()


def test_data_of_a_run_whose_checkpoints_say_little(photos: Path, run: Path) -> None:
    """Checkpoints of earlier versions hold no fingerprint: names, shape and normalization are compared."""
    state = json.loads((run / "checkpoints" / "00000001" / "state.json").read_text())
    del state["basis"]
    dataset = replace(open_dataset(photos), digest="other")
    codec = load(run).codec
    check_same(state, basis_of(dataset, {}), codec)
    with pytest.raises(UserError, match="data of another mean"):
        check_same(state, basis_of(dataset, {}), replace(codec, mean=(codec.mean[0] + 0.1,)))


def test_other_teachers_are_refused(tmp_path: Path) -> None:
    teacher, other = untrained_teacher(), untrained_teacher()
    with torch.no_grad():
        next(iter(other.network.parameters())).mul_(1.01)
    changes = {"objective.kind": "scd", "loop.iterations": 1}
    tiny_trainer(tmp_path / "run", changes, teacher=teacher).run()
    with pytest.raises(UserError, match="began with a teacher of other weights"):
        tiny_trainer(tmp_path / "run", {**changes, "loop.iterations": 2}, teacher=other, resume=True)
    tiny_trainer(tmp_path / "run", {**changes, "loop.iterations": 2}, teacher=teacher, resume=True).run()


def test_fingerprints_of_data_in_memory() -> None:
    def data(values: torch.Tensor, labels: list[int], **more: torch.Tensor) -> Dataset:
        return Dataset("own", values, torch.tensor(labels), ("a", "b"), conditions=more)

    values = torch.arange(12.0).reshape(3, 4)
    one = data(values, [0, 1, 0], wind=torch.ones(3, 2)).fingerprint()
    assert one == data(values.clone(), [0, 1, 0], wind=torch.ones(3, 2)).fingerprint()
    assert one["number of samples"] == 3
    assert one["shape"] == [4]
    assert one["class names"] == ["a", "b"]

    def differing(other: Dataset) -> set[str]:
        found = other.fingerprint()
        return {name for name in one if found[name] != one[name]}

    assert differing(data(values.flip(0), [0, 1, 0], wind=torch.ones(3, 2))) == {"contents"}
    assert differing(data(values, [0, 1, 1], wind=torch.ones(3, 2))) == {"labels"}
    assert differing(data(values, [0, 1, 0], wind=torch.zeros(3, 2))) == {"condition wind"}
    three = data(values, [0, 1, 0], wind=torch.ones(3, 2))
    assert three.subset(torch.tensor([0, 2])).fingerprint() != three.subset(torch.tensor([0, 1])).fingerprint()


def named(model: Model, *first: str) -> Model:
    """The model with other names for its first classes."""
    names = [*first, *(f"class {number}" for number in range(len(first), 10))]
    return replace(model, conditioner=Conditioner.of_classes(10, names))


@pytest.mark.parametrize("names", [("cat", "dog"), ("dog", "cat")])
def test_models_of_a_run_have_its_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    teacher, other = named(untrained_teacher(), "cat", "dog"), named(untrained_teacher(), *names)
    data = replace(digits(), class_names=teacher.class_names)
    config = replace(tiny_config({"objective.kind": "scd", "objective.guidance_max": 2.0}), network=teacher.spec)

    def trainer(**models: Model) -> Trainer:
        config_of_all = replace(config, teacher="t", **dict.fromkeys(models, "m"))  # type: ignore[arg-type]
        return Trainer(config_of_all, tmp_path / "run", teacher=teacher, dataset=data, progress=False, **models)

    for role, other_role in (("start", "the start"), ("negative", "its negative")):
        if names == ("cat", "dog"):
            trainer(**{role: other})
        else:
            with pytest.raises(UserError, match=f"class 0 is 'cat' in .* and 'dog' in {other_role}"):
                trainer(**{role: other})
    if names != ("cat", "dog"):
        with pytest.raises(UserError, match="class 0 is 'cat' in the model and 'dog' in its negative"):
            teacher.sample(1, steps=1, guidance=2.0, negative=other)


def test_data_of_a_teacher_are_matched_by_name(tmp_path: Path) -> None:
    teacher = named(untrained_teacher(), "cat", "dog")
    turned = replace(digits(), class_names=tuple(reversed(teacher.class_names)))
    config = replace(tiny_config({"objective.kind": "scd"}), network=teacher.spec, teacher="t")
    trainer = Trainer(config, tmp_path / "run", teacher=teacher, dataset=turned, progress=False)
    assert trainer.dataset.class_names == teacher.class_names
    assert torch.equal(trainer.dataset.labels, 9 - digits().labels)
