"""A network that takes a made-up condition, from outside the package: two floats a sample, droppable, guided."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import trigflow
from plugins.walk import EXAMPLES, command, evaluated, exported, resumed, served
from trigflow.conditions import Numbers

PLUGIN = "own_condition.py"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resumed(PLUGIN, tmp_path_factory.mktemp("condition"), "train", "--preset", "spots")


def test_the_model_understands_it(teacher: Path) -> None:
    model = trigflow.load(teacher, "cpu")
    assert model.network.takes == {"centre"}
    assert model.conditioner.inputs == {"centre": Numbers("centre", (2,))}
    assert model.sampling.guided
    assert model.num_classes == 0


def test_it_is_sampled_and_guided(teacher: Path, tmp_path: Path) -> None:
    model = trigflow.load(teacher, "cpu")
    told = {"conditions": {"centre": [0.5, -0.5]}}
    plain = model.sample(4, steps=2, **told, decode=True)
    assert plain.shape == (4, 1, 8, 8)
    guided = model.sample(4, steps=2, guidance=3.0, **told)
    # v_s = v_none + s (v - v_none), by hand
    x, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.9)
    centre, none = torch.tensor([[0.5, -0.5]]).expand(4, 2), torch.full((4, 2), 2.0)
    sd = model.process.sigma_data
    v, v_none = (sd * model.network(x / sd, t, centre=c) for c in (centre, none))
    torch.testing.assert_close(model.velocity({"centre": centre}, 3.0)(x, t), v_none + 3 * (v - v_none))
    assert guided.shape == plain.shape
    command(PLUGIN, "sample", teacher, "--num", 4, "--quiet", "--conditions", "centre=0.5,-0.5", "--out", tmp_path / "s.png")
    assert (tmp_path / "s.png").is_file()


def test_a_bad_value_is_one_line(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(PLUGIN, "sample", teacher, "--conditions", "centre=1,2,3")
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    assert "centre" in said
    assert "(2,)" in said


def test_it_is_evaluated_and_exported(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(PLUGIN, "info", teacher, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["conditions"] == ["centre"]
    assert facts["guidance"] == "classifier-free"
    evaluated(PLUGIN, teacher)
    exported(PLUGIN, teacher, ["x", "t", "centre"])


def test_it_is_distilled_and_served(teacher: Path, tmp_path: Path) -> None:
    student = resumed(PLUGIN, tmp_path, "distill", teacher, "--preset", "spots")
    drawn = served(student, {"count": 3, "seed": 1, "conditions": {"centre": [0.5, -0.5]}})
    expected = trigflow.load(student, "cpu").sample(3, seed=1, conditions={"centre": [0.5, -0.5]})
    assert np.array_equal(drawn, expected.numpy())
    elsewhere = served(student, {"count": 3, "seed": 1, "conditions": {"centre": [-0.5, 0.5]}})
    assert elsewhere.shape == drawn.shape


def test_without_the_plugin_or_with_another_it_is_one_line(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trigflow import plugins

    monkeypatch.setattr(plugins, "LOADED", {})
    with pytest.raises(trigflow.UserError) as missing:
        trigflow.load(teacher, "cpu")
    assert PLUGIN in str(missing.value)
    assert "--plugin" in str(missing.value)
    changed = tmp_path / PLUGIN
    changed.write_text((EXAMPLES / PLUGIN).read_text() + "\n# changed\n")
    trigflow.load_plugin(changed)
    with pytest.raises(trigflow.UserError) as other:
        trigflow.load(teacher, "cpu")
    assert PLUGIN in str(other.value)
    assert "same content" in str(other.value)
