"""What some training taught one model, added to another, by tools/merge_models.py."""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import Result, typed
from trigflow import load
from trigflow.runtime.files import read_json, read_tensors, write_tensors

FOLDERS = Path(__file__).parent / "fixtures" / "format1"
SCRIPT = Path(__file__).parents[1] / "tools" / "merge_models.py"


@pytest.fixture
def merge(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    def script(words: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return typed(script, capsys)


def test_what_was_learned_is_added(merge: Callable[..., Result], tmp_path: Path) -> None:
    student, teacher, later = FOLDERS / "scd", FOLDERS / "teacher", tmp_path / "later"
    shutil.copytree(teacher, later)
    before = read_tensors(teacher / "network.safetensors", "weights")
    generator = torch.Generator().manual_seed(0)
    learned = {name: torch.randn(value.shape, generator=generator) for name, value in before.items()}
    write_tensors(later / "network.safetensors", {name: value + learned[name] for name, value in before.items()})

    done = merge(student, "--add", later, "--less", teacher, "--share", 0.5, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    own = load(student).network.state_dict()
    found = load(tmp_path / "out").network.state_dict()
    assert found.keys() == own.keys()
    assert any(name in learned for name in own)
    for name, value in own.items():
        expected = value + 0.5 * learned[name] if name in learned else value
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
    said = read_json(tmp_path / "out" / "merged.json", "merge")
    assert said == {"model": str(student), "add": str(later), "less": str(teacher), "share": 0.5}


@pytest.mark.parametrize(
    ("folders", "share", "said"),
    [
        (("scd", "latent", "teacher"), "1", "--add and --less are of two networks"),
        (("latent", "teacher", "teacher"), "1", "the model is of another network"),
        (("scd", "teacher", "nowhere"), "1", "nowhere"),
        (("scd", "teacher", "teacher"), "nan", "share"),
    ],
)
def test_what_cannot_be_merged(
    merge: Callable[..., Result], tmp_path: Path, folders: tuple[str, ...], share: str, said: str
) -> None:
    model, add, less = (FOLDERS / name for name in folders)
    done = merge(model, "--add", add, "--less", less, "--share", share, "--out", tmp_path / "out")
    assert done.code == 2
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_replaced(merge: Callable[..., Result], tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("mine", encoding="utf-8")
    done = merge(FOLDERS / "scd", "--add", FOLDERS / "teacher", "--less", FOLDERS / "teacher", "--out", tmp_path)
    assert done.code == 2
    assert "is there already" in done.err
    assert list(tmp_path.iterdir()) == [kept]
