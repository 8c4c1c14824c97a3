"""A codec of one-dimensional data, from outside the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import trigflow
from plugins.walk import command, evaluated, exported, resumed, served
from trigflow.codecs import CODECS, codec_from_state
from trigflow.runtime.errors import UserError

PLUGIN = "own_codec.py"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resumed(PLUGIN, tmp_path_factory.mktemp("codec"), "train", "--preset", "waves")


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resumed(PLUGIN, tmp_path_factory.mktemp("fast"), "distill", teacher, "--preset", "waves")


def test_its_codec_comes_back(student: Path) -> None:
    codec = trigflow.load(student, "cpu").codec
    assert codec.kind == "waves"
    assert codec.kind in CODECS
    assert codec_from_state(codec.state()) == codec
    stored = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(codec.stored(codec.encode(stored)), stored)


def test_it_is_sampled(student: Path, tmp_path: Path) -> None:
    model = trigflow.load(student, "cpu")
    drawn = model.sample(6, labels="two")
    assert drawn.shape == (6, 64)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, model.sample(6, labels=[1], batch_size=4)) or torch.allclose(
        drawn, model.sample(6, labels=[1], batch_size=4), atol=1e-5
    )
    command(PLUGIN, "sample", student, "--num", 6, "--quiet", "--labels", "one", "three", "--out", tmp_path / "waves.png")
    assert (tmp_path / "waves.png").is_file()


def test_it_has_no_pictures_to_edit(student: Path) -> None:
    model = trigflow.load(student, "cpu")
    for picture in (torch.zeros(1, 32, 64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)):
        with pytest.raises(UserError, match=r"^a picture for a model of data of shape \(64,\); expected .*; use sample$"):
            model.edit(picture, mask=torch.zeros(32, 64, dtype=torch.bool))
    with pytest.raises(UserError, match="are no pictures"):
        model.codec.seen(torch.zeros(1, 1, 32, 64, dtype=torch.uint8))


def test_it_is_evaluated_and_exported(student: Path) -> None:
    evaluated(PLUGIN, student)
    exported(PLUGIN, student, ["x", "t", "label"])


def test_it_is_served(student: Path) -> None:
    drawn = served(student, {"count": 2, "labels": ["two", 0], "seed": 3})
    model = trigflow.load(student, "cpu")
    expected = model.codec.pictures(model.sample(2, labels=["two", 0], seed=3))
    assert drawn.shape == (2, 1, 32, 64)
    assert np.abs(drawn.astype(int) - expected.numpy().astype(int)).max() <= 1


def test_info_names_its_classes(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(PLUGIN, "info", student, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["class names"] == {"0": "one", "1": "two", "2": "three"}
    assert facts["classes"] == 3
    assert "conditions" not in facts
