"""What is said to a model means the same, and is refused in the same words, wherever it is said."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from deploy.students import NAMES, Windy, named, student, windy
from trigflow.conditions import Classes, Conditioner, Numbers
from trigflow.deploy import Engine
from trigflow.deploy.export import export_network
from trigflow.deploy.pipeline import TrigFlowPipeline
from trigflow.models.model import Model, load
from trigflow.models.outside import model_of
from trigflow.runtime.errors import UserError
from trigflow.serve.drawing import draw_together
from trigflow.serve.limits import Limits
from trigflow.serve.noise import NoiseSource
from trigflow.serve.offers import offer_of

STUDENT = named(student())
Door = Callable[[Model, Any], Tensor]


def by_sample(model: Model, labels: Any) -> Tensor:
    return model.sample(3, labels=labels, seed=5)


def by_engine(model: Model, labels: Any) -> Tensor:
    fresh = [model.noise(5, 1, 0, 3)] if model.kind == "consistency" else []
    return Engine(model, variant="plain", steps=2).draw(model.noise(5, 0, 0, 3), labels, fresh=fresh)


def by_pipeline(model: Model, labels: Any) -> Tensor:
    pipe = TrigFlowPipeline.from_model(model)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return (pipe(labels, batch_size=3, generator=generator, output_type="pt").images * 255).round().to(torch.uint8)


def by_server(model: Model, labels: Any) -> Tensor:
    offer = offer_of(model, Limits())
    order = offer.order(seed=5, count=3, labels=labels)
    return draw_together(offer.drawers[0], NoiseSource(model), [order])[0]


DOORS: dict[str, Door] = {"sample": by_sample, "engine": by_engine, "pipeline": by_pipeline, "server": by_server}


def one_hot(*labels: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(labels), 10)


@pytest.mark.parametrize("door", DOORS)
def test_names_numbers_and_one_hot_rows_are_the_same_classes(door: str) -> None:
    draw = DOORS[door]
    expected = draw(STUDENT, [3, 7, 0])
    for said in (
        ["three", "seven", "zero"],
        ["three", 7, "0"],
        ("three", np.int64(7), torch.tensor(0)),
        torch.tensor([3, 7, 0], dtype=torch.int32),
        np.array([3, 7, 0]),
        one_hot(3, 7, 0),
        one_hot(3, 7, 0).float(),
        one_hot(3, 7, 0).bool(),
        one_hot(3, 7, 0).numpy(),
    ):
        assert torch.equal(draw(STUDENT, said), expected), said
    alone = draw(STUDENT, [4, 4, 4])
    assert not torch.equal(alone, expected)
    for said in (4, "four", "4", np.int64(4), torch.tensor(4), ["four"], one_hot(4)):
        assert torch.equal(draw(STUDENT, said), alone), said


def test_the_doors_draw_the_same_pictures() -> None:
    """Of the same noise; a pipeline draws its own."""
    expected = by_sample(STUDENT, "five")
    assert torch.equal(by_server(STUDENT, "five"), expected)
    assert (by_engine(STUDENT, "five").int() - expected.int()).abs().max() <= 1


BAD: list[tuple[Any, str]] = [
    (2.5, "labels: 2.5 is no class; expected a whole number or a name"),
    ([1, 2.0, 3], "labels: 2.0 is no class"),
    (torch.tensor([0.5, 1.0, 2.0]), "labels of type torch.float32; expected integers"),
    (np.array([1.0, 2.0, 3.0]), "labels of type torch.float64; expected integers"),
    (torch.tensor([True, False, True]), "labels of type torch.bool"),
    (True, "labels: True is no class"),
    (10, "label 10 is out of range; expected 0 to 9 for 10 classes"),
    ([0, -1, 3], "label -1 is out of range; expected 0 to 9"),
    (torch.tensor([0, 1, 12]), "label 12 is out of range"),
    (10**30, f"label {10**30} is out of range; expected 0 to 9"),
    ("cat", "labels: there is no class 'cat'; expected one of zero, one, two"),
    (["one", "Two"], "labels: there is no class 'Two'"),
    (b"one", "labels: b'one' is no class"),
    ([], "an empty list of labels; expected at least one class"),
    (torch.zeros(0, dtype=torch.int64), "an empty list of labels"),
    (torch.zeros(3, 10), "labels of shape (3, 10) that are not one-hot"),
    (torch.full((3, 10), 0.1), "labels of shape (3, 10) that are not one-hot"),
    (torch.eye(3), "labels of shape (3, 3) that are not one-hot; expected rows of 10 numbers"),
    (torch.zeros(3, 1, 10), "labels of shape (3, 1, 10); expected one class, (n,), or one-hot (n, 10)"),
    ([[1, 2]], "labels: [1, 2] is no class"),
]


@pytest.mark.parametrize(("said", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_bad_labels_are_refused_in_the_same_words_everywhere(said: Any, words: str) -> None:
    found = {}
    for name, draw in DOORS.items():
        with pytest.raises(UserError) as caught:
            draw(STUDENT, said)
        found[name] = str(caught.value).replace("class_labels", "labels")
        assert "\n" not in found[name]
    assert found["sample"].startswith(words)
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("said", [0, "one", torch.tensor([1]), []])
def test_a_label_for_an_unconditional_model_is_refused_everywhere(said: Any, unconditional_folder: Path) -> None:
    teacher = load(unconditional_folder, "cpu")
    model = dataclasses.replace(teacher, sampling=STUDENT.sampling)
    for name, draw in DOORS.items():
        with pytest.raises(UserError) as caught:
            draw(model, said)
        assert str(caught.value) == "labels for an unconditional model; expected none; leave labels out", name
        assert draw(model, None).shape == (3, 1, 8, 8)


def test_weights_of_a_mix_are_said_by_name_or_number() -> None:
    offer = offer_of(STUDENT, Limits())
    expected = offer.order(labels={"3": 0.25, "7": 0.75})
    assert expected.mixes == (((3, 0.25), (7, 0.75)),)
    assert offer.order(labels={"seven": 3.0, "three": 1.0}).mixes == expected.mixes
    with pytest.raises(UserError, match="labels: there is no class 'cat'; expected one of zero"):
        offer.order(labels={"three": 1.0, "cat": 1.0})


# A condition of one's own ---------------------------------------------------------------------------------------------

WINDS = torch.tensor([[0.5, -2.0], [3.0, 1.0], [0.0, 4.0]])


def levels(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("kind", ["consistency", "diffusion"])
@pytest.mark.parametrize("variant", ["plain", "traced"])
def test_an_engine_draws_with_a_condition_of_several_numbers(variant: str, kind: Any) -> None:
    model = windy(kind)
    engine = Engine(model, steps=2, variant=variant)
    noise = model.noise(1, 0, 0, 3)
    fresh = [model.noise(1, 1, 0, 3)][: engine.fresh_needed()]

    def both(**conditions: Any) -> Tensor:
        drawn = engine.draw(noise, "three", fresh=fresh, conditions=conditions)
        expected = model.sample(3, steps=2, labels=3, seed=1, conditions=conditions)
        assert levels(drawn, expected) <= 1
        return drawn

    calm, windward, rows = both(), both(wind=(3, 1)), both(wind=WINDS)
    assert levels(calm, windward) > 3
    assert levels(rows[1], windward[1]) <= 1
    assert levels(rows[2], windward[2]) > 3
    assert levels(both(wind=[1, -1]), calm) <= 1  # what is meant where nothing is said
    for bad, words in (
        ({"wind": [1.0, 2.0, 3.0]}, r"wind of shape \(3,\); expected finite numbers of shape \(2,\)"),
        ({"wind": [1.0, float("nan")]}, r"wind of shape .*expected finite"),
        ({"wind": "strong"}, "wind: 'strong' are no numbers"),
        ({"rain": 1.0}, "rain for a model that takes no such condition; expected labels, wind"),
    ):
        for draw in (
            lambda bad=bad: engine.draw(noise, 3, fresh=fresh, conditions=bad),
            lambda bad=bad: model.sample(3, steps=2, labels=3, conditions=bad),
            lambda bad=bad: offer_of(model, Limits()).order(labels=3, conditions=bad),
        ):
            with pytest.raises(UserError, match=words) as caught:
                draw()
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [2, 4])
def test_rows_that_no_sample_would_get_are_refused(rows: int) -> None:
    """An engine and a pipeline take one row, or one a sample; `Model.sample` and the server take rows in turn."""
    model = windy()
    wind = torch.ones(rows, 2)
    with pytest.raises(UserError, match=f"^{rows} rows of wind for 3 samples; expected one, or one per sample; "):
        Engine(model, steps=1, variant="plain").draw(model.noise(0, 0, 0, 3), 0, conditions={"wind": wind})
    pipe = TrigFlowPipeline.from_model(STUDENT)
    pipe.network.model.conditioner = model.conditioner
    with pytest.raises(UserError, match=r"^4 rows of wind for 3 images; expected from 1 to 3; "):
        pipe(batch_size=3, conditions={"wind": torch.ones(4, 2)})
    assert model.sample(3, conditions={"wind": wind}).shape == (3, 1, 8, 8)
    assert len(offer_of(model, Limits()).order(count=3, conditions={"wind": wind}).conditions["wind"]) == 3


@pytest.mark.parametrize("door", ["sample", "engine", "pipeline"])
def test_a_class_is_said_once(door: str) -> None:
    draw: dict[str, Any] = {
        "sample": functools.partial(STUDENT.sample, 3, steps=1),
        "engine": functools.partial(Engine(STUDENT, steps=1, variant="plain").draw, STUDENT.noise(0, 0, 0, 3)),
        "pipeline": functools.partial(TrigFlowPipeline.from_model(STUDENT), batch_size=3, output_type="pt"),
    }
    labels = "class_labels" if door == "pipeline" else "labels"
    with pytest.raises(UserError, match=r"^labels, and a label among the conditions; expected one of them; "):
        draw[door](**{labels: 3}, conditions={"label": 5})
    with pytest.raises(UserError, match=r"^conditions \['wind'\]; expected values by name; "):
        draw[door](**{labels: 3}, conditions=["wind"])
    draw[door](conditions={"label": 5})
    draw[door](**{labels: 5}, conditions={"label": None})


def test_the_classes_of_a_conditioner_are_those_of_the_model() -> None:
    told = Conditioner({"label": Classes(10, NAMES), "wind": Numbers("wind", (2,))})
    model = model_of(Windy(), (1, 8, 8), conditioner=told)
    assert (model.num_classes, model.class_names, model.spec.conditioning.num_classes) == (10, NAMES, 10)
    for wrong in ({"num_classes": 9}, {"class_names": NAMES[::-1]}, {"conditioner": Conditioner({})}):
        with pytest.raises(UserError, match=r"a network that takes label, wind, .* classes and .* names; expected"):
            model_of(Windy(), (1, 8, 8), **{"conditioner": told, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("to", ["torchscript", "onnx"])
def test_a_condition_of_several_numbers_is_an_input_of_an_exported_file(to: Any, tmp_path: Path) -> None:
    model = windy()
    assert "x, t, label, wind" in export_network(model, tmp_path, to)
    about = json.loads((tmp_path / "model.json").read_text())
    assert about["inputs"] == ["x", "t", "label", "wind"]
    assert about["null"] == {"label": 10, "wind": [0.0, 0.0]}
    assert about["conditioner"]["wind"] == {"kind": "numbers", "name": "wind", "shape": [2], "default": [1.0, -1.0]}
    assert about["conditioner"]["label"]["names"] == list(NAMES)

    def run(*given: Tensor) -> Tensor:
        if to == "torchscript":
            return torch.jit.load(str(tmp_path / "network.pt"))(*given)
        session = onnxruntime.InferenceSession(str(tmp_path / "network.onnx"))
        fed = {name: value.numpy() for name, value in zip(about["inputs"], given, strict=True)}
        return torch.from_numpy(session.run(None, fed)[0])

    x, t, label = model.noise(0, 0, 0, 3), torch.tensor([0.3, 0.9, 1.5]), torch.tensor([3, 7, 10])
    expected = model.velocity({"label": label, "wind": WINDS})(x, t)
    torch.testing.assert_close(run(x, t, label, WINDS), expected, atol=1e-4, rtol=1e-4)
    assert (run(x, t, label, -WINDS) - expected).abs().max() > 0.05


def test_a_student_of_any_jump_is_exported_as_one_that_jumps_whatever_its_gamma(tmp_path: Path) -> None:
    """The file is told the end of each jump: fresh noise from time 0 would be another sampler."""
    model = student({"objective.kind": "meanflow"})
    noisy = dataclasses.replace(model, sampling=dataclasses.replace(model.sampling, gamma=0.5))
    export_network(noisy, tmp_path, "torchscript")
    assert json.loads((tmp_path / "model.json").read_text())["sampler"] == "jump"
