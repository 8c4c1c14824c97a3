"""Formats of files: what is written, what is read, what is refused. Old folders themselves are read in test_format1.py."""

from __future__ import annotations

import pytest

from trigflow.migrations import FORMATS, STEPS, migrated, stamped
from trigflow.runtime.errors import UserError
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
    with pytest.raises(
        UserError, match=rf"'x\.json' has format {FORMATS[kind] + 1}, .*; expected .*; .*7\.8\.9"
    ) as caught:
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
    return {
        "kind": what,
        "shape": [1, 8, 8],
        "class_names": ["a"],
        "normalization": scaling,
        "times": {"2": [1.5, 1.0]},
    }


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
    scaling = {
        "kind": "latent",
        "raw_mean": [0.0],
        "raw_std": [1.0],
        "vae": {"name": "v", "pixels": "unit", "digest": None},
    }
    codec = migrated("model", old_model(**scaling), "'model.json'", config=old_config())["codec"]
    assert (codec["kind"], codec["shape"], codec["raw_std"]) == ("latents", [1, 8, 8], [1.0])
