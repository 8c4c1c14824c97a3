"""The configuration: to JSON and back, and what validation refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest

from training.tiny import change, tiny_config
from trigflow.lab.recipes import RECIPES
from trigflow.networks import MLPConfig
from trigflow.runtime.errors import UserError
from trigflow.training.config import RunConfig, from_dict, to_dict


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_every_recipe_survives_json(name: str, role: str) -> None:
    config: RunConfig = getattr(RECIPES[name], role)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_an_mlp_configuration_survives_json() -> None:
    config = RunConfig(network=MLPConfig(features=5, depth=1), teacher="runs/teacher")
    raw = to_dict(config)
    assert raw["network"]["kind"] == "mlp"
    assert from_dict(raw) == config


def test_whole_numbers_may_stand_for_floats() -> None:
    config = tiny_config({"objective.kind": "scd", "objective.guidance_max": 2, "optimizer.lr": 1})
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_from_dict_leaves_its_argument_alone() -> None:
    raw = to_dict(RunConfig())
    before = copy.deepcopy(raw)
    from_dict(raw)
    assert raw == before


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("surprise", 1, "surprise"),
        ("loop.surprise", 1, "surprise"),
        ("network.surprise", 1, "surprise"),
        ("loop.iterations", "many", "loop.iterations"),
        ("loop.iterations", 1.5, "loop.iterations"),
        ("optimizer.name", "sgd", "optimizer.name"),
        ("optimizer.betas", [0.9], "optimizer.betas"),
        ("network.mult", [1, "2"], "mult"),
        ("network.kind", "transformer", "transformer"),
        ("network.kind", [], "list"),
        ("network", "unet", "configuration"),
        ("network", None, "configuration"),
        ("data", [], "data"),
        ("process.sigma_data", -1.0, "sigma_data=-1.0"),
        ("objective.proposal.std", 0.0, "std=0.0"),
    ],
)
def test_unreadable_configurations(path: str, value: Any, named: str) -> None:
    raw = to_dict(RunConfig())
    *parents, last = path.split(".")
    place = raw
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(UserError) as caught:
        from_dict(raw)
    message = str(caught.value)
    assert named in message
    assert "; expected" in message
    assert "\n" not in message


def test_a_kind_on_the_class_of_another_is_refused() -> None:
    """`dataclasses.replace(..., kind=...)` changes the name alone: what is trained would be another loss than it says."""
    config = RunConfig()
    wrong = dataclasses.replace(config, objective=dataclasses.replace(config.objective, kind="sct"))
    with pytest.raises(UserError) as error:
        wrong.validate()
    assert all(part in str(error.value) for part in ("sct", "Diffusion", "FlowMap", "as_kind"))


@pytest.mark.parametrize("raw", [None, 3, [], {}, {"network": {}}])
def test_what_is_no_configuration_at_all(raw: Any) -> None:
    with pytest.raises(UserError, match=r"configuration cannot be (read|used)"):
        from_dict(raw)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid(name: str) -> None:
    recipe = RECIPES[name]
    recipe.teacher.validate()
    dataclasses.replace(recipe.student, teacher="runs/teacher").validate()
    with pytest.raises(UserError, match="without a teacher"):
        recipe.student.validate()


def kind_with(name: str) -> dict[str, Any]:
    """An objective that has this setting and needs no teacher: of those of diffusion, diffusion."""
    return {"objective.kind": "sct"} if name.startswith(("objective.guidance", "objective.tangent")) else {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loop.iterations", 0),
        ("loop.batch_size", 0),
        ("loop.accumulate", 0),
        ("loop.accumulate", 3),
        ("loop.log_every", 0),
        ("loop.sample_every", -1),
        ("loop.checkpoint_every", -1),
        ("loop.keep", 0),
        ("optimizer.lr", 0.0),
        ("optimizer.lr", math.nan),
        ("optimizer.lr", math.inf),
        ("optimizer.betas", (0.9, 1.0)),
        ("optimizer.betas", (-0.1, 0.99)),
        ("optimizer.eps", -1e-8),
        ("optimizer.weight_decay", -0.1),
        ("optimizer.warmup", -1),
        ("optimizer.t_ref", 0),
        ("optimizer.clip", 0.0),
        ("objective.label_dropout", 1.0),
        ("objective.label_dropout", -0.1),
        ("objective.guidance_max", 0.5),
        ("objective.guidance_max", math.nan),
        ("objective.tangent.c", -0.1),
        ("objective.tangent.prior", -0.5),
        ("objective.tangent.prior", math.inf),
        ("objective.tangent.limit", 0.0),
        ("objective.tangent.warmup", -1),
        ("ema.sigma_rel", 0.0),
        ("ema.sigma_rel", 0.28),
        ("ema.halflife_mimg", 0.0),
        ("ema.rampup", -0.05),
        ("network.dropout", 1.0),
        ("network.dropout", -0.1),
    ],
)
def test_validation_names_the_setting(name: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        tiny_config({**kind_with(name), name: value}).validate()
    assert str(caught.value).startswith(f"{name} is {value}; expected ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loop.iterations", 1),
        ("loop.accumulate", 8),
        ("loop.sample_every", 0),
        ("optimizer.clip", 0.5),
        ("optimizer.betas", (0.0, 0.0)),
        ("objective.label_dropout", 0.0),
        ("objective.guidance_max", 1.0),
        ("ema.sigma_rel", 0.279),
        ("network.dropout", 0.0),
    ],
)
def test_the_ends_of_the_ranges_are_fine(name: str, value: Any) -> None:
    config = tiny_config({**kind_with(name), name: value})
    config.validate()
    assert config == change(tiny_config(kind_with(name)), {name: value})
