"""A run that was interrupted and resumed ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training.tiny import change, differing, digits, state_of, tiny_config, tiny_trainer, untrained_teacher
from trigflow.models.model import Model, load
from trigflow.objectives import diffusion, flow_map
from trigflow.runtime.errors import UserError
from trigflow.runtime.interrupt import uninterrupted
from trigflow.training.checkpoint import list_checkpoints
from trigflow.training.config import to_dict
from trigflow.training.log import read_metrics
from trigflow.training.trainer import Trainer

KINDS: dict[str, dict[str, Any]] = {
    "teacher": {"network.dropout": 0.3, "data.flip": True, "objective.label_dropout": 0.5, "optimizer.schedule": "cosine"},
    "scd": {"objective.kind": "scd", "objective.guidance_max": 2.0, "loop.channels_last": True},
    "sct": {"objective.kind": "sct", "network.dropout": 0.2, "optimizer.name": "radam", "ema.kind": "halflife"},
    "channels last": {"loop.channels_last": True, "optimizer.name": "adamw", "optimizer.warmup": 4},
    "muon": {"optimizer.name": "muon", "network.width": 32, "loop.channels_last": True, "optimizer.weight_decay": 0.1},
    "bf16": {"loop.precision": "bf16", "loop.accumulate": 2, "optimizer.clip": 0.1},
}


@pytest.fixture(scope="module")
def teacher() -> Model:
    return untrained_teacher()


def make(kind: str, folder: Path, teacher: Model, resume: bool = False, **changes: Any) -> Trainer:
    needs = kind == "scd"
    return tiny_trainer(folder, {**KINDS[kind], **changes}, teacher=teacher if needs else None, resume=resume)


def ended(trainer: Trainer) -> dict[str, Tensor]:
    trainer.run()
    assert trainer.iteration == 6
    return state_of(trainer)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Raise KeyboardInterrupt in the middle of a step, when the objective is called for the `call`-th time (from 1)."""
    calls = 0
    for module, name in ((diffusion, "diffusion_loss"), (flow_map, "flow_map_loss")):
        original: Callable[..., Any] = getattr(module, name)

        def counted(*args: Any, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_is_uninterrupted(
    kind: str, teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ended(make(kind, tmp_path / "whole", teacher))
    assert any(name.startswith("optimizer.") for name in expected)

    with monkeypatch.context() as patch:
        interrupt_at(patch, 4 * (2 if kind == "bf16" else 1))
        interrupted = make(kind, tmp_path / "parts", teacher)
        with pytest.raises(KeyboardInterrupt):
            interrupted.run()
    assert interrupted.iteration == 3
    assert not (tmp_path / "parts" / "model.json").exists()

    resumed = make(kind, tmp_path / "parts", teacher, resume=True)
    assert resumed.iteration == 3
    assert differing(state_of(resumed), state_of(interrupted)) == []
    assert differing(ended(resumed), expected) == []
    for name in ("network.safetensors", "model.json", "config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_lines_of_metrics_come_once(teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"loop.log_every": 1, "loop.checkpoint_every": 2}
    make("teacher", tmp_path / "whole", teacher, **changes).run()
    with monkeypatch.context() as patch:
        # A crash, unlike Ctrl-C, saves nothing: the line of iteration 3 is written, the checkpoint is of iteration 2.
        step = Trainer.step

        def crash(self: Trainer) -> Any:
            if self.iteration == 3:
                raise RuntimeError("power cut")
            return step(self)

        patch.setattr(Trainer, "step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            make("teacher", tmp_path / "parts", teacher, **changes).run()
    assert [line["iteration"] for line in read_metrics(tmp_path / "parts")] == [1, 2, 3]
    make("teacher", tmp_path / "parts", teacher, resume=True, **changes).run()

    whole, parts = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    assert [line["iteration"] for line in parts] == [1, 2, 3, 4, 5, 6]
    for line in whole + parts:
        del line["images_per_second"], line["data_wait"]
    assert parts == whole


@pytest.mark.parametrize("method", ["optimizer", "ema"])
def test_ctrl_c_between_the_halves_of_an_update_waits_for_its_end(method: str, teacher: Model, tmp_path: Path) -> None:
    """A signal that comes while weights and average change must not leave one changed and the other not."""
    expected = ended(make("teacher", tmp_path / "whole", teacher))
    interrupted = make("teacher", tmp_path / "parts", teacher)
    target, name = (interrupted.optimizer, "step") if method == "optimizer" else (interrupted.ema, "update")
    original, calls = getattr(target, name), 0

    def interrupting(*args: Any) -> None:
        nonlocal calls
        calls += 1
        original(*args)
        if calls == 3:
            signal.raise_signal(signal.SIGINT)

    setattr(target, name, interrupting)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    assert interrupted.iteration == 3
    assert differing(ended(make("teacher", tmp_path / "parts", teacher, resume=True)), expected) == []


def test_uninterrupted_gives_the_signal_back() -> None:
    handler, finished = signal.getsignal(signal.SIGINT), []

    def block() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            finished.append(True)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert finished == [True]
    assert signal.getsignal(signal.SIGINT) is handler


def test_uninterrupted_in_a_thread_does_nothing() -> None:
    import threading

    entered = []

    def block() -> None:
        with uninterrupted():
            entered.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert entered == [signal.getsignal(signal.SIGINT)]


def test_resuming_a_finished_run_changes_nothing(teacher: Model, tmp_path: Path) -> None:
    make("teacher", tmp_path / "run", teacher).run()
    weights = (tmp_path / "run" / "network.safetensors").read_bytes()
    lines = read_metrics(tmp_path / "run")
    assert make("teacher", tmp_path / "run", teacher, resume=True).run().kind == "diffusion"
    assert (tmp_path / "run" / "network.safetensors").read_bytes() == weights
    assert read_metrics(tmp_path / "run") == lines


def test_resuming_a_finished_run_keeps_the_times_that_were_searched_for(tmp_path: Path) -> None:
    """They are those of its weights: a run that is made longer has other ones."""
    model = tiny_trainer(tmp_path / "run", KINDS["sct"]).run()
    model.times = {2: (1.5, 0.75)}
    model.save(tmp_path / "run")
    for resumed in (tiny_trainer(tmp_path / "run", KINDS["sct"], resume=True).run(), load(tmp_path / "run")):
        assert resumed.times == {2: (1.5, 0.75)}
    longer = tiny_trainer(tmp_path / "run", {**KINDS["sct"], "loop.iterations": 7}, resume=True).run()
    assert longer.times == {}


def test_resuming_a_finished_run_makes_a_damaged_model_whole(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "run").run()
    whole = (tmp_path / "run" / "model.json").read_bytes()
    for damage in (b"{", b"[]", b'{"times": {"two": [1]}}'):
        (tmp_path / "run" / "model.json").write_bytes(damage)
        tiny_trainer(tmp_path / "run", resume=True).run()
        assert (tmp_path / "run" / "model.json").read_bytes() == whole


def test_a_run_can_be_made_longer(tmp_path: Path) -> None:
    whole = tiny_trainer(tmp_path / "whole", {"loop.iterations": 5})
    whole.run()
    tiny_trainer(tmp_path / "parts", {"loop.iterations": 2}).run()
    longer = tiny_trainer(tmp_path / "parts", {"loop.iterations": 5}, resume=True)
    longer.run()
    assert differing(state_of(longer), state_of(whole)) == []


@pytest.mark.parametrize("resume", [1, 0, "yes", None])
def test_resume_is_one_of_three_values(resume: Any, tmp_path: Path) -> None:
    """1 equals True, and would have begun anew where there is nothing to go on with."""
    with pytest.raises(UserError, match=f"resume is {resume!r}; expected True, False or 'auto'"):
        tiny_trainer(tmp_path / "run", resume=resume)


def test_resume_without_an_earlier_run_is_an_error_and_with_auto_starts_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing to resume in '.*run'; expected a checkpoint; drop --resume"):
        tiny_trainer(tmp_path / "run", {"loop.iterations": 1}, resume=True)
    assert not (tmp_path / "run").exists()
    trainer = tiny_trainer(tmp_path / "run", {"loop.iterations": 1}, resume="auto")
    assert trainer.iteration == 0
    trainer.run()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["00000001"]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    weights = (tmp_path / "run" / "network.safetensors").read_bytes()
    with pytest.raises(UserError, match="nothing to resume"):  # a finished run is not written over
        tiny_trainer(tmp_path / "run", {"loop.iterations": 2}, resume=True)
    with pytest.raises(UserError, match="holds a model and no checkpoint to go on from"):
        tiny_trainer(tmp_path / "run", {"loop.iterations": 2}, resume="auto")
    assert (tmp_path / "run" / "network.safetensors").read_bytes() == weights
    assert [line["iteration"] for line in read_metrics(tmp_path / "run")] == [1]
    (tmp_path / "run" / "model.json").unlink()
    assert tiny_trainer(tmp_path / "run", {"loop.iterations": 2}, resume="auto").iteration == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loop.seed", 4),
        ("loop.batch_size", 4),
        ("optimizer.lr", 1e-3),
        ("network.width", 16),
        ("objective.proposal.mean", 0.0),
        ("ema.sigma_rel", 0.2),
        ("data.flip", True),
        ("process.sigma_max", 70.0),
    ],
)
def test_a_changed_setting_is_named(name: str, value: Any, tmp_path: Path) -> None:
    trainer_folder = tmp_path / "run"
    begun = tiny_trainer(trainer_folder)
    begun.step()
    begun.save_checkpoint()
    (trainer_folder / "config.json").write_text(json.dumps(to_dict(begun.config)))
    with pytest.raises(UserError) as caught:
        tiny_trainer(trainer_folder, {name: value}, resume=True)
    assert f"the run to resume has {name} = " in str(caught.value)
    assert f"now it is {value}; expected the same" in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"loop.iterations": 9}, {"loop.log_every": 1}, {"loop.keep": 5}, {"loop.checkpoint_every": 3}]
)
def test_settings_that_may_change(changes: dict[str, Any], tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "run", {"loop.iterations": 1}).run()
    assert tiny_trainer(tmp_path / "run", {"loop.iterations": 1, **changes}, resume=True).iteration == 1


@pytest.mark.parametrize("content", ["{}", "[]", "{"])
def test_a_damaged_configuration_is_not_resumed(content: str, tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "run", {"loop.iterations": 1}).run()
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"cannot be (read|used)"):
        tiny_trainer(tmp_path / "run", {"loop.iterations": 1}, resume=True)


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "run", {"loop.iterations": 1}).run()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"already holds a run; expected a new folder; choose another --out, or --resume"):
        tiny_trainer(tmp_path / "run", {"loop.iterations": 1})
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_another_data_set_cannot_slip_in(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "run", {"loop.iterations": 1}).run()
    rgb = change(digits(), {"values": digits().values.expand(-1, 3, -1, -1)})
    with pytest.raises(UserError, match=r"data of other shape: \[1, 8, 8\], now \[3, 8, 8\]"):
        Trainer(tiny_config({"loop.iterations": 1}), tmp_path / "run", dataset=rgb, resume=True, progress=False)
    assert torch.equal(digits().values, rgb.values[:, :1])
