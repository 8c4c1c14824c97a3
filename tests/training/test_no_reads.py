"""A step reads no number from the device but where a line of metrics is due."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from training.tiny import digits, digits_config, state_of, tiny_trainer, untrained_teacher
from trigflow.training.trainer import Trainer


class Reads(TorchDispatchMode):
    """Counts what waits for a device: numbers read from tensors, and indices whose number is not known beforehand."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket._qualified_op_name in ("aten::_local_scalar_dense", "aten::nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer.name": "muon", "optimizer.clip": 1.0},
        {"objective.kind": "sct"},
        {"objective.kind": "scd", "loop.accumulate": 2},
        {"objective.kind": "scd", "objective.guidance_max": 2.0},
        {"objective.kind": "flow-map", "objective.anchor": 0.25},
        {"objective.kind": "cd"},
        {"objective.kind": "scd-vsd", "objective.fake_updates": 2},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "diffusion",
)
def test_steps_between_lines_of_metrics_read_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    steps = 12 if changes else 50  # the first is the cheapest; three times the warmup of the others
    config = digits_config({"loop.iterations": 100, "loop.log_every": 50, "loop.batch_size": 4, "teacher": "t", **changes})
    teacher = untrained_teacher() if config.objective.distills else None
    trainer = Trainer(config, tmp_path / "run", teacher=teacher, dataset=digits(), progress=False)
    assert not trainer.decides_at_once
    trainer.step()
    with Reads() as reads:
        for _ in range(steps):
            trainer.step()
    assert reads.count == 0
    assert len(trainer.pending) == 1 + steps
    trainer.settle()
    assert trainer.guard.updates == 1 + steps
    assert trainer.guard.skipped == 0


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon", "radam"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, optimizer: str) -> None:
    """Weights, moments, step counts and averages, whether the host decides or the device."""
    changes = {"optimizer.name": optimizer, "optimizer.weight_decay": 0.1, "loop.log_every": 50, "loop.checkpoint_every": 0}
    trainer = tiny_trainer(tmp_path / "run", changes)
    assert trainer.decides_at_once == (optimizer == "radam")
    for _ in range(3):
        trainer.step()
    before = {name: value.clone() for name, value in state_of(trainer).items()}
    spoil = trainer.network.register_forward_hook(lambda module, args, out: out * float("nan"))
    trainer.step()
    spoil.remove()
    after = state_of(trainer)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    trainer.step()
    assert any(not torch.equal(before[name], value) for name, value in state_of(trainer).items())
    assert trainer.skipped == 1
    assert trainer.guard.updates == 4
