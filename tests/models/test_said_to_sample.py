"""What `Model.sample` is told: the same whatever form it is given in, and one line for what it cannot be."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploy.students import student
from trigflow.cli.models import Sample
from trigflow.conditions import Conditioner, Encoded, Numbers, Text
from trigflow.data.photo import read_photo
from trigflow.models.model import Model
from trigflow.models.outside import model_of
from trigflow.runtime.errors import UserError
from trigflow.runtime.values import number, whole


def teacher(**changes: Any) -> Model:
    model = student(kind="diffusion")
    return dataclasses.replace(model, sampling=dataclasses.replace(model.sampling, guided=True), **changes)


class Blown(nn.Module):
    """A network that is told `wind`, so many numbers, and cannot do without."""

    takes = frozenset({"wind"})

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.linear = nn.Linear(numbers, 1)

    def forward(self, x: Tensor, t: Tensor, wind: Tensor) -> Tensor:
        return x + self.linear(wind)[:, :, None, None]


class Still(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x)


def blown(numbers: int) -> Model:
    return model_of(Blown(numbers), (1, 8, 8), conditioner=Conditioner({"wind": Numbers("wind", (numbers,))}))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_on_the_way_to_the_same_seed_the_noise_stays(share: float) -> None:
    model = student()
    assert torch.equal(model.sample(4, seed=1, toward=(1, share)), model.sample(4, seed=1))
    with pytest.raises(UserError, match="a share of 2 of another noise"):
        model.sample(4, seed=1, toward=(1, 2.0))


def test_steps_as_a_tensor_find_the_times_of_a_search() -> None:
    model = student(times={3: (1.5, 0.9, 0.2)})
    assert torch.equal(model.sample(4, steps=torch.tensor(3)), model.sample(4, steps=3))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=re.escape("steps is 3.5; expected a whole number")):
        model.schedule(3.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"times": "ab"}, "times is 'ab'; expected a row of numbers"),
        ({"times": 1.0}, "times is 1.0; expected a row of numbers"),
        ({"times": [1.0, "a"]}, "times[1] is 'a'; expected a number"),
        ({"times": [None]}, "times[0] is None; expected a number"),
        ({"toward": 5}, "toward is 5; expected 2 numbers"),
        ({"toward": (1,)}, "toward is (1,); expected 2 numbers"),
        ({"toward": (1, "a")}, "toward[1] is 'a'; expected a number"),
        ({"negative": "run"}, "negative is 'run'; expected a Model"),
        ({"edit": torch.zeros(1, 8, 8)}, "edit is a Tensor; expected a Edit"),
        ({"solver": ["heun"]}, "unknown solver '['heun']'"),
        ({"seed": torch.tensor(True)}, "seed is tensor(True); expected a whole number"),
        ({"guidance": torch.tensor(True)}, "guidance is tensor(True); expected a number"),
    ],
)
def test_what_sample_cannot_be_told(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        student().sample(2, **wrong)


@pytest.mark.parametrize("interval", [5, "ab", (1.0,), (None, 1.0), ("a", 1.0), (1.0, 2.0, 3.0)])
def test_no_interval_of_guidance(interval: Any) -> None:
    with pytest.raises(UserError, match="guidance interval"):
        teacher().sample(2, guidance=2.0, guidance_interval=interval)


def test_truth_values_of_tensors_are_no_numbers() -> None:
    for check in (whole, number):
        with pytest.raises(UserError, match="value is tensor"):
            check(value=torch.tensor(True))
        check(value=torch.tensor(3))


def test_a_negative_that_is_told_otherwise() -> None:
    """What one of them reads, the other would read as something else."""
    with pytest.raises(UserError, match=r"is told wind by .* and its negative by .*; expected the same"):
        blown(2).sample(2, guidance=2.0, negative=blown(3))
    with pytest.raises(UserError, match="no wind for a network that takes it"):
        model_of(Still(), (1, 8, 8)).sample(2, guidance=2.0, negative=blown(2))
    assert blown(2).sample(2, guidance=2.0, negative=model_of(Still(), (1, 8, 8))).shape == (2, 1, 8, 8)
    model = teacher()
    clip, moved = (Encoded(path, digest="a", features=4) for path in ("clip", "moved/clip"))
    other = dataclasses.replace(clip, digest="b")

    def reads(text: Any) -> Model:
        return dataclasses.replace(model, conditioner=Conditioner({**model.conditioner.inputs, "text": text}))

    from trigflow.models.negative import check_guidance

    for one, two in ((Text(8), Text(20)), (clip, moved), (clip, dataclasses.replace(clip, length=20))):
        check_guidance(reads(one), reads(two))
    for one, two in ((clip, other), (clip, Text(8))):
        with pytest.raises(UserError, match="is told text by"):
            check_guidance(reads(one), reads(two))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_is_a_row_of_one(shape: tuple[int, ...]) -> None:
    """As `--conditions wind=0.5` says it, which has no other way."""
    rows = Numbers("wind", shape).rows(0.5, 3, 0)["wind"]
    assert torch.equal(rows, torch.full((3, *shape), 0.5))


def test_weights_of_the_same_class_add_up(student_folder: Any) -> None:
    sample = Sample(student_folder, labels=("3", "7", "3"), weights=(1.0, 1.0, 2.0))
    assert sample._mixed(sample.labels, mix=True) == {"3": 3.0, "7": 1.0}


def test_a_file_to_begin_at_for_a_model_of_vectors() -> None:
    with pytest.raises(UserError, match=re.escape("a picture for a model that draws shape (64,); expected one of pictures")):
        read_photo(b"", (64,))
