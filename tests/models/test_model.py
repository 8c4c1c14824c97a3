"""Models: what they draw, and that their folders can be trusted or are refused."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deploy.students import student as digits_student
from training.tiny import all_digits, change, tiny_config, untrained_teacher
from trigflow.codecs import Pixels
from trigflow.models.model import NOISE_BLOCK, Model, based_on, load, unloaded_parts
from trigflow.models.outside import model_of
from trigflow.networks import MLPConfig
from trigflow.runtime.errors import UserError
from trigflow.runtime.machine import resolve_device
from trigflow.runtime.seeds import derive_seed
from trigflow.samplers import Sampling
from trigflow.training.setup import fit_network


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Model:
    return load(teacher_folder, "cpu")


@pytest.fixture(scope="module")
def student(student_folder: Path) -> Model:
    """A student that takes the guidance scale, in [1, 2]."""
    return load(student_folder, "cpu")


@pytest.fixture(scope="module")
def unconditional(unconditional_folder: Path) -> Model:
    return load(unconditional_folder, "cpu")


class LinearNetwork(nn.Module):
    """A network without weights."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return t.sin()[:, None, None, None] * x


class LabelNetwork(nn.Module):
    """`F = -class` everywhere, 0 for class 10 (no class): one evaluation at t_max draws almost exactly `sd class`."""

    takes = frozenset({"label"})

    def __init__(self) -> None:
        super().__init__()
        self.null = {"label": torch.tensor(10)}
        self.zero = nn.Parameter(torch.zeros(()))
        self.batches: list[int] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.batches.append(len(x))
        value = torch.where(label == self.null["label"], torch.zeros_like(label), label)
        return -value.to(x)[:, None, None, None].expand_as(x) + self.zero


def label_model(kind: Any = "consistency") -> Model:
    config = fit_network(tiny_config(), all_digits())
    # x0 = sd class = 0.5 class is decoded to the byte 10 class
    codec = Pixels((1, 8, 8), mean=(-1.0,), scale=0.5 * 127.5 / 10)
    sampling = Sampling("flow_map") if kind == "consistency" else Sampling(guided=True)
    return Model(LabelNetwork(), config.network, config.process, codec, sampling, all_digits().conditioner(["label"]))


