"""Formats of files: what is written, what is read, what is refused. Old folders themselves are read in test_format1.py."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trigflow.conditions import Classes, Conditioner
from trigflow.migrations import FORMATS, STEPS, migrated, stamped
from trigflow.objectives import (
    Diffusion,
    Discrete,
    DiscreteConfig,
    Distribution,
    FlowMap,
    Objective,
    TangentConfig,
    objective_of,
)
from trigflow.process import Proposal
from trigflow.runtime.errors import UserError
from trigflow.training.config import from_dict, to_dict
from trigflow.version import __version__


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_written_is_read_as_it_is(kind: str) -> None:
    written = stamped(kind, {"a": 1, "b": [2]})
    assert written["format"] == FORMATS[kind]
    assert written["trigflow"] == __version__
    assert migrated(kind, written, "'x.json'") == {"a": 1, "b": [2]}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_newer_format_is_refused_with_the_version_that_reads_it(kind: str) -> None:
    newer = {"format": FORMATS[kind] + 1, "trigflow": "7.8.9"}
    with pytest.raises(UserError, match=rf"'x\.json' has format {FORMATS[kind] + 1}, .*; expected .*; .*7\.8\.9") as caught:
        migrated(kind, newer, "'x.json'")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [None, [], "text", 3])
def test_what_is_no_table_is_refused(raw: object) -> None:
    with pytest.raises(UserError, match=r"'x\.json' cannot be used"):
        migrated("report", raw, "'x.json'")


@pytest.mark.parametrize("number", ["2", 1.0, True, 0, -1, None])
def test_a_format_that_is_no_number(number: object) -> None:
    with pytest.raises(UserError, match="expected a whole number"):
        migrated("report", {"format": number}, "'x.json'")


def test_there_is_a_step_from_every_format() -> None:
    assert set(STEPS) == {(kind, step) for kind, newest in FORMATS.items() for step in range(1, newest)}


def old_config(**objective: object) -> dict[str, object]:
    return {
        "process": {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
        "network": {"kind": "unet"},
        "objective": {"kind": "scd", "segments": 1, "guidance_max": 1.0, "label_dropout": 0.1, **objective},
        "data": {"source": "digits"},
        "loop": {"channels_last": True, "seed": 4},
        "teacher": "teacher",
    }


def old_model(what: str = "consistency", **normalization: object) -> dict[str, object]:
    scaling = {"mean": [0.1], "scale": 1.5, "sigma_data": 0.5, **normalization}
    return {"kind": what, "shape": [1, 8, 8], "class_names": ["a"], "normalization": scaling, "times": {"2": [1.5, 1.0]}}


def test_a_student_takes_what_drawing_needs_from_its_configuration() -> None:
    config = old_config(guidance_max=2.0)
    found = migrated("model", old_model(), "'model.json'", config=config)
    assert found["process"] == config["process"]
    assert found["codec"] == {"kind": "pixels", "shape": [1, 8, 8], "mean": [0.1], "scale": 1.5, "sigma_data": 0.5}
    assert found["times"] == {"2": [1.5, 1.0]}
    assert found["channels_last"] is True
    assert found["origin"] == {"objective": "scd", "data": {"source": "digits"}, "teacher": "teacher", "seed": 4}
    sampling = found["sampling"]
    assert (sampling["kind"], sampling["jumps"], sampling["guidance_max"]) == ("flow_map", "zero", 2.0)
    assert sampling["guided"] is False


@pytest.mark.parametrize(
    ("objective", "jumps"),
    [({"segments": 4}, "segments"), ({"kind": "meanflow"}, "any"), ({"kind": "meanflow-distill"}, "any"), ({}, "zero")],
)
def test_where_jumps_of_old_students_end(objective: dict[str, object], jumps: str) -> None:
    found = migrated("model", old_model(), "'model.json'", config=old_config(**objective))
    assert found["sampling"]["jumps"] == jumps
    assert found["sampling"]["segments"] == objective.get("segments", 1)


@pytest.mark.parametrize(("dropout", "guided"), [(0.1, True), (0.0, False)])
def test_an_old_teacher_was_taught_guidance_by_label_dropout(dropout: float, guided: bool) -> None:
    config = old_config(kind="diffusion", label_dropout=dropout)
    found = migrated("model", old_model("diffusion"), "'model.json'", config=config)
    assert (found["sampling"]["kind"], found["sampling"]["guided"]) == ("ode", guided)


def test_old_latents_become_their_codec() -> None:
    scaling = {"kind": "latent", "raw_mean": [0.0], "raw_std": [1.0], "vae": {"name": "v", "pixels": "unit", "digest": None}}
    codec = migrated("model", old_model(**scaling), "'model.json'", config=old_config())["codec"]
    assert (codec["kind"], codec["shape"], codec["raw_std"]) == ("latents", [1, 8, 8], [1.0])


# Format 2 of configurations ------------------------------------------------------------------------------------------

OLD_OBJECTIVE: dict[str, Any] = {
    "kind": "diffusion", "proposal": {"mean": -0.8, "std": 1.6}, "adaptive_weight": False, "label_dropout": 0.2,
    "guidance_max": 2.0, "guidance_interval": [0.3, 5.0], "tangent": {
        "mode": "normalize", "c": 0.05, "limit": 2.0, "warmup": 7, "prior": 0.5, "derivative": "finite-difference",
    },
    "lambda_vsd": 0.7, "vsd_proposal": {"mean": 0.1, "std": 1.5}, "fake_lr": 1e-4, "fake_updates": 3, "segments": 1,
    "discrete": {"schedule": "ect", "steps": 32, "initial_steps": 4, "grid": "time", "solver": "heun", "q": 3.0},
    "meanflow": {"mean": -2.0, "std": 1.5, "equal": 0.25, "weighting": "error", "power": 0.75, "c": 0.01},
}  # fmt: skip
"""All settings of an objective of format 1, none of them as it is by default."""

PROPOSAL = Proposal(-0.8, 1.6)
TANGENT = TangentConfig("normalize", 0.05, 2.0, 7, 0.5, "finite-difference")
SHARED: dict[str, Any] = {"adaptive_weight": False, "guidance_max": 2.0, "guidance_interval": (0.3, 5.0)}
STUDENT: dict[str, Any] = {**SHARED, "proposal": PROPOSAL, "tangent": TANGENT}
DISCRETE = DiscreteConfig("ect", 32, 4, "time", 3.0, solver="heun")
VSD: dict[str, Any] = {"lambda_vsd": 0.7, "vsd_proposal": Proposal(0.1, 1.5), "fake_lr": 1e-4, "fake_updates": 3}
AVERAGES: dict[str, Any] = {"jumps": "any", "ends": "pair", "anchor": 0.25, "power": 0.75, "c": 0.01}


def averages(kind: str, velocity: Any, weighting: Any, mode: Any, sd: float = 0.5) -> FlowMap:
    """A tangent without warmup, prior and differences, which MeanFlow did not have."""
    return FlowMap(
        kind=kind, velocity=velocity, weighting=weighting, proposal=Proposal(-2.0 + math.log(sd), 1.5),
        tangent=TangentConfig(mode, 0.05, 2.0, 0, 0.0), **SHARED, **AVERAGES,
    )  # fmt: skip


LEARNED = {"meanflow": {**OLD_OBJECTIVE["meanflow"], "weighting": "learned"}}
MIGRATED: list[tuple[dict[str, Any], Objective]] = [
    ({"kind": "diffusion"}, Diffusion("diffusion", PROPOSAL, False, 0.2)),
    ({"kind": "sct"}, FlowMap(kind="sct", velocity="data", jumps="segments", **STUDENT)),
    ({"kind": "scd"}, FlowMap(kind="scd", velocity="teacher", jumps="segments", **STUDENT)),
    ({"kind": "scd", "segments": 4}, FlowMap(kind="scd", jumps="segments", segments=4, **STUDENT)),
    ({"kind": "vsd"}, Distribution(kind="vsd", alone=True, **STUDENT, **VSD)),
    ({"kind": "scd-vsd"}, Distribution(kind="scd-vsd", alone=False, **STUDENT, **VSD)),
    ({"kind": "ct"}, Discrete(kind="ct", velocity="data", discrete=DISCRETE, **STUDENT)),
    ({"kind": "cd"}, Discrete(kind="cd", velocity="teacher", discrete=DISCRETE, **STUDENT)),
    ({"kind": "meanflow"}, averages("meanflow", "data", "error", "normalize")),
    ({"kind": "meanflow", **LEARNED}, averages("meanflow", "data", "average", "normalize")),
    ({"kind": "meanflow-distill"}, averages("meanflow-distill", "teacher", "error", "normalize")),
    ({"kind": "meanflow-distill", **LEARNED}, averages("meanflow-distill", "teacher", "average", "normalize")),
]


def old_run(**objective: Any) -> dict[str, Any]:
    """A `config.json` as it was before files had formats."""
    return {**old_config(), "objective": {**OLD_OBJECTIVE, **objective}}


@pytest.mark.parametrize(("objective", "expected"), MIGRATED)
def test_an_old_objective_has_the_settings_of_its_class(objective: dict[str, Any], expected: Objective) -> None:
    raw = old_run(**objective)
    found = from_dict(raw)
    assert type(found.objective) is type(expected)
    assert found.objective == expected
    found.validate()
    assert from_dict(to_dict(found)) == found  # and is written as it is read
    assert raw == old_run(**objective)


@pytest.mark.parametrize("kind", [objective["kind"] for objective, _ in MIGRATED])
def test_settings_that_an_old_file_lacks_are_those_of_its_kind(kind: str) -> None:
    assert from_dict({**old_config(), "objective": {"kind": kind}}).objective == objective_of(kind)


def test_old_average_velocities_of_other_data() -> None:
    """Times were logit-normal in tau, whatever the deviation of the data; they are log-normal in sigma now."""
    raw = {**old_run(kind="meanflow"), "process": {"sigma_data": 1.0, "sigma_min": 0.002, "sigma_max": 80.0}}
    assert from_dict(raw).objective == averages("meanflow", "data", "error", "normalize", sd=1.0)


@pytest.mark.parametrize(
    ("flags", "takes"),
    [
        ({}, ()),
        ({"takes_guidance": False, "takes_end": False}, ()),
        ({"takes_guidance": True}, ("guidance",)),
        ({"takes_guidance": False, "takes_end": True}, ("end",)),
        ({"takes_guidance": True, "takes_end": True}, ("guidance", "end")),
    ],
)
def test_flags_of_an_old_network_are_names_of_what_it_takes(flags: dict[str, bool], takes: tuple[str, ...]) -> None:
    network = {"kind": "unet", "conditioning": {"num_classes": 3, "width": 8, **flags}}
    raw = {**old_run(kind="scd"), "network": network}
    conditioning = from_dict(raw).network.conditioning
    assert (conditioning.takes, conditioning.num_classes, conditioning.width) == (takes, 3, 8)
    assert network["conditioning"] == {"num_classes": 3, "width": 8, **flags}
    found = migrated("model", old_model(), "'model.json'", config=raw)["network"]["conditioning"]
    assert {**found, "takes": tuple(found["takes"])} == {"num_classes": 3, "width": 8, "takes": takes}


@pytest.mark.parametrize(("classes", "names"), [(0, ()), (1, ("a",)), (3, ())])
def test_an_old_model_is_told_its_classes(classes: int, names: tuple[str, ...]) -> None:
    """Names that are not one for each class, as of data without labels, are no names of them."""
    raw = {**old_run(kind="scd"), "network": {"kind": "unet", "conditioning": {"num_classes": classes}}}
    found = migrated("model", old_model(), "'model.json'", config=raw)
    expected = Conditioner({"label": Classes(classes, names)} if classes else {})
    assert Conditioner.from_state(found["conditioner"]) == expected
    assert "class_names" not in found


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("found", [None, 5, "a", {"file": "a"}, ["a"], [None]])
def test_plugins_that_are_none_are_refused(kind: str, found: object) -> None:
    with pytest.raises(UserError, match=r"x has plugins .*; expected a list of tables; restore the file"):
        migrated(kind, {**stamped(kind, {}), "plugins": found}, "x")
