"""Training in float16: tangents with room, gradients without underflow, and a scale that finds its size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training.tiny import differing, state_of, tiny_trainer, untrained_teacher
from trigflow.models.model import Model
from trigflow.networks import ConditioningConfig, DiTConfig, EDM2Config, NetworkConfig, UNetConfig, build
from trigflow.objectives import eulerian_tangent, flow_map_loss, objective_of, tangents
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.training import scaling
from trigflow.training.log import read_metrics
from trigflow.training.scaling import LossScale
from trigflow.training.trainer import Trainer

Changes = dict[str, Any]
CONDITIONING = ConditioningConfig(width=8)
KINDS: dict[str, Changes] = {
    "teacher": {},
    "sct": {"objective.kind": "sct"},
    "scd": {"objective.kind": "scd", "loop.accumulate": 2},
    "vsd": {"objective.kind": "scd-vsd", "objective.fake_updates": 2, "loop.accumulate": 2},
    "meanflow": {"objective.kind": "meanflow"},
}


@pytest.fixture(scope="module")
def teacher() -> Model:
    return untrained_teacher()


def make(kind: str, folder: Path, teacher: Model, changes: Changes, *, resume: bool = False) -> Trainer:
    needs = kind in ("scd", "vsd")
    return tiny_trainer(folder, KINDS[kind] | changes, teacher=teacher if needs else None, resume=resume)


def gradient(trainer: Trainer) -> Tensor:
    """All gradients of a step whose updates are not made, before it would be clipped."""
    for learner in (trainer.student, trainer.fake):
        if learner is not None:
            learner.update = lambda: None  # type: ignore[method-assign]
    trainer.step()
    learners = [learner for learner in (trainer.student, trainer.fake) if learner is not None]
    return torch.cat([p.grad.flatten() for learner in learners for p in learner.parameters if p.grad is not None])


def gap(a: Tensor, b: Tensor) -> float:
    """Relative to b."""
    return float((a - b).norm() / b.norm())


# Tangents --------------------------------------------------------------------------------------------------------------


def tangent(config: NetworkConfig, half: bool) -> tuple[Tensor, Tensor]:
    """F and g of a network with random weights, on random images at times from near 0 to near pi/2."""
    process, generator = TrigFlow(), torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    x0, noise = (0.5 * torch.randn(8, 1, 8, 8, generator=generator) for _ in range(2))
    t = torch.linspace(0.02, 1.56, 8)
    x_t, dxdt = process.interpolate(x0, noise, t), process.velocity(x0, noise, t)
    with torch.autocast("cpu", dtype=torch.float16, enabled=half):
        prediction, g = eulerian_tangent(network, process, x_t, dxdt, t, torch.zeros_like(t), {})
    assert prediction.dtype == (torch.float16 if half else torch.float32)
    return prediction.detach().float(), g


NETWORKS: dict[str, NetworkConfig] = {
    "unet": UNetConfig(channels=1, patch=2, width=8, mult=(1, 2), blocks=1, attention=(1,), conditioning=CONDITIONING),
    "edm2": EDM2Config(channels=1, width=16, mult=(1, 2), blocks=1, attention=(4,), conditioning=CONDITIONING),
    "dit": DiTConfig(channels=1, patch=2, width=32, depth=2, heads=2, conditioning=CONDITIONING),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_tangents_have_the_error_of_half_precision(name: str) -> None:
    """Numbers of float16 have a relative rounding error of up to 5e-4, and a network rounds some dozen times."""
    half, exact = tangent(NETWORKS[name], True), tangent(NETWORKS[name], False)
    assert 0 < gap(half[0], exact[0]) < 5e-3
    assert 0 < gap(half[1], exact[1]) < 5e-3


def steep(scale: float) -> UNetConfig:
    conditioning = ConditioningConfig(width=8, time_embedding="fourier", fourier_scale=scale)
    return UNetConfig(channels=1, patch=2, width=8, mult=(1, 2), blocks=1, conditioning=conditioning)


def test_derivatives_above_the_largest_number_of_float16_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = tangent(steep(3e4), False)[1]
    assert exact.abs().max() > torch.finfo(torch.float16).max
    assert gap(tangent(steep(3e4), True)[1], exact) < 5e-3
    monkeypatch.setattr(tangents, "HEADROOM", 1.0)
    assert not tangent(steep(3e4), True)[1].isfinite().all()


def test_meanflow_has_the_same_room() -> None:
    process, generator, losses = TrigFlow(), torch.Generator().manual_seed(0), []
    conditioning = ConditioningConfig(width=8, takes=("end",))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(UNetConfig(channels=1, patch=2, width=8, mult=(1, 2), blocks=1, conditioning=conditioning))
    x0, noise = (0.5 * torch.randn(8, 1, 8, 8, generator=generator) for _ in range(2))
    t = torch.linspace(0.1, 1.5, 8)
    for half in (False, True):
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            loss = flow_map_loss(network, process, x0, noise, t, 0.5 * t, config=objective_of("meanflow"))
            losses.append(loss.figures["loss"])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=1e-3)


# Gradients -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_loss_has_the_gradient_of_float32(kind: str, teacher: Model, tmp_path: Path) -> None:
    warm = {} if kind == "teacher" else {"objective.tangent.warmup": 0}
    exact, half = (
        gradient(make(kind, tmp_path / precision, teacher, {"loop.precision": precision, **warm}))
        for precision in ("fp32", "fp16")
    )
    assert 0 < gap(half, exact) < 2e-2


def test_without_a_scale_small_gradients_vanish(tmp_path: Path, teacher: Model) -> None:
    """The gradient of a network whose output counts for little: numbers below 6e-8 are zero in float16."""
    gradients = []
    for precision, value in (("fp32", 1.0), ("fp16", 2.0**16), ("fp16", 1.0)):
        changes = {"loop.precision": precision, "objective.adaptive_weight": False}
        trainer = tiny_trainer(tmp_path / f"{precision} {value}", changes)
        if trainer.scale is not None:
            trainer.scale.value = value
        trainer.network.register_forward_hook(lambda module, args, out: out.float() * 1e-6)
        gradients.append(gradient(trainer))
    assert gap(gradients[1], gradients[0]) < 2e-2
    assert gap(gradients[2], gradients[0]) > 0.1


def test_the_norm_is_clipped_after_the_scale_is_taken_out(tmp_path: Path) -> None:
    norms = []
    for precision in ("fp32", "fp16"):
        trainer = tiny_trainer(tmp_path / precision, {"loop.precision": precision, "optimizer.clip": 1e-3})
        scalars, _ = trainer.step()
        kept = torch.stack([p.grad.norm() for p in trainer.parameters if p.grad is not None]).norm().item()
        norms.append((float(scalars["grad_norm"]), kept))
    assert norms[1][0] == pytest.approx(norms[0][0], rel=1e-2)
    assert norms[0][1] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1][1] == pytest.approx(1e-3, rel=1e-3)


def test_training_in_float16_follows_float32(tmp_path: Path, teacher: Model) -> None:
    """With Adam's eps so large that an update is about in proportion to the gradient, small ones included."""
    ends = []
    for precision in ("fp32", "fp16", "bf16"):
        changes = {"loop.precision": precision, "optimizer.eps": 1.0, "optimizer.lr": 0.1}
        trainer = make("sct", tmp_path / precision, teacher, changes)
        if trainer.scale is not None:
            trainer.scale.value = 2.0**10
        before = torch.cat([p.detach().flatten() for p in trainer.parameters])
        trainer.run()
        assert trainer.skipped == trainer.guard.overflows == 0
        assert all(p.dtype == torch.float32 for p in trainer.parameters)
        ends.append(torch.cat([p.detach().flatten() for p in trainer.parameters]) - before)
    assert gap(ends[1], ends[0]) < 2e-2
    assert gap(ends[1], ends[0]) < gap(ends[2], ends[0])