def drawn_labels(images: Tensor) -> list[int]:
    return [round(float(image.double().mean()) / 10) for image in images]


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to one level: a batch of another size may round its sums in another order."""
    return a.shape == b.shape and int((a.int() - b.int()).abs().max()) <= 1


# Noise ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 9), (60, 70), (64, 128), (100, 300), (127, 129)])
def test_the_noise_of_a_sample_does_not_depend_on_its_neighbours(start: int, stop: int, teacher: Model) -> None:
    whole = teacher.noise(5, 0, 0, 300)
    assert torch.equal(teacher.noise(5, 0, start, stop), whole[start:stop])


def test_noise_is_new_for_every_sample_draw_and_seed(teacher: Model) -> None:
    noise = teacher.noise(0, 0, 0, 2 * NOISE_BLOCK).flatten(1)
    assert len({tuple(row.tolist()) for row in noise}) == 2 * NOISE_BLOCK
    assert not torch.equal(teacher.noise(0, 1, 0, 1), teacher.noise(0, 0, 0, 1))
    assert not torch.equal(teacher.noise(1, 0, 0, 1), teacher.noise(0, 0, 0, 1))


def test_noise_has_the_standard_deviation_of_the_process(teacher: Model) -> None:
    noise = teacher.noise(0, 0, 0, 1000)
    assert noise.std().item() == pytest.approx(0.5, rel=0.01)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.01)


def test_teacher_and_student_start_from_the_same_noise(teacher: Model, student: Model) -> None:
    assert torch.equal(teacher.noise(7, 0, 10, 90), student.noise(7, 0, 10, 90))


# Sampling ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher", "student", "unconditional"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_sample_does_not_depend_on_how_many_are_drawn_at_once(name: str, steps: int, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(name)
    whole = model.sample(70, steps=steps, seed=1)
    assert whole.shape == (70, 1, 8, 8)
    assert whole.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in whole}) > 60
    assert close(model.sample(70, steps=steps, seed=1, batch_size=7), whole)
    assert close(model.sample(5, steps=steps, seed=1), whole[:5])
    assert close(model.sample(66, steps=steps, seed=1, batch_size=65), whole[:66])


def test_the_same_seed_draws_the_same_and_another_seed_others(student: Model) -> None:
    assert torch.equal(student.sample(8, seed=1), student.sample(8, seed=1))
    assert not torch.equal(student.sample(8, seed=1), student.sample(8, seed=2))


def test_sampling_leaves_the_global_state_alone(student_folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load(student_folder, "cpu").sample(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_step_is_the_consistency_function_of_the_noise(student: Model) -> None:
    process, labels = student.process, torch.arange(6)
    noise, t = student.noise(4, 0, 0, 6), torch.full((6,), process.t_max)
    with torch.no_grad():
        velocity = 0.5 * student.network(noise / 0.5, t, label=labels, guidance=torch.full((6,), 1.5))
    expected = student.codec.stored(math.cos(process.t_max) * noise - math.sin(process.t_max) * velocity)
    assert close(student.sample(6, steps=1, seed=4, guidance=1.5), expected)


def test_a_network_without_weights_draws() -> None:
    model = model_of(LinearNetwork(), (1, 2, 2))
    assert model.device == torch.device("cpu")
    assert model.sample(2, steps=2).shape == (2, 1, 2, 2)


def test_a_model_of_no_kind() -> None:
    with pytest.raises(UserError, match="the kind 'teacher'; expected one of diffusion, consistency"):
        model_of(LinearNetwork(), (1, 2, 2), kind="teacher")  # type: ignore[arg-type]


def test_a_model_of_another_shape_than_its_codec() -> None:
    with pytest.raises(UserError, match=r"a codec of shape \(1, 4, 4\) for a model of shape \(1, 2, 2\)"):
        model_of(LinearNetwork(), (1, 2, 2), codec=Pixels.symmetric((1, 4, 4)))


@pytest.mark.parametrize("guidance", ["a", None, [1.0, 2.0]])
def test_guidance_of_a_student_is_a_number(student: Model, guidance: Any) -> None:
    with pytest.raises(UserError, match=r"guidance is .*; expected a number"):
        student.sample(2, guidance=guidance)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ({"network": None}, "network is no table"), ({"conditioner": 3}, "conditioner is no table"),
        ({"conditioner": {"label": {"kind": "classes", "many": 3}}}, "many"), ({"process": None}, "process"),
    ],
)  # fmt: skip
def test_parts_of_a_damaged_description(damage: dict[str, Any], named: str, student: Model, tmp_path: Path) -> None:
    student.save(tmp_path)
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(UserError, match=f"model.json' cannot be used .*{named}"):
        unloaded_parts(tmp_path)


def test_a_description_that_lacks_its_parts(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"format": 2}')
    for read in (unloaded_parts, based_on):
        with pytest.raises(UserError, match=r"model.json' cannot be used"):
            read(tmp_path)


def test_further_steps_add_fresh_noise_of_their_own() -> None:
    """With F = 0 a jump is `cos(t) x_t`, so the result is a known mixture of the three noises."""
    model, times = label_model(), (1.5, 1.0, 0.5)
    model = dataclasses.replace(model, codec=Pixels((1, 8, 8), mean=(0.0,), scale=0.5))
    first, second, third = (model.noise(9, k, 0, 70) for k in range(3))
    x0 = math.cos(1.5) * first
    x0 = math.cos(1.0) * (math.cos(1.0) * x0 + math.sin(1.0) * second)
    x0 = math.cos(0.5) * (math.cos(0.5) * x0 + math.sin(0.5) * third)
    images = model.sample(70, times=times, labels=0, seed=9, batch_size=33)
    assert close(images, model.codec.stored(x0))


def test_default_steps(teacher: Model, student: Model) -> None:
    assert (teacher.default_steps(), student.default_steps()) == (18, 2)
    assert torch.equal(teacher.sample(3), teacher.sample(3, steps=18))
    assert torch.equal(student.sample(3), student.sample(3, steps=2))


def test_searched_times_are_used_unless_others_are_given(student: Model) -> None:
    t_max = student.process.t_max
    searched = dataclasses.replace(student, times={2: (t_max, 0.6)})
    assert torch.equal(searched.sample(6), student.sample(6, times=(t_max, 0.6)))
    assert torch.equal(searched.sample(6, times=(t_max, 1.1)), student.sample(6))
    assert torch.equal(searched.sample(6, steps=3), student.sample(6, steps=3))
    assert not torch.equal(searched.sample(6), student.sample(6))


@pytest.mark.parametrize("solver", ["heun", "dpm2s", "dpm++2m", "ddim"])
def test_every_solver_draws(solver: str, teacher: Model) -> None:
    images = teacher.sample(4, steps=12, solver=solver)
    reference = teacher.sample(4, steps=60, solver="heun")
    difference = (images.double() - reference.double()).abs().mean().item()
    spread = (reference.double() - reference.double().mean()).abs().mean().item()
    assert difference < 0.25 * spread


# Drawing one batch, and fresh noise between jumps --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher", "student", "unconditional"])
def test_drawing_a_batch_is_what_sampling_does(name: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(name)
    told = model.conditioner.conditions(num=5)
    noise = functools.partial(model.noise, 4, start=0, stop=5)
    expected = model.sample(5, seed=4)
    with torch.no_grad():
        assert torch.equal(model.draw(noise, told), expected)
        assert torch.equal(model.draw(noise, model.velocity(told)), expected)
        sampler = model.sampler(3)
        assert torch.equal(model.draw(noise, told, sampler), model.sample(5, steps=3, seed=4))
        stored = model.draw(noise, told, finish=model.codec.stored)
        assert torch.equal(stored, model.sample(5, seed=4, decode=False))


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_drawing_a_batch_with_a_generator(name: str, request: pytest.FixtureRequest) -> None:
    """Its noise is that of the first block of `sample` where it has the block's seed; fresh noise comes after it."""
    model: Model = request.getfixturevalue(name)
    told = model.conditioner.conditions(num=NOISE_BLOCK)
    seed = derive_seed(4, "noise", 0, 0)
    with torch.no_grad():
        drawn = model.draw(torch.Generator().manual_seed(seed), told, model.sampler(1), num=NOISE_BLOCK)
        assert torch.equal(drawn, model.sample(NOISE_BLOCK, steps=1, seed=4))
        generator = torch.Generator().manual_seed(7)
        noises = [0.5 * torch.randn(3, 1, 8, 8, generator=generator) for _ in range(2)]
        rows = model.conditioner.conditions({"label": [3, 1, 4]}, 3)
        again = model.draw(torch.Generator().manual_seed(7), rows, num=3)
        assert torch.equal(again, model.draw(noises.__getitem__, rows))
        assert not torch.equal(again, model.draw(torch.Generator().manual_seed(8), rows, num=3))


