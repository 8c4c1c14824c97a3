"""An engine draws what its model draws."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from networks.helpers import awake
from training.tiny import tiny_config, untrained_teacher
from trigflow.deploy import Engine, fast
from trigflow.deploy.fixed import FixedSizes
from trigflow.deploy.traced import Traced
from trigflow.models.model import Model, load
from trigflow.networks import build
from trigflow.runtime.errors import UserError


@pytest.fixture(scope="module")
def student(student_folder: Path) -> Model:
    """A student that takes the guidance scale, in [1, 2]."""
    return load(student_folder, "cpu")


@pytest.fixture(scope="module")
def engine(student: Model) -> Engine:
    return Engine(student, variant="traced")


def levels(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


def noises(model: Model, b: int, steps: int = 2, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    every = [model.noise(seed, k, 0, b) for k in range(steps)]
    return every[0], every[1:]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("variant", ["plain", "traced"])
def test_the_same_noise_gives_the_images_of_sample(student: Model, engine: Engine, variant: str, steps: int) -> None:
    noise, fresh = noises(student, 5, steps, seed=3)
    drawing = engine if variant == "traced" else Engine(student, steps=steps, variant="plain")
    images = drawing.draw(noise, torch.arange(5), 1.5, fresh=fresh, steps=steps)
    assert images.dtype == torch.uint8
    assert images.shape == (5, 1, 8, 8)
    assert levels(images, student.sample(5, steps=steps, guidance=1.5, seed=3)) <= 1


def test_a_model_is_drawn_from_in_every_way_with_a_fast_network(student: Model) -> None:
    quick = fast(student)
    assert isinstance(quick.network, Traced if quick.device.type == "cpu" else FixedSizes)
    assert levels(quick.sample(8, seed=2, guidance=1.3), student.sample(8, seed=2, guidance=1.3)) <= 1


def test_steps_can_be_chosen_at_each_draw(student: Model, engine: Engine) -> None:
    noise, fresh = noises(student, 3, 4)
    for steps in (1, 3, 4):
        assert engine.fresh_needed(steps) == steps - 1
        images = engine.draw(noise, 2, fresh=fresh[: steps - 1], steps=steps)
        assert levels(images, student.sample(3, steps=steps, labels=2)) <= 1


def test_a_diffusion_model_is_solved_with_and_without_guidance(teacher_folder: Path) -> None:
    teacher = load(teacher_folder, "cpu")
    engine = Engine(teacher, steps=3, variant="plain")
    assert engine.fresh_needed() == 0
    for guidance in (1.0, 2.5):
        images = engine.draw(teacher.noise(1, 0, 0, 4), torch.arange(4), guidance)
        assert levels(images, teacher.sample(4, steps=3, guidance=guidance, seed=1)) <= 1


def test_guidance_may_differ_within_a_batch(student: Model, engine: Engine) -> None:
    noise, fresh = noises(student, 3)
    scales = torch.tensor([1.0, 1.4, 2.0])
    together = engine.draw(noise, 4, scales, fresh=fresh)
    for i in range(3):
        alone = engine.draw(noise[i : i + 1], 4, float(scales[i]), fresh=[fresh[0][i : i + 1]])
        assert levels(alone[0], together[i]) <= 1


def test_a_sample_does_not_depend_on_what_it_is_drawn_with(student: Model, engine: Engine) -> None:
    noise, fresh = noises(student, 9)
    labels = torch.arange(9)
    whole = engine.draw(noise, labels, fresh=fresh)
    for start, stop in ((0, 1), (2, 7), (4, 9)):
        piece = engine.draw(noise[start:stop], labels[start:stop], fresh=[z[start:stop] for z in fresh])
        assert levels(piece, whole[start:stop]) <= 1


def test_drawing_again_gives_the_same_bits_and_earlier_images_stay(student: Model, engine: Engine) -> None:
    noise, fresh = noises(student, 4)
    first = engine.draw(noise, 1, fresh=fresh)
    kept = first.clone()
    other = engine.draw(-noise, 1, fresh=fresh)
    assert not torch.equal(other, first)
    assert torch.equal(first, kept)
    assert torch.equal(engine.draw(noise, 1, fresh=fresh), first)
    first[0] = 0  # an ordinary tensor


def test_unconditional_models_take_no_labels(unconditional_folder: Path) -> None:
    model = load(unconditional_folder, "cpu")
    engine = Engine(model, steps=2, variant="plain")
    assert levels(engine.draw(model.noise(0, 0, 0, 3)), model.sample(3, steps=2)) <= 1
    with pytest.raises(UserError, match="labels for an unconditional model; expected none"):
        engine.draw(model.noise(0, 0, 0, 3), 1)


def test_a_multistep_student_needs_no_fresh_noise() -> None:
    teacher = untrained_teacher()
    config = tiny_config({"objective.kind": "scd", "objective.segments": 2})
    conditioning = dataclasses.replace(teacher.spec.conditioning, takes=("end",))
    network = dataclasses.replace(teacher.spec, conditioning=conditioning)  # type: ignore[type-var]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = awake(build(network), scale=0.05).eval().requires_grad_(False)
    model = dataclasses.replace(teacher, network=net, spec=network, sampling=config.objective.sampling)
    engine = Engine(model, variant="plain")
    assert (engine.steps, engine.fresh_needed()) == (2, 0)
    assert levels(engine.draw(model.noise(0, 0, 0, 4), torch.arange(4)), model.sample(4)) <= 1
    with pytest.raises(UserError, match="segments"):
        Engine(model, steps=3, variant="plain")


def sizes(engine: Engine) -> set[object]:
    return {key[0] for key in engine.model.network.recorded}  # type: ignore[operator, union-attr]


def test_warming_records_the_sizes_that_will_be_asked_for(student: Model) -> None:
    engine = Engine(student, variant="traced")
    engine.warm(1, 5)
    assert sizes(engine) == {1, 8}


def test_a_settled_engine_records_nothing_more(student: Model) -> None:
    """Whatever is drawn: any batch, any number of steps, with guidance and without."""
    engine = Engine(student, variant="traced")
    assert engine.settle(10) == 8
    assert sizes(engine) == {1, 2, 4, 8}
    recorded = set(engine.model.network.recorded)  # type: ignore[arg-type]
    for b, steps, scale in ((1, 1, 1.0), (3, 2, 1.5), (9, 4, 1.0), (30, 1, 2.0)):
        noise, fresh = noises(student, b, steps, seed=b)
        images = engine.draw(noise, torch.arange(b) % 10, scale, fresh=fresh, steps=steps)
        assert levels(images, student.sample(b, steps=steps, guidance=scale, seed=b)) <= 1
    assert set(engine.model.network.recorded) == recorded  # type: ignore[arg-type]


def test_a_settled_teacher_records_nothing_more(teacher_folder: Path) -> None:
    teacher = load(teacher_folder, "cpu")
    engine = Engine(teacher, steps=1, variant="traced")
    engine.settle(2)
    for scale in (1.0, 3.0):
        images = engine.draw(teacher.noise(0, 0, 0, 3), torch.arange(3), scale, steps=2)
        assert levels(images, teacher.sample(3, steps=2, guidance=scale)) <= 1
    assert sizes(engine) == {1, 2}


def test_settling_stops_where_it_takes_too_long(student: Model) -> None:
    engine = Engine(student, variant="traced")
    assert engine.settle(64, patience=0.0) == 1
    noise, fresh = noises(student, 3)
    engine.draw(noise, 1, fresh=fresh)
    assert sizes(engine) == {1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise": torch.zeros(0, 1, 8, 8), "fresh": [torch.zeros(0, 1, 8, 8)]}, "b at least 1"),
        ({"noise": torch.zeros(2, 1, 9, 8)}, "noise of shape"),
        ({"noise": torch.zeros(2, 1, 8, 8, dtype=torch.int64)}, "noise of shape"),
        ({"fresh": []}, "fresh noise of shapes"),
        ({"fresh": [torch.zeros(3, 1, 8, 8)]}, "fresh noise of shapes"),
        ({"labels": None}, "no labels"),
        ({"labels": 10}, "10"),
        ({"labels": [1, 2, 3]}, "3 labels for 2 samples"),
        ({"labels": torch.tensor([0.5, 1.0])}, "labels of type torch.float32; expected integers"),
        ({"labels": [[1, 2]]}, r"labels: \[1, 2\] is no class; expected a whole number or a name"),
        ({"guidance": math.nan}, "finite"),
        ({"guidance": 2.5}, r"\[1, 2"),
        ({"guidance": torch.ones(3)}, "batch of 2"),
        ({"steps": 0}, "0 sampling steps|fresh noise"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(engine: Engine, changes: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"noise": torch.zeros(2, 1, 8, 8), "labels": 3, "fresh": [torch.zeros(2, 1, 8, 8)]}
    arguments |= changes
    with pytest.raises(UserError, match=said) as caught:
        engine.draw(arguments.pop("noise"), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_weights_of_another_precision_are_refused(student: Model, dtype: torch.dtype) -> None:
    other = dataclasses.replace(student, network=copy.deepcopy(student.network).to(dtype))
    with pytest.raises(UserError, match=f"^a network of {dtype}.*; expected float32"):
        Engine(other, variant="plain")


def test_numbers_are_drawn_from_no_global_generator(student: Model) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Engine(student, variant="traced").warm(1)
    assert torch.equal(torch.get_rng_state(), before)
