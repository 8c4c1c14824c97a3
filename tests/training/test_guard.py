"""Numbers that go wrong: what is left out, what a run goes back for, and what it then does otherwise."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training.tiny import differing, state_of, tiny_trainer
from trigflow.objectives import Loss, diffusion
from trigflow.runtime.errors import DivergedError, UserError
from trigflow.runtime.files import read_tensors
from trigflow.training.checkpoint import list_checkpoints
from trigflow.training.checkpoint.part import Part
from trigflow.training.config import GuardConfig
from trigflow.training.guard import Guard, Spikes, not_finite
from trigflow.training.log import read_metrics
from trigflow.training.scaling import LossScale
from trigflow.training.trainer import Trainer

Changes = dict[str, Any]
RUN: Changes = {"loop.iterations": 8, "loop.log_every": 1, "loop.checkpoint_every": 2, "guard.patience": 3}


def spoil_network(trainer: Trainer, when: Callable[[], bool], value: float = math.nan) -> None:
    """Multiply what the network returns by `value` while `when()`."""
    trainer.network.register_forward_hook(lambda module, args, out: out * value if when() else out)


def all_finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in tensors.values())


def saved(folder: Path) -> dict[int, dict[str, Tensor]]:
    return {int(path.name): read_tensors(path / "state.safetensors", "checkpoint") for path in list_checkpoints(folder)}


# Spikes ----------------------------------------------------------------------------------------------------------------


def test_spikes_are_many_robust_deviations_above_the_median() -> None:
    """Against the formula, on norms that vary by factors and losses of both signs."""
    generator = np.random.default_rng(0)
    steps = 300
    norms, values = np.exp(0.4 * generator.standard_normal(steps)), generator.standard_normal(steps) - 5
    norms[100], norms[200], values[150], values[250] = 30.0, 1e-6, 20.0, -40.0
    spikes, window, found, expected = Spikes(64, 6.0), 64, [], []
    for k in range(steps):
        found += [(k, name) for name in spikes.add({"grad_norm": float(norms[k]), "loss": float(values[k])})]
        for name, series in (("grad_norm", np.log(norms)), ("loss", values)):
            before = series[max(0, k - window) : k]
            if len(before) >= 32:
                middle = np.median(before)
                deviation = 1.4826 * np.median(np.abs(before - middle))
                expected += [(k, name)] * bool(series[k] > middle + 6.0 * deviation)
    assert found == expected
    assert {(100, "grad_norm"), (150, "loss")} <= set(found)
    assert not {200, 250} & {k for k, _ in found}  # far below is no spike


def test_a_lasting_change_becomes_usual() -> None:
    spikes = Spikes(16, 5.0)
    high = [bool(spikes.add({"grad_norm": value + 0.01 * (k % 3)})) for k, value in enumerate([1.0] * 16 + [50.0] * 16)]
    assert high[16:24] == [True] * 8
    assert high[26:] == [False] * 6


def test_constant_figures_have_no_spikes_at_every_rounding() -> None:
    spikes = Spikes(16, 10.0)
    assert not any(spikes.add({"loss": -2.0 + 1e-7 * k, "grad_norm": 1.0 + 1e-7 * k}) for k in range(40))
    assert spikes.add({"loss": 1.0, "grad_norm": 1.0}) == ["loss"]


def test_spikes_go_on_from_their_state() -> None:
    generator = np.random.default_rng(1)
    series = np.exp(generator.standard_normal(100)).tolist()
    whole, half = Spikes(32, 1.0), Spikes(32, 1.0)
    expected = [whole.add({"grad_norm": value}) for value in series][50:]
    for value in series[:50]:
        half.add({"grad_norm": value})
    resumed = Spikes(32, 1.0)
    resumed.load(json.loads(json.dumps(half.state())))
    assert [resumed.add({"grad_norm": value}) for value in series[50:]] == expected
    assert any(expected)


# Guard -----------------------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_is_an_overflow_only_while_the_scale_can_be_lowered() -> None:
    guard = Guard(GuardConfig(patience=2), LossScale(4.0))
    fine, overflow, loss = ({"loss": a, "grad_norm": b} for a, b in ((1.0, 1.0), (1.0, math.inf), (math.nan, math.nan)))
    assert guard.scale is not None
    seen = []
    for scalars in (fine, overflow, loss, fine, overflow, overflow, overflow):
        seen.append((guard.accepts(scalars), guard.updates, guard.overflows, guard.skipped, guard.streak, guard.scale.value))
    assert seen == [
        (True, 1, 0, 0, 0, 4), (False, 1, 1, 0, 0, 2), (False, 1, 1, 1, 1, 2), (True, 2, 1, 1, 0, 2),
        (False, 2, 2, 1, 0, 1), (False, 2, 2, 2, 1, 1), (False, 2, 2, 3, 2, 1),
    ]  # fmt: skip
    assert guard.trouble is not None
    assert guard.told() == {"overflows": 2, "skipped": 3}


@pytest.mark.parametrize("streak", [2, 3, 7])
def test_a_run_resumed_amid_skipped_steps_goes_back_too(streak: int) -> None:
    """Also one that was stopped after more of them than it has patience for."""
    guard = Guard(GuardConfig(patience=3))
    guard.load({"iteration": 10, "skipped": streak, "streak": streak})
    assert guard.trouble is None
    assert not guard.accepts({"loss": math.nan})
    assert guard.trouble == f"{streak + 1} steps in a row had a loss or gradient that was not finite"


def test_states_of_older_checkpoints_are_read() -> None:
    guard = Guard(GuardConfig(), LossScale())
    guard.load({"format": 1, "iteration": 10, "skipped": 3})
    assert (guard.updates, guard.skipped, guard.rollbacks, guard.streak) == (7, 3, 0, 0)
    assert guard.scale is not None
    assert guard.scale.value == 2.0**16


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["adam", "muon", "radam"])
def test_one_number_of_many_is_found(name: str, value: float, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", {"optimizer.name": name, "network.width": 32})
    trainer.step()
    assert not_finite(trainer.modules, trainer.optimizers) == []
    states = [entry for state in trainer.optimizer.state.values() for entry in state.values() if entry.numel() > 1]
    for tensor, found in (
        (states[0], ["optimizer"]),
        (states[-1], ["optimizer"]),
        (trainer.network.out.weight.data, ["network"]),
        (trainer.losses.student.weights["weight"].linear.bias.data, ["weight"]),
    ):
        kept = tensor.clone()
        tensor.view(-1)[-1] = value
        assert not_finite(trainer.modules, trainer.optimizers) == found
        tensor.copy_(kept)
    assert not_finite(trainer.modules, trainer.optimizers) == []


def test_buffers_are_looked_at_for_what_is_no_number() -> None:
    """As a step that is left out may have put into the running variance of a batch normalization."""
    module = nn.BatchNorm1d(2)
    module.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    module.register_buffer("small", torch.zeros(2).to(torch.float8_e4m3fn))
    assert not_finite({"network": module}, {}) == []
    assert module.running_var is not None
    module.running_var[0] = math.nan
    assert not_finite({"network": module}, {}) == ["network"]


def test_large_numbers_are_finite() -> None:
    module = nn.Linear(4, 4)
    nn.init.constant_(module.weight, 3e38)
    assert not_finite({"network": module}, {}) == []


# Going back ------------------------------------------------------------------------------------------------------------


def broken_run(folder: Path, *, resume: bool = False, crash: int | None = None, **changes: Any) -> tuple[Trainer, list[Any]]:
    """A run whose steps 5 to 7 (from 1) are not finite the first time, and what each step drew. It may end without a word."""
    trainer = tiny_trainer(folder, {**RUN, "network.dropout": 0.3, "data.flip": True, **changes}, resume=resume)
    spoil_network(trainer, lambda: trainer.guard.rollbacks == 0 and trainer.iteration in (4, 5, 6))
    drawn: list[Any] = []
    draw = trainer._batch

    def noted(indices: Tensor, generator: torch.Generator) -> Any:
        if crash is not None and trainer.guard.rollbacks and trainer.iteration == crash:
            raise RuntimeError("power cut")
        batch = draw(indices, generator)
        drawn.append((trainer.iteration, indices, batch["noise"]))
        return batch

    trainer._batch = noted  # type: ignore[method-assign]
    return trainer, drawn


def test_after_too_many_skipped_steps_the_run_goes_back_and_on_with_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, drawn = broken_run(tmp_path / "run")
    trainer.run()
    assert [i for i, *_ in drawn] == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]
    for before, after in zip(drawn[4:7], drawn[7:10], strict=True):
        assert not torch.equal(before[1], after[1])
        assert not torch.equal(before[2], after[2])
    assert (trainer.iteration, trainer.skipped, trainer.guard.rollbacks, trainer.guard.updates) == (8, 3, 1, 8)
    assert all_finite(state_of(trainer))
    lines = read_metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines] == list(range(1, 9))
    assert [line["rollbacks"] for line in lines] == [0] * 4 + [1] * 4
    assert [line["skipped"] for line in lines] == [0] * 4 + [3] * 4
    assert "iteration 7: 3 steps in a row" in capsys.readouterr().err


def test_a_run_resumed_after_it_went_back_is_the_one_that_never_stopped(tmp_path: Path) -> None:
    whole, _ = broken_run(tmp_path / "whole")
    whole.run()
    crashed, _ = broken_run(tmp_path / "parts", crash=5)
    with pytest.raises(RuntimeError, match="power cut"):
        crashed.run()
    assert crashed.iteration == 5
    resumed, drawn = broken_run(tmp_path / "parts", resume=True)
    assert (resumed.iteration, resumed.guard.rollbacks) == (4, 1)
    resumed.run()
    assert [i for i, *_ in drawn] == [4, 5, 6, 7]
    assert differing(state_of(resumed), state_of(whole)) == []
    assert resumed.guard.state() == whole.guard.state()


def test_a_run_that_is_sound_does_not_depend_on_the_settings(tmp_path: Path) -> None:
    states = []
    for i, changes in enumerate(({}, {"guard.spikes": "rollback", "guard.patience": 1, "guard.rollbacks": 0})):
        trainer = tiny_trainer(tmp_path / str(i), {"loop.iterations": 4, **changes})
        trainer.run()
        states.append(state_of(trainer))
    assert differing(*states) == []


def poison(trainer: Trainer, what: str) -> None:
    """Put a number that is none, or infinite, into what is named."""
    state = next(state for state in trainer.optimizer.state.values() if len(state.get("momentum", ())) or "exp_avg" in state)
    tensor = {
        "momentum": lambda: next(iter(v for v in state.values() if v.ndim > 0)),
        "second moment": lambda: state["exp_avg_sq"],
        "average": lambda: trainer.ema.network.out.weight.data,
        "weights": lambda: trainer.network.out.weight.data,
        "weighting": lambda: trainer.losses.student.weights["weight"].linear.weight.data,
    }[what]()
    tensor.view(-1)[0] = math.inf if what == "second moment" else math.nan


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("momentum", {}),
        ("momentum", {"optimizer.name": "muon", "network.width": 32}),
        ("second moment", {}),
        ("average", {"ema.snapshot_every": 4}),
        ("weights", {}),
        ("weighting", {"objective.kind": "sct"}),
    ],
)
def test_weights_and_moments_that_are_not_finite_are_never_written(what: str, changes: Changes, tmp_path: Path) -> None:
    """They are put there after the third step. An infinite second moment, for one, stops a weight without any other sign."""
    trainer = tiny_trainer(tmp_path / "run", {**RUN, "loop.keep": 9, **changes})
    step, iterations = trainer.step, []

    def poisoned() -> Any:
        result = step()
        iterations.append(trainer.iteration)
        if trainer.iteration == 3 and trainer.guard.rollbacks == 0:
            poison(trainer, what)
        return result

    trainer.step = poisoned  # type: ignore[method-assign]
    trainer.run()
    assert iterations == [1, 2, 3, 4, 3, 4, 5, 6, 7, 8]  # noticed at the next step or checkpoint
    assert (trainer.guard.rollbacks, trainer.guard.updates) == (1, 8)
    written = saved(tmp_path / "run")
    assert sorted(written) == [2, 4, 6, 8]
    assert all(all_finite(tensors) for tensors in written.values())
    assert all_finite(state_of(trainer))
    for path in (tmp_path / "run" / "ema").glob("*.safetensors") if "ema.snapshot_every" in changes else ():
        assert all_finite(read_tensors(path, "snapshot"))


def test_a_state_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", RUN)
    trainer.step()
    poison(trainer, "average")
    with pytest.raises(UserError, match="ema of iteration 1 not finite; expected"):
        trainer.save_checkpoint()
    assert list_checkpoints(tmp_path / "run") == []


def test_an_interruption_writes_no_state_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = tiny_trainer(tmp_path / "run", RUN)
    draw, write = trainer._batch, Part.write

    def slow(part: Part, path: Path) -> dict[str, object]:
        time.sleep(1)
        return write(part, path)

    monkeypatch.setattr(Part, "write", slow)  # the process may end after the interruption: what is being written comes first

    def interrupted(indices: Tensor, generator: torch.Generator) -> Any:
        if trainer.iteration == 3:
            poison(trainer, "weights")
            raise KeyboardInterrupt
        return draw(indices, generator)

    trainer._batch = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert list(saved(tmp_path / "run")) == [2]
    assert "network not finite, and no checkpoint written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guard.rollbacks": 2}, "iteration 7: 3 steps in a row .* and the run has gone back 2 times; expected"),
        ({"guard.rollbacks": 0}, "gone back 0 times"),
        ({"loop.checkpoint_every": 0}, "and there is no checkpoint; expected .*trigflow doctor"),
    ],
)
def test_a_run_that_cannot_go_back_ends_with_one_line(changes: Changes, said: str, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", {**RUN, **changes})
    spoil_network(trainer, lambda: trainer.iteration >= 4)
    with pytest.raises(DivergedError, match=said) as error:
        trainer.run()
    assert len(str(error.value).splitlines()) == 1
    assert list(saved(tmp_path / "run")) == ([] if "loop.checkpoint_every" in changes else [2, 4])
    last = read_metrics(tmp_path / "run")[-1]  # for the doctor
    assert (last["iteration"], last["skipped"]) == (7, 3 * (1 + changes.get("guard.rollbacks", 0)))


def test_a_run_resumed_amid_skipped_steps_ends_with_one_line_too(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", {"loop.log_every": 6})
    trainer.guard.streak = 1
    with torch.no_grad():
        next(trainer.network.parameters()).view(-1)[0] = math.inf
    with pytest.raises(DivergedError, match="not finite, and there is no checkpoint"):
        trainer.run()
    last = read_metrics(tmp_path / "run")[-1]
    assert (last["iteration"], last["skipped"], last["grad_norm"]) == (1, 1, None)


def test_without_patience_steps_are_skipped_for_ever(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", {**RUN, "guard.patience": 0})
    spoil_network(trainer, lambda: trainer.iteration >= 2)
    trainer.run()
    assert (trainer.iteration, trainer.skipped, trainer.guard.rollbacks) == (8, 6, 0)


def test_the_bar_shows_counts_that_are_not_zero(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", RUN)
    assert trainer.guard.told() == {}
    spoil_network(trainer, lambda: trainer.iteration == 2)
    trainer.run()
    assert trainer.guard.told() == {"skipped": 1}


# Spikes of a run -------------------------------------------------------------------------------------------------------

LONG: Changes = {"loop.iterations": 14, "loop.log_every": 1, "loop.checkpoint_every": 2, "guard.window": 8}


def spiking(
    folder: Path, action: str, monkeypatch: pytest.MonkeyPatch, *, resume: bool = False
) -> tuple[Trainer, list[Tensor]]:
    """A run with a gradient 1e5 times as large in one step, and its weights after every step."""
    trainer = tiny_trainer(folder, {**LONG, "guard.spikes": action}, resume=resume)
    original = diffusion.diffusion_loss

    def larger(*args: Any, **kwargs: Any) -> Loss:
        loss = original(*args, **kwargs)
        spikes = trainer.iteration == 10 and trainer.guard.rollbacks == 0
        return Loss(loss.value * (1e5 if spikes else 1.0), loss.figures)

    step, weights = trainer.step, []

    def noted() -> Any:
        result = step()
        weights.append(trainer.network.inp.weight.detach().clone())
        return result

    trainer.step = noted  # type: ignore[method-assign]
    with monkeypatch.context() as patch:
        patch.setattr(diffusion, "diffusion_loss", larger)
        trainer.run()
    return trainer, weights


def test_spikes_are_counted_left_out_or_gone_back_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {action: spiking(tmp_path / action, action, monkeypatch) for action in ("off", "log", "skip", "rollback")}
    guards = {action: trainer.guard for action, (trainer, _) in runs.items()}
    assert {action: (g.spikes, g.skipped, g.rollbacks, g.updates) for action, g in guards.items()} == {
        "off": (0, 0, 0, 14),
        "log": (1, 0, 0, 14),
        "skip": (1, 0, 0, 13),
        "rollback": (1, 0, 1, 14),
    }
    assert differing(state_of(runs["off"][0]), state_of(runs["log"][0])) == []
    weights = runs["skip"][1]
    assert torch.equal(weights[10], weights[9])
    assert not torch.equal(runs["log"][1][10], weights[10])
    assert len(runs["rollback"][1]) == 15  # step 11 twice
    assert read_metrics(tmp_path / "log")[-1]["spikes"] == 1


def test_spikes_of_a_resumed_run_are_those_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = spiking(tmp_path / "whole", "skip", monkeypatch)
    with monkeypatch.context() as patch:
        original = Trainer._batch

        def cut(self: Trainer, *args: Any) -> Any:
            if self.iteration == 9:
                raise RuntimeError("power cut")
            return original(self, *args)

        patch.setattr(Trainer, "_batch", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            tiny_trainer(tmp_path / "parts", {**LONG, "guard.spikes": "skip"}).run()
    resumed, weights = spiking(tmp_path / "parts", "skip", monkeypatch, resume=True)
    assert len(weights) == 6  # from iteration 8
    assert differing(state_of(resumed), state_of(whole)) == []
    assert resumed.guard.state() == whole.guard.state()