@pytest.fixture(scope="module")
def any_jump() -> Model:
    """A student of any jump, with random weights."""
    return digits_student({"objective.kind": "meanflow"})


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_fresh_noise_of_a_student_of_any_jump(gamma: float, any_jump: Model) -> None:
    """Written out: each jump goes as far below the next time as the noise leads up again."""
    times, labels = (1.5, 0.9, 0.4), torch.arange(6)
    noises = [any_jump.noise(2, k, 0, 6).double() for k in range(3)]
    x, network = noises[0], copy.deepcopy(any_jump.network).double()
    for t, after, z in zip(times, (*times[1:], 0.0), (*noises[1:], noises[0]), strict=True):
        end = math.atan(math.sqrt(1 - gamma**2) * math.tan(after))
        full = torch.full((6,), t, dtype=torch.float64)
        with torch.no_grad():
            v = 0.5 * network(x / 0.5, full, label=labels, end=torch.full_like(full, end))
        x = math.cos(t - end) * x - math.sin(t - end) * v
        keep = math.cos(after) / math.cos(end)
        x = keep * x + math.sqrt(max(0.0, math.sin(after) ** 2 - (keep * math.sin(end)) ** 2)) * z
    drawn = any_jump.sample(6, times=times, seed=2, gamma=gamma)
    assert close(drawn, any_jump.codec.decode(x.float()))
    said = dataclasses.replace(any_jump, sampling=dataclasses.replace(any_jump.sampling, gamma=gamma))
    assert torch.equal(said.sample(6, times=times, seed=2), drawn)
    assert not torch.equal(any_jump.sample(6, times=times, seed=2, gamma=0.7), drawn)


def test_fresh_noise_is_none_by_default_and_one_step_has_none(any_jump: Model) -> None:
    assert torch.equal(any_jump.sample(4, steps=3), any_jump.sample(4, steps=3, gamma=0))
    assert torch.equal(any_jump.sample(4, steps=1), any_jump.sample(4, steps=1, gamma=0.8))
    several = any_jump.sample(70, steps=3, gamma=0.5)
    assert close(any_jump.sample(70, steps=3, gamma=0.5, batch_size=9), several)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan, math.inf])