# The scale -------------------------------------------------------------------------------------------------------------


def test_a_scale_is_halved_by_overflows_and_doubled_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "INTERVAL", 3)
    scale, values = LossScale(4.0), []
    for fine in (True, True, False, True, True, True, True, False, False, False, False):
        lowered = fine or scale.lower()
        if fine:
            scale.succeeded()
        values.append((scale.value, lowered))
    assert [value for value, _ in values] == [4, 4, 2, 2, 2, 4, 4, 2, 1, 1, 1]
    assert [lowered for _, lowered in values] == [True] * 9 + [False] * 2


def test_the_scale_stays_below_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "INTERVAL", 1)
    scale = LossScale()
    for _ in range(100):
        scale.succeeded()
    assert scale.value == 2.0**32
    assert math.isfinite(65504 * scale.value)


def test_overflows_lower_the_scale_and_are_no_skipped_steps(tmp_path: Path) -> None:
    changes = {"loop.precision": "fp16", "loop.iterations": 14, "loop.log_every": 1, "guard.patience": 2}
    trainer = tiny_trainer(tmp_path / "run", changes)
    assert trainer.scale is not None
    trainer.scale.value = 2.0**30
    before = state_of(trainer)
    trainer.step()
    assert differing(state_of(trainer), before) == []
    assert (trainer.guard.overflows, trainer.skipped, trainer.scale.value) == (1, 0, 2.0**29)
    trainer.run()
    lines = read_metrics(tmp_path / "run")
    assert 2 <= trainer.guard.overflows < 14
    assert (lines[-1]["overflows"], lines[-1]["skipped"], lines[-1]["rollbacks"]) == (trainer.guard.overflows, 0, 0)
    assert lines[-1]["loss_scale"] == trainer.scale.value == 2.0 ** (30 - trainer.guard.overflows)
    assert trainer.guard.updates >= 14 - trainer.guard.overflows
    assert all(value.isfinite().all() for value in state_of(trainer).values())


@pytest.mark.parametrize("kind", ["teacher", "vsd"])
def test_a_resumed_run_has_the_scale_of_the_whole(
    kind: str, teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an overflow before and a doubling after the interruption."""
    monkeypatch.setattr(scaling, "INTERVAL", 3)
    monkeypatch.setattr(scaling.LossScale.__init__, "__defaults__", (2.0**28, 0))
    changes = {"loop.precision": "fp16", "loop.iterations": 6, "loop.checkpoint_every": 3}
    whole = make(kind, tmp_path / "whole", teacher, changes)
    whole.run()
    parts = make(kind, tmp_path / "parts", teacher, changes)
    step = parts.step

    def cut() -> Any:
        if parts.iteration == 4:
            raise RuntimeError("power cut")
        return step()

    parts.step = cut  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="power cut"):
        parts.run()
    resumed = make(kind, tmp_path / "parts", teacher, changes, resume=True)
    assert resumed.iteration == 3
    resumed.run()
    assert differing(state_of(resumed), state_of(whole)) == []
    assert resumed.guard.state() == whole.guard.state()
    assert whole.guard.overflows > 0


def test_only_bf16_is_gathered_in_bf16(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dtype is bf16; expected fp32 unless loop"):
        tiny_trainer(tmp_path / "run", {"loop.precision": "fp16", "parallel.dtype": "bf16"})
