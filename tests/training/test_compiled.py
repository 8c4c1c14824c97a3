"""Compiled losses, averages and updates: the numbers of a plain run, resumed bit for bit; what cannot be goes on without.

The graphs run as they were traced; `make compile-check` looks at what inductor makes of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training.tiny import state_of, tiny_trainer, untrained_teacher
from trigflow.cli import main
from trigflow.training import compiled
from trigflow.training.config import OptimizerConfig
from trigflow.training.muon import orthogonalize
from trigflow.training.optimizer import build_optimizer
from trigflow.training.trainer import Trainer

SCD = {"objective.kind": "scd"}
GUIDED = {"objective.guidance_max": 2.0, "objective.guidance_interval": (0.3, 3.0)}
CASES: dict[str, dict[str, Any]] = {
    "teacher": {"network.dropout": 0.3},
    "sct, accumulated, bf16": {"objective.kind": "sct", "loop.accumulate": 2, "loop.precision": "bf16"},
    "sct, warmup": {"objective.kind": "sct", "objective.tangent.warmup": 2},
    "sct, recomputed": {"objective.kind": "sct", "parallel.recompute": True},
    "scd, guided": SCD | GUIDED,
    "scd-vsd": {"objective.kind": "scd-vsd", "objective.fake_updates": 2},
    "any-step": {"objective.kind": "flow-map", "objective.anchor": 0.25},
    "meanflow": {"objective.kind": "meanflow"},
    "muon": {"optimizer.name": "muon", "optimizer.weight_decay": 0.1, "network.width": 32},
    "radam": {"optimizer.name": "radam"},
}


@pytest.fixture(autouse=True)
def _as_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")


def trainer(folder: Path, changes: dict[str, Any], compile: str = "on") -> Trainer:
    distills = changes.get("objective.kind", "").startswith(("scd", "flow"))
    return tiny_trainer(folder, {**changes, "loop.compile": compile}, teacher=untrained_teacher() if distills else None)


def three_steps(of: Trainer) -> list[dict[str, Tensor]]:
    return [{**values, **figures} for values, figures in (of.step() for _ in range(3))]


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_a_plain_run(tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    runs = [trainer(tmp_path / how, CASES[case], how) for how in ("off", "on")]
    for plain, other in zip(*map(three_steps, runs), strict=True):
        assert plain.keys() == other.keys()
        for name, value in plain.items():
            torch.testing.assert_close(torch.as_tensor(other[name]), torch.as_tensor(value), rtol=1e-4, atol=1e-6)
    assert "without compilation" not in capfd.readouterr().err
    if case == "muon":
        turns = [run.optimizers["optimizer"].turn for run in runs]  # type: ignore[attr-defined]
        assert turns[0] is orthogonalize
        assert turns[1].kinds
    assert bool(runs[1].losses.compiled) is not CASES[case].get("parallel.recompute", False)
    assert not runs[0].losses.compiled
    for a, b in zip(*(run.ema.network.parameters() for run in runs), strict=True):
        # Where guidance has other rows in a call, gradients near zero differ in the last digit, and Adam makes a step of each.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3 if case == "scd, guided" else 1e-6)


def test_an_update_of_muon_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "no_such_backend")
    results = []
    for compiles in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(32, 40), torch.nn.Linear(40, 32))
        optimizer = build_optimizer(OptimizerConfig(name="muon"), [net], compiles)
        for _ in range(2):
            net(torch.ones(2, 32)).square().sum().backward()
            optimizer.step()
        results.append(list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    said = capfd.readouterr().err
    assert said.count("the update of Muon runs without compilation") == 1
    assert "no_such_backend" in said


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    changes = {"objective.kind": "sct", "loop.compile": "on", "loop.iterations": 6, "loop.checkpoint_every": 3}
    whole = tiny_trainer(tmp_path / "whole", changes)
    whole.run()
    half = tiny_trainer(tmp_path / "half", changes)
    while half.iteration < 3:
        half.step()
    half.save_checkpoint()
    again = tiny_trainer(tmp_path / "half", changes, resume=True)
    assert again.iteration == 3
    again.run()
    for name, value in state_of(whole).items():
        assert torch.equal(value, state_of(again)[name]), name


def test_an_objective_that_branches_on_the_iteration_runs_as_it_is(tmp_path: Path) -> None:
    run = trainer(tmp_path, {"objective.kind": "ct"})
    three_steps(run)
    assert not run.losses.compiled


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("TRIGFLOW_CACHE", str(tmp_path / "cache"))
    three_steps(trainer(tmp_path / "run", {}))
    assert "the loss 'first' runs without compilation: " in capfd.readouterr().err


def test_compile_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["train", "--data", "digits", "--out", str(tmp_path / "run"), "--compile", "fast"])
    assert leave.value.code == 2
    assert "compile" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_auto_is_on_for_long_runs_on_cuda() -> None:
    devices = [torch.device(name) for name in ("cpu", "cuda", "mps")]
    assert [compiled.is_compiled("auto", device, 5000) for device in devices] == [False, True, False]
    assert not compiled.is_compiled("auto", devices[1], 4999)
    assert all(compiled.is_compiled("graphs", device, 1) for device in devices)
    assert not any(compiled.is_compiled("off", device, 10**6) for device in devices)