def test_gamma_out_of_range(gamma: float, any_jump: Model) -> None:
    with pytest.raises(UserError, match=rf"gamma {gamma:g} for this model; expected a number in \[0, 1\]"):
        any_jump.sample(2, gamma=gamma)


def test_gamma_of_models_that_were_not_trained_for_any_jump(teacher: Model, student: Model) -> None:
    segments = digits_student({"objective.segments": 2})
    with pytest.raises(UserError, match=r"gamma 0\.5 for this model; expected 1, all that it was trained for"):
        student.sample(2, gamma=0.5)
    assert torch.equal(student.sample(2, gamma=1), student.sample(2))
    with pytest.raises(UserError, match=r"gamma 0\.5 for this model; expected 0, all that it was trained for"):
        segments.sample(2, gamma=0.5)
    assert torch.equal(segments.sample(2, gamma=0), segments.sample(2))
    for gamma in (0.0, 0.5, 1.0):
        with pytest.raises(UserError, match=rf"gamma {gamma:g} for a diffusion model; expected a student of any jump"):
            teacher.sample(2, gamma=gamma)


# Labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]),
        (3, [3] * 12),
        ([7], [7] * 12),
        ((4, 2), [4, 2] * 6),
        (torch.tensor([9, 0, 5]), [9, 0, 5] * 4),
        (list(range(9, -1, -1)) * 2, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 9, 8]),
    ],
)
@pytest.mark.parametrize("batch_size", [256, 5])
def test_labels(labels: Any, expected: list[int], batch_size: int) -> None:
    images = label_model().sample(12, steps=1, labels=labels, batch_size=batch_size)
    assert drawn_labels(images) == expected


def test_batches() -> None:
    model = label_model()
    model.sample(12, steps=2, batch_size=5)
    assert model.network.batches == [5, 5, 5, 5, 2, 2]


@pytest.mark.parametrize("labels", [10, -1, [3, 10], torch.tensor([11])])
def test_labels_out_of_range(labels: Any, teacher: Model) -> None:
    with pytest.raises(UserError, match=r"is out of range; expected 0 to 9 for 10 classes"):
        teacher.sample(2, labels=labels)


def test_labels_that_make_no_sense(teacher: Model, unconditional: Model) -> None:
    with pytest.raises(UserError, match="an empty list of labels"):
        teacher.sample(2, labels=[])
    with pytest.raises(UserError, match="labels for an unconditional model; expected none; leave labels out"):
        unconditional.sample(2, labels=0)


def test_a_class_label_changes_the_picture() -> None:
    model = untrained_teacher()
    assert not torch.equal(model.sample(2, labels=1, steps=4), model.sample(2, labels=7, steps=4))


# Guidance ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0, 0.5, 0.0])
def test_classifier_free_guidance_scales_the_difference(scale: float) -> None:
    """With `F_uncond = 0` and a velocity that depends on nothing else, the guided one is `scale` times the conditional."""
    model = label_model("diffusion")
    x, t = torch.zeros(3, 1, 8, 8), torch.full((3,), 0.5)
    velocity = model.velocity({"label": torch.tensor([2, 4, 6])}, scale)(x, t)
    assert velocity[:, 0, 0, 0].tolist() == pytest.approx([-scale * 0.5 * c for c in (2, 4, 6)])


def test_a_guided_student_takes_scales_of_its_range(student: Model) -> None:
    assert "guidance" in student.takes
    images = [student.sample(4, guidance=scale) for scale in (1.0, 1.5, 2.0)]
    assert all(image.shape == (4, 1, 8, 8) for image in images)
    for scale in (0.9, 2.1):
        with pytest.raises(UserError, match=rf"guidance {scale}; expected a scale in \[1, 2\.0\]"):
            student.sample(4, guidance=scale)


def test_models_without_guidance_say_so(unconditional: Model) -> None:
    plain = label_model("consistency")
    for model in (unconditional, plain):
        with pytest.raises(UserError, match=r"guidance 1\.5 for a model without guidance; expected 1"):
            model.sample(2, guidance=1.5)
        assert model.sample(2, steps=1, guidance=1.0).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_guidance_must_be_finite(scale: float, teacher: Model, student: Model, unconditional: Model) -> None:
    for model in (teacher, student, unconditional):
        with pytest.raises(UserError, match="expected a finite scale"):
            model.sample(2, guidance=scale)


