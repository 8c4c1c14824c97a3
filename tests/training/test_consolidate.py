"""A model folder from a checkpoint, while the run goes on or after it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training.test_checkpoint import make_old
from training.tiny import differing, state_of, tiny_trainer
from trigflow import cli, load
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import write_json
from trigflow.training.checkpoint import check_checkpoint
from trigflow.training.config import to_dict
from trigflow.training.consolidate import consolidate, describe_checkpoints
from trigflow.training.trainer import Trainer


@pytest.fixture
def begun(tmp_path: Path) -> Trainer:
    """A run that is going on, with checkpoints of iterations 1 and 2."""
    trainer = tiny_trainer(tmp_path / "run")
    write_json(tmp_path / "run" / "config.json", to_dict(trainer.config))
    for _ in range(2):
        trainer.step()
        trainer.save_checkpoint()
    return trainer


def test_the_model_of_a_run_that_goes_on(begun: Trainer, tmp_path: Path) -> None:
    assert consolidate(tmp_path / "run", tmp_path / "out").name == "00000002"
    model = load(tmp_path / "out", "cpu")
    expected = begun.model().sample(3, seed=5)
    assert torch.equal(model.sample(3, seed=5), expected)
    assert model.class_names == begun.model().class_names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.json", "network.safetensors"]


def test_an_earlier_checkpoint_and_everything_in_it(begun: Trainer, tmp_path: Path) -> None:
    consolidate(tmp_path / "run", tmp_path / "out", at=1, everything=True)
    state = load_file(tmp_path / "out" / "state.safetensors")
    earlier = tiny_trainer(tmp_path / "again")
    earlier.step()
    assert differing(state, state_of(earlier)) == []
    network = load_file(tmp_path / "out" / "network.safetensors")
    assert all(torch.equal(value, state[f"ema.{name}"]) for name, value in network.items())


def test_a_model_ends_as_its_last_checkpoint(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "run", {"loop.iterations": 2}).run()
    consolidate(tmp_path / "run", tmp_path / "out")
    for name in ("network.safetensors", "model.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_checkpoints_are_listed_and_checked(begun: Trainer, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    assert [line.split()[0::3] for line in describe_checkpoints(tmp_path / "run").splitlines()[1:]] == [
        ["1", "sound"],
        ["2", "sound"],
    ]
    content = bytearray((folder / "00000002" / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "00000002" / "state.safetensors").write_bytes(content)
    make_old(folder / "00000001")
    first, second = describe_checkpoints(tmp_path / "run").splitlines()[1:]
    assert "without checksums" in first
    assert "damaged" in second
    assert "checksum of 'state.safetensors' does not match" in second


@pytest.mark.parametrize("error", [UserError("damaged"), FileNotFoundError("gone")])
def test_a_checkpoint_that_goes_while_it_is_read_is_not_listed(
    error: Exception, begun: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(path: Path) -> dict[str, Any]:
        if path.name == "00000001":  # a run that goes on keeps newer ones
            shutil.rmtree(path)
            raise error
        return check_checkpoint(path)

    monkeypatch.setattr("trigflow.training.consolidate.check_checkpoint", check)
    assert [line.split()[0] for line in describe_checkpoints(tmp_path / "run").splitlines()[1:]] == ["2"]


def test_what_cannot_be_made_leaves_nothing(begun: Trainer, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    with pytest.raises(UserError, match="has no checkpoint of iteration 5; expected one of 1, 2; change --at"):
        consolidate(run, tmp_path / "out", at=5)
    with pytest.raises(UserError, match="at is 'two'; expected a whole number"):
        consolidate(run, tmp_path / "out", at="two")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected a new or empty folder"):
        consolidate(run, run)
    with pytest.raises(UserError, match="has no checkpoints"):
        describe_checkpoints(tmp_path)
    make_old(folder / "00000001")
    with pytest.raises(UserError, match="older format that does not describe its model"):
        consolidate(run, tmp_path / "out", at=1)
    (folder / "00000002" / "state.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="has 0 bytes, not"):
        consolidate(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_command(begun: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["checkpoint", str(tmp_path / "run")])
    assert capsys.readouterr().out.count("sound") == 2
    cli.main(["checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--at", "1"])
    assert "iteration 1" in capsys.readouterr().out
    cli.main(["info", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as left:
        cli.main(["checkpoint", str(tmp_path / "run"), "--everything"])
    assert left.value.code == 2
    assert "--out DIR" in capsys.readouterr().err
