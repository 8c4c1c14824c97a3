"""Snapshots of averages while training: what is written, when, and that interruptions leave no trace in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training.tiny import differing, tiny_trainer
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import read_tensors, replacing
from trigflow.training import run as run_module
from trigflow.training import snapshots as snapshots_module
from trigflow.training.config import EMAConfig
from trigflow.training.ema import EMA
from trigflow.training.snapshots import list_snapshots, write_snapshot
from trigflow.training.trainer import Trainer

SETTINGS: dict[str, Any] = {"ema.snapshot_every": 2, "ema.sigma_rels": (0.05, 0.15), "loop.iterations": 7}


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "ema").iterdir()}


def names(run: Path) -> list[tuple[int, float]]:
    return [(s.iteration, s.sigma_rel) for s in list_snapshots(run)]


def all_at(*iterations: int) -> list[tuple[int, float]]:
    return [(iteration, sigma_rel) for iteration in iterations for sigma_rel in (0.05, 0.15)]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return differing(found, expected) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted; not to be changed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    tiny_trainer(run, SETTINGS).run()
    return run


def test_snapshots_come_at_intervals_and_at_the_end(whole: Path) -> None:
    assert names(whole) == all_at(2, 4, 6, 7)
    assert sorted(files(whole)) == sorted([f"{i:08d}-{s}.safetensors" for i, s in names(whole)] + ["model.json"])
    assert (whole / "ema" / "model.json").read_bytes() == (whole / "model.json").read_bytes()
    assert all(s.updates == s.iteration and s.dtype == "fp32" for s in list_snapshots(whole))


def test_no_snapshots_unless_asked_for(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", {"loop.iterations": 1})
    trainer.run()
    assert trainer.ema.tracked == {}
    assert list(trainer.ema.modules) == ["ema"]
    assert not (tmp_path / "run" / "ema").exists()


def test_snapshots_hold_the_averages_of_their_lengths(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", SETTINGS)
    direct = {sigma_rel: EMA(EMAConfig(sigma_rel=sigma_rel), trainer.network) for sigma_rel in (0.05, 0.15)}
    update = trainer.ema.update

    def also(*args: Any) -> None:
        update(*args)
        for average in direct.values():
            average.update(*args)

    trainer.ema.update = also  # type: ignore[method-assign]
    trainer.run()
    for sigma_rel, average in direct.items():
        stored = read_tensors(tmp_path / "run" / "ema" / f"00000007-{sigma_rel}.safetensors", "snapshot")
        assert same(stored, average.network.state_dict())
    assert not same(stored, trainer.ema.network.state_dict())


def test_snapshots_change_nothing_else(whole: Path, tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "run", {"loop.iterations": 7}).run()
    assert (tmp_path / "run" / "network.safetensors").read_bytes() == (whole / "network.safetensors").read_bytes()


def test_the_own_length_is_tracked_once() -> None:
    network = torch.nn.Linear(2, 2)
    ema = EMA(EMAConfig(sigma_rel=0.1, snapshot_every=1, sigma_rels=(0.1, 0.05)), network)
    assert ema.tracked[0.1] is ema.network
    assert list(ema.modules) == ["ema", "ema 0.05"]
    halflife = EMA(EMAConfig("halflife", sigma_rel=0.1, snapshot_every=1, sigma_rels=(0.1, 0.05)), network)
    assert list(halflife.modules) == ["ema", "ema 0.1", "ema 0.05"]


@pytest.mark.parametrize("stop", [3, 4])
def test_interrupted_and_resumed_is_uninterrupted(
    stop: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a step, with a checkpoint of the iteration before it."""
    first = tiny_trainer(tmp_path / "run", SETTINGS)
    with monkeypatch.context() as patch:
        step = Trainer.step

        def interrupted(self: Trainer) -> Any:
            if self.iteration == stop:
                raise KeyboardInterrupt
            return step(self)

        patch.setattr(Trainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            first.run()
    resumed = tiny_trainer(tmp_path / "run", SETTINGS, resume=True)
    assert resumed.iteration == stop
    for name, module in first.ema.modules.items():
        assert differing(resumed.ema.modules[name].state_dict(), module.state_dict()) == []
    resumed.run()
    assert files(tmp_path / "run") == files(whole)


@pytest.mark.parametrize("count", [0, 1])
def test_ctrl_c_while_writing_leaves_whole_snapshots_alone(
    count: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before the first or before the second of the two files of iteration 4."""
    written: list[Path] = []

    def write(path: Path, *args: Any) -> None:
        if path.name.startswith("00000004") and len(written) == 2 + count:
            with replacing(path) as temporary:
                temporary.write_bytes(b"half")
                raise KeyboardInterrupt
        written.append(path)
        original(path, *args)

    original = snapshots_module.write_tensors
    with monkeypatch.context() as patch:
        patch.setattr(snapshots_module, "write_tensors", write)
        with pytest.raises(KeyboardInterrupt):
            tiny_trainer(tmp_path / "run", SETTINGS).run()
    assert len(names(tmp_path / "run")) == 2 + count
    assert all(not name.startswith(".") for name in files(tmp_path / "run"))
    resumed = tiny_trainer(tmp_path / "run", SETTINGS, resume=True)
    assert resumed.iteration == 4
    resumed.run()
    assert files(tmp_path / "run") == files(whole)


def test_a_crash_is_made_good(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots after the last checkpoint are made again, and those of iterations that are not reached again are gone."""
    changes = {**SETTINGS, "loop.checkpoint_every": 3}
    with monkeypatch.context() as patch:
        step = Trainer.step

        def crash(self: Trainer) -> Any:
            if self.iteration == 5:
                raise RuntimeError("power cut")
            return step(self)

        patch.setattr(Trainer, "step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            tiny_trainer(tmp_path / "run", changes).run()
    assert names(tmp_path / "run") == all_at(2, 4)
    (tmp_path / "run" / "ema" / "00000004-0.05.safetensors").write_bytes(b"damaged")
    resumed = tiny_trainer(tmp_path / "run", changes, resume=True)
    assert resumed.iteration == 3
    assert names(tmp_path / "run") == all_at(2)
    resumed.run()
    assert files(tmp_path / "run") == files(whole)


def test_skipped_steps_are_counted_in_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path / "run", SETTINGS)
    backward = run_module.Losses.backward

    def sometimes(self: Any, batch: Any, iteration: int, *parts: Any, **last: bool) -> Any:
        values, figures = backward(self, batch, iteration, *parts, **last)
        return ({**values, "weighted_loss": values["weighted_loss"] * torch.nan} if iteration in (0, 4) else values), figures

    monkeypatch.setattr(run_module.Losses, "backward", sometimes)
    trainer.run()
    assert trainer.skipped == 2
    found = {s.iteration: s.updates for s in list_snapshots(tmp_path / "run")}
    assert found == {2: 1, 4: 3, 6: 4, 7: 5}


def test_the_settings_of_snapshots_may_not_change(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "run", SETTINGS).run()
    for name, value in (("ema.snapshot_every", 3), ("ema.sigma_rels", (0.05, 0.1)), ("ema.snapshot_dtype", "fp16")):
        with pytest.raises(UserError, match=f"the run to resume has {name} = "):
            tiny_trainer(tmp_path / "run", {**SETTINGS, name: value}, resume=True)
    assert names(tmp_path / "run") == all_at(2, 4, 6, 7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ema.snapshot_every": -1}, "ema.snapshot_every is -1; expected 0 or more"),
        ({"ema.sigma_rels": (0.05,)}, r"ema.sigma_rels is \(0.05,\); expected two or more different numbers"),
        ({"ema.sigma_rels": (0.05, 0.05)}, "expected two or more different numbers"),
        ({"ema.sigma_rels": (0.05, 0.3)}, r"different numbers in \(0, 0.28\)"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        tiny_trainer(tmp_path / "run", changes)
    assert not (tmp_path / "run").exists()


def test_halves_where_they_hold_all_digits(tmp_path: Path) -> None:
    network = torch.nn.Module()
    values = {"usual": 1.5, "huge": 1e5, "tiny": 1e-5}
    for name, value in values.items():
        network.register_parameter(name, torch.nn.Parameter(torch.full((3,), value)))
    network.register_buffer("count", torch.tensor(7))
    network.register_buffer("nothing", torch.zeros(0))
    stored = read_tensors(write_snapshot(tmp_path, 1, 1, 0.05, network, "fp16"), "snapshot")
    assert {name: value.dtype for name, value in stored.items()} == {
        "usual": torch.float16,
        "huge": torch.float32,
        "tiny": torch.float32,
        "count": torch.int64,
        "nothing": torch.float32,
    }
    assert [stored[name][0].item() for name in values] == pytest.approx(list(values.values()))


def test_a_snapshot_that_cannot_be_written_is_left_out(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a full disk: said in one line each, and the training is the same."""

    def full(path: Path, *args: Any) -> None:
        if path.name.startswith("00000004"):
            raise UserError(f"'{path}' cannot be written (no space left on device)")
        original(path, *args)

    original = snapshots_module.write_tensors
    monkeypatch.setattr(snapshots_module, "write_tensors", full)
    tiny_trainer(tmp_path / "run", SETTINGS).run()
    expected = {name: content for name, content in files(whole).items() if not name.startswith("00000004")}
    assert files(tmp_path / "run") == expected
    lines = [line for line in capsys.readouterr().err.splitlines() if "no snapshot of iteration 4" in line]
    assert len(lines) == 2
    assert all("no space left" in line and "training goes on" in line for line in lines)