def test_scales_per_sample_are_named_in_one_line(student: Model) -> None:
    with pytest.raises(UserError) as caught:
        student.velocity({"label": torch.arange(3)}, torch.tensor([1.0, 2.0, 5.0]))
    assert str(caught.value).startswith("guidance from 1 to 5; expected a scale in [1, 2.0]")


# Numbers out of range ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 0}, "0 samples in batches of 256; expected at least 1"),
        ({"num": -5}, "-5 samples"),
        ({"batch_size": 0}, "in batches of 0; expected at least 1"),
        ({"steps": 0}, "expected at least 1"),
        ({"steps": -1}, "expected at least 1"),
        ({"solver": "euler"}, "solver"),
    ],
)
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_numbers_out_of_range(name: str, arguments: dict[str, Any], message: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(name)
    with pytest.raises(UserError, match=message) as caught:
        model.sample(**arguments)
    assert "\n" not in str(caught.value)


def test_sampling_times(teacher: Model, student: Model) -> None:
    with pytest.raises(UserError, match="sampling times for a diffusion model"):
        teacher.sample(1, times=(1.5,))
    for times in [(), (1.0, 1.2), (math.nan,), (1.5, 0.0), (2.0,)]:
        with pytest.raises(UserError, match="expected one or more decreasing times"):
            student.sample(1, times=times)


def test_mistakes_are_found_before_a_bar_is_drawn(student: Model, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ({"guidance": 5.0}, {"labels": 99}, {"steps": 0}):
        with pytest.raises(UserError):
            student.sample(4, progress=True, **arguments)
    assert capsys.readouterr().err == ""


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher", "student", "any_jump"])
def test_a_network_in_double_precision_draws_the_same_to_rounding(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    double = dataclasses.replace(model, network=copy.deepcopy(model.network).double())
    seen = []
    double.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    drawn, expected = double.sample(4, seed=3), model.sample(4, seed=3)
    assert set(seen) == {torch.float64}
    assert (drawn.int() - expected.int()).abs().max() <= 1
    assert (drawn == expected).float().mean() > 0.95
    generator = torch.Generator().manual_seed(0)
    conditions = double.conditioner.conditions(num=2)
    assert double.draw(generator, conditions, num=2, finish=lambda x0: x0).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_says_so(dtype: torch.dtype, teacher: Model, student: Model) -> None:
    for model in (teacher, student):
        half = dataclasses.replace(model, network=copy.deepcopy(model.network).to(dtype))
        with pytest.raises(UserError, match=rf"^a network of {dtype}; expected float32, .*; draw under torch.autocast"):
            half.sample(2)


def test_save_and_load_give_the_same_model(student: Model, tmp_path: Path) -> None:
    times = {2: (student.process.t_max, 0.8), 3: (1.5, 1.0, 0.3)}
    model = dataclasses.replace(student, times=times)
    again = load(model.save(tmp_path / "deep" / "model"), "cpu")
    for name in ("spec", "process", "sampling", "conditioner", "codec", "times", "channels_last", "origin"):
        assert getattr(again, name) == getattr(model, name)
    mine, theirs = model.network.state_dict(), again.network.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(again.sample(5), model.sample(5))
    assert not again.network.training
    assert not any(p.requires_grad for p in again.network.parameters())
    assert sorted(path.name for path in (tmp_path / "deep" / "model").iterdir()) == ["model.json", "network.safetensors"]


Damage = Callable[[Path], object]


def edit(name: str, change: Callable[[Any], Any]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def cut(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.json").unlink(), "holds no model.json; expected a folder written by trigflow"),
        (lambda folder: (folder / "network.safetensors").unlink(), r"network\.safetensors' does not exist"),
        (lambda folder: (folder / "model.json").write_bytes(b"\xff\xfe{"), r"model\.json' cannot be read"),
        (cut("model.json", 0.5), r"model\.json' cannot be read"),
        (cut("network.safetensors", 0.9), r"network\.safetensors' cannot be read"),
        (cut("network.safetensors", 0.01), r"network\.safetensors' cannot be read"),
        (cut("network.safetensors", 0), r"network\.safetensors' cannot be read"),
        (edit("model.json", lambda raw: []), r"model\.json' cannot be used"),
        (edit("model.json", lambda raw: {**raw, "format": 3, "trigflow": "9.1"}), r"format 3, .*at most 2.*update.* to 9\.1"),
        (edit("model.json", lambda raw: {**raw, "format": "two"}), r"model\.json' has format 'two'"),
        (edit("model.json", lambda raw: {**raw, "sampling": {**raw["sampling"], "kind": "gan"}}), "kind 'gan'"),
        (edit("model.json", lambda raw: {**raw, "sampling": []}), "model.json' cannot be used"),
        (edit("model.json", lambda raw: {**raw, "codec": {**raw["codec"], "shape": [8, 8]}}), r"shape \(8, 8\)"),
        (edit("model.json", lambda raw: {**raw, "codec": {**raw["codec"], "shape": "square"}}), "shape 'square'"),
        (edit("model.json", lambda raw: {**raw, "codec": {**raw["codec"], "kind": "waves"}}), "kind 'waves'; .*--plugin"),
        (edit("model.json", lambda raw: {**raw, "times": {"two": [1.5]}}), "model.json' cannot be used"),
        (edit("model.json", lambda raw: {**raw, "codec": None}), "a codec saved as None"),
        (edit("model.json", lambda raw: {**raw, "codec": {}}), "a codec saved as"),
        (edit("model.json", lambda raw: {**raw, "network": {**raw["network"], "extra": 1}}), "extra"),
        (
            edit("model.json", lambda raw: {**raw, "network": {**raw["network"], "width": 16}}),
            r"belongs to another network \(.*misshapen, first 'inp\.weight' \(8, 4, 3, 3\) instead of \(16, 4, 3, 3\)",
        ),
    ],
)
def test_damaged_folders(damage: Damage, message: str, teacher_folder: Path, tmp_path: Path) -> None:
    for name in ("model.json", "network.safetensors"):  # drawing never reads the settings of the training
        shutil.copy(teacher_folder / name, tmp_path)
    assert load(tmp_path, "cpu").kind == "diffusion"
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, "cpu")
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("; ") >= 2


def test_weights_of_another_network(teacher_folder: Path, unconditional_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.json"):
        shutil.copy(teacher_folder / name, tmp_path)
    shutil.copy(unconditional_folder / "network.safetensors", tmp_path)
    with pytest.raises(UserError, match=r"another network \(1 missing, first 'conditioning\.label\.weight'\)"):
        load(tmp_path, "cpu")
    tensors = load_file(teacher_folder / "network.safetensors")
    save_file({**tensors, "stray.weight": torch.zeros(2)}, tmp_path / "network.safetensors")
    with pytest.raises(UserError, match=r"another network \(1 unexpected, first 'stray\.weight'\)"):
        load(tmp_path, "cpu")


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; expected a folder written by trigflow; check the path"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no model\.json"):
        load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file' is a file; expected a folder .*; name the folder that it is in$"):
        load(tmp_path / "file")


# Devices and networks ------------------------------------------------------------------------------------------------


def test_devices() -> None:
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device(None).type == resolve_device("auto").type == automatic
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "abacus", "", "meta"):
        with pytest.raises(UserError, match=f"device '{name}' cannot be used") as caught:
            resolve_device(name)
        assert "\n" not in str(caught.value)
    for name in ("mps", "abacus" * 100):
        with pytest.raises(UserError, match=r"there is none here\); expected cpu, cuda or auto; change --device$") as caught:
            resolve_device(name, "--device")
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("changes", "classes", "guided"),
    [
        ({}, 10, False),
        ({"objective.kind": "sct", "objective.guidance_max": 2.0}, 10, False),
        ({"objective.kind": "scd"}, 10, False),
        ({"objective.kind": "scd", "objective.guidance_max": 2.0}, 10, True),
    ],
)
def test_the_network_fits_the_data(changes: dict[str, Any], classes: int, guided: bool) -> None:
    config = fit_network(tiny_config({"network.channels": 7, **changes}), all_digits())
    conditioning = config.network.conditioning
    assert (config.network.channels, conditioning.num_classes) == (1, classes)
    assert conditioning.takes == (("guidance",) if guided else ())
    assert change(config, {"network": tiny_config().network}) == tiny_config(changes)


def test_an_mlp_draws_no_images() -> None:
    with pytest.raises(UserError, match="an MLP for images; expected a network for images"):
        fit_network(tiny_config({"network": MLPConfig()}), all_digits())
