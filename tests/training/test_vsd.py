"""Training with a fake score network: two learners that step together, stop together and go on together."""

from __future__ import annotations

import copy
import dataclasses
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.tiny import NETWORK, differing, digits, state_of, tiny_config, tiny_trainer, untrained_teacher
from trigflow.cli import main
from trigflow.codecs import Pixels
from trigflow.conditions import Conditioner
from trigflow.models.model import Model, load
from trigflow.networks import ConditioningConfig, DDPMPPConfig, DiTConfig, EDM2Config, NetworkConfig, build
from trigflow.objectives import (
    Loss,
    diffusion_loss,
    distribution,
    fake_score_loss,
    flow_map,
    flow_map_loss,
    objective_of,
    rollout,
    vsd_loss,
)
from trigflow.runtime.errors import UserError
from trigflow.samplers import Sampling, network_velocity
from trigflow.training.config import read_config
from trigflow.training.log import FigureWindow, read_metrics
from trigflow.training.trainer import Trainer

Changes = dict[str, Any]

VSD: Changes = {"objective.kind": "vsd"}
BOTH: Changes = {"objective.kind": "scd-vsd", "objective.guidance_max": 2.0}
KINDS: dict[str, Changes] = {
    "vsd": {**VSD, "optimizer.name": "muon", "optimizer.schedule": "cosine", "objective.adaptive_weight": False},
    "scd-vsd": {**BOTH, "loop.channels_last": True, "objective.fake_lr": 1e-3},
    "dropout, more fake updates": {**BOTH, "network.dropout": 0.3, "objective.fake_updates": 3},
    "bf16 in parts": {**BOTH, "loop.precision": "bf16", "loop.accumulate": 2, "optimizer.clip": 0.1},
}


@pytest.fixture(scope="module")
def teacher() -> Model:
    return untrained_teacher()


def make(kind: str, folder: Path, teacher: Model, resume: bool = False) -> Trainer:
    changes = {**KINDS[kind], "loop.iterations": 4, "teacher": "teacher"}
    network = dataclasses.replace(teacher.spec, dropout=changes.pop("network.dropout", 0.0))
    config = tiny_config({**changes, "network": network})
    return Trainer(config, folder, teacher=teacher, dataset=digits(), resume=resume, progress=False)


def fake_of(trainer: Trainer) -> nn.Module:
    assert trainer.fake is not None
    return trainer.fake.network


def same(a: nn.Module, b: nn.Module, names: Callable[[str], bool] = lambda name: True) -> bool:
    own, other = a.state_dict(), b.state_dict()
    return all(torch.equal(own[name], other[name]) for name in other if names(name))


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest, teacher: Model, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run that nothing interrupted."""
    trainer = make(request.param, tmp_path_factory.mktemp("whole") / request.param, teacher)
    trainer.run()
    return trainer


@pytest.mark.parametrize(("function", "call"), [("vsd_loss", 3), ("diffusion_loss", 4)])
def test_interrupted_and_resumed_is_uninterrupted(
    function: str, call: int, whole: Trainer, teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of a step, before the last loss of the student or before that of the fake score."""
    kind, expected = whole.folder.name, state_of(whole)
    assert {"network", "fake", "ema", "optimizer", "fake_optimizer"} <= {name.split(".")[0] for name in expected}
    original, calls = getattr(distribution, function), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(distribution, function, counted)
        interrupted = make(kind, tmp_path / kind, teacher)
        with pytest.raises(KeyboardInterrupt):
            interrupted.run()
    assert 0 < interrupted.iteration < 4

    resumed = make(kind, tmp_path / kind, teacher, resume=True)
    assert resumed.iteration == interrupted.iteration
    assert differing(state_of(resumed), state_of(interrupted)) == []
    resumed.run()
    assert differing(state_of(resumed), expected) == []
    assert (resumed.folder / "network.safetensors").read_bytes() == (whole.folder / "network.safetensors").read_bytes()


@pytest.mark.parametrize("learner", ["student", "fake"])
def test_ctrl_c_between_the_steps_of_the_learners_waits_for_both(learner: str, teacher: Model, tmp_path: Path) -> None:
    whole = make("scd-vsd", tmp_path / "whole", teacher)
    whole.run()
    interrupted = make("scd-vsd", tmp_path / "parts", teacher)
    target = getattr(interrupted, learner)
    original, calls = target.update, 0

    def interrupting() -> None:
        nonlocal calls
        calls += 1
        original()
        if calls == 3:
            signal.raise_signal(signal.SIGINT)

    target.update = interrupting
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    assert interrupted.iteration == 3
    resumed = make("scd-vsd", tmp_path / "parts", teacher, resume=True)
    resumed.run()
    assert differing(state_of(resumed), state_of(whole)) == []


# One step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "rollouts"), [("vsd", 1), ("scd-vsd", 1), ("scd-vsd", 3)])
def test_the_gradients_are_those_of_the_objectives(kind: str, rollouts: int, teacher: Model, tmp_path: Path) -> None:
    """With labels, drawn guidance scales, a guided teacher and factor lambda; the fake score learns from the same samples.
    Also of rollouts, in the third step of three evaluations, and with the sine weighting of the fake score."""
    changes = {**BOTH, "objective.kind": kind, "objective.lambda_vsd": 0.7, "objective.adaptive_weight": False}
    changes |= {"objective.rollouts": rollouts, "objective.fake_weighting": "sine" if rollouts > 1 else "learned"}
    trainer = tiny_trainer(tmp_path / "run", changes, teacher=teacher)
    for _ in range(2):  # away from the start, where student, fake score and teacher are the same
        trainer.step()
    net, fake = copy.deepcopy(trainer.network), copy.deepcopy(fake_of(trainer))
    batches, draw = [], trainer.batches.draw
    object.__setattr__(trainer.batches, "draw", lambda *args: batches.append(draw(*args)) or batches[-1])
    trainer.step()
    (batch,) = batches

    process, label, scale = trainer.config.process, batch["condition.label"], batch["condition.guidance"]
    told = {"label": label, "guidance": scale}
    assert scale.max() > 1
    guided = teacher.velocity({"label": label}, scale)
    times = (process.t_max, *(batch[f"rollout_t{k}"] for k in range(1, rollouts)))
    fresh = [batch[f"rollout_z{k}"] for k in range(1, rollouts)]
    sample = rollout(net, process, batch["z"], times, fresh, conditions=told)
    score = network_velocity(fake, process, told)
    value = 0.7 * vsd_loss(sample, process, batch["vsd_noise"], batch["vsd_t"], teacher=guided, fake=score).value
    if kind == "scd-vsd":
        tangent = trainer.config.objective.tangent
        value = value + flow_map_loss(
            net, process, batch["x0"], batch["noise"], batch["t"], teacher=guided, conditions=told,
            config=objective_of("scd", tangent=tangent), r=tangent.warmup_factor(2),
        ).value  # fmt: skip
    value.backward()
    noise, t = batch["fake_noise"], batch["fake_t"]
    fake_loss = fake_score_loss if rollouts > 1 else diffusion_loss
    fake_loss(fake, process, sample.detach(), noise, t, conditions=told).value.backward()
    for mine, theirs in ((trainer.network, net), (fake_of(trainer), fake)):
        for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("parts", [4])
def test_accumulation_is_the_same_step_in_parts(parts: int, teacher: Model, tmp_path: Path) -> None:
    grads, seen = [], []
    for accumulate in (1, parts):
        trainer = tiny_trainer(tmp_path / str(accumulate), {**BOTH, "loop.accumulate": accumulate}, teacher=teacher)
        trainer.step()
        seen.append(trainer.step())
        assert trainer.fake is not None
        parameters = trainer.parameters + trainer.fake.parameters
        grads.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-2, atol=1e-4 * float(grads[0].abs().max()))
    for name in ("weighted_loss", "fake_weighted_loss", "grad_norm", "fake_grad_norm"):
        assert float(seen[1][0][name]) == pytest.approx(float(seen[0][0][name]), rel=1e-3)
    for name in ("t", "vsd_t", "fake_t"):
        assert torch.equal(seen[1][1][name], seen[0][1][name])


@pytest.mark.parametrize("fault", ["flow_map_loss", "vsd_loss", "diffusion_loss", "gradient of the fake score"])
def test_a_step_that_is_not_finite_changes_neither_learner(
    fault: str, teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "diffusion_loss" if "gradient" in fault else fault
    module = flow_map if name == "flow_map_loss" else distribution
    original, calls = getattr(module, name), 0

    def spoil(*args: Any, **kwargs: Any) -> Loss:
        nonlocal calls
        calls += 1
        loss: Loss = original(*args, **kwargs)
        if calls != 2:
            return loss
        if "gradient" not in fault:
            return Loss(loss.value * math.nan, loss.figures)
        hooked = loss.value * 1.0
        hooked.register_hook(lambda gradient: gradient * math.inf)
        return Loss(hooked, loss.figures)

    monkeypatch.setattr(module, name, spoil)
    trainer = tiny_trainer(tmp_path / "run", BOTH, teacher=teacher)
    trainer.step()
    before = state_of(trainer)
    trainer.step()
    assert differing(state_of(trainer), before) == []
    assert (trainer.iteration, trainer.skipped) == (2, 1)
    trainer.step()
    changed = {name.split(".")[0] for name in differing(state_of(trainer), before)}
    assert {"network", "ema", "optimizer", "fake", "fake_optimizer"} <= changed
    assert trainer.skipped == 1


def test_every_weighting_learns(teacher: Model, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", BOTH, teacher=teacher)
    assert set(trainer.modules) == {"network", "weight", "vsd_weight", "fake", "fake_weight"}
    for _ in range(2):
        trainer.step()
    for name in ("weight", "vsd_weight", "fake_weight"):
        assert trainer.modules[name].linear.weight.abs().max() > 0


def test_more_updates_of_the_fake_score(teacher: Model, tmp_path: Path) -> None:
    """They follow that of the student, which is the same in the first step and another from the second on."""
    trainers = [
        tiny_trainer(tmp_path / str(updates), {**VSD, "objective.fake_updates": updates}, teacher=teacher) for updates in (1, 3)
    ]
    for trainer in trainers:
        trainer.step()
    assert same(trainers[0].network, trainers[1].network)
    assert not same(fake_of(trainers[0]), fake_of(trainers[1]))
    steps = [{int(s["step"]) for s in t.optimizers["fake_optimizer"].state.values()} for t in trainers]
    assert steps == [{1}, {3}]
    for trainer in trainers:
        trainer.step()
    assert not same(trainers[0].network, trainers[1].network)


def test_a_further_update_that_is_not_finite_is_left_out(
    teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = distribution.diffusion_loss, 0

    def spoil(*args: Any, **kwargs: Any) -> Loss:
        nonlocal calls
        calls += 1
        loss = original(*args, **kwargs)
        return Loss(loss.value * (math.nan if calls == 2 else 1.0), loss.figures)

    monkeypatch.setattr(distribution, "diffusion_loss", spoil)
    trainer = tiny_trainer(tmp_path / "run", {**VSD, "objective.fake_updates": 3}, teacher=teacher)
    trainer.step()
    assert calls == 3
    assert trainer.skipped == 0
    assert {int(s["step"]) for s in trainer.optimizers["fake_optimizer"].state.values()} == {2}
    assert all(bool(value.isfinite().all()) for value in state_of(trainer).values())


@pytest.mark.parametrize(("given", "expected"), [(None, 2e-3), (5e-4, 5e-4)])
def test_the_fake_score_has_a_learning_rate(given: float | None, expected: float, teacher: Model, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", {**VSD, "objective.fake_lr": given, "optimizer.warmup": 2}, teacher=teacher)
    trainer.step()
    assert trainer.optimizers["fake_optimizer"].param_groups[0]["lr"] == expected / 2
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3


def test_networks_that_normalize_their_weights_do_so_once_an_update(teacher: Model, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", {**BOTH, "objective.fake_updates": 2}, teacher=teacher)
    calls = {"student": 0, "fake": 0}

    def count(name: str) -> None:
        calls[name] += 1

    trainer.network.normalize_weights = lambda: count("student")
    fake_of(trainer).normalize_weights = lambda: count("fake")  # type: ignore[assignment]
    for _ in range(3):
        trainer.step()
    assert calls == {"student": 3, "fake": 6}


# Where a run starts --------------------------------------------------------------------------------------------------


def student(teacher: Model, folder: Path, changes: Changes | None = None) -> Model:
    """A consistency model of other weights than the teacher's."""
    changes = {"objective.kind": "scd", "loop.iterations": 3, "optimizer.lr": 1e-2, **(changes or {})}
    return tiny_trainer(folder, changes, teacher=teacher).run()


@pytest.mark.parametrize("guided", [False, True])
def test_the_fake_score_starts_as_the_teacher_and_the_student_where_it_is_told(
    guided: bool, teacher: Model, tmp_path: Path
) -> None:
    begun = student(teacher, tmp_path / "begun", {"objective.guidance_max": 2.0 if guided else 1.0})
    plain = tiny_trainer(tmp_path / "plain", BOTH, teacher=teacher)
    assert same(plain.network, teacher.network)
    assert same(fake_of(plain), teacher.network)
    further = tiny_trainer(tmp_path / "further", BOTH, teacher=teacher, start=begun)
    assert same(further.network, begun.network)
    assert not same(further.network, teacher.network)
    assert same(fake_of(further), teacher.network)
    assert same(fake_of(further), fake_of(plain))  # the start's guidance input is not in it
    assert same(further.ema.network, begun.network)
    if not guided:  # fake score and teacher still agree
        plain = tiny_trainer(tmp_path / "agreeing", {"objective.kind": "scd-vsd"}, teacher=teacher, start=begun)
        assert plain.step()[1]["vsd_loss"].max() < 1e-6


def test_a_start_that_does_not_fit(teacher: Model, tmp_path: Path) -> None:
    begun = student(teacher, tmp_path / "begun", {"objective.guidance_max": 2.0})
    with pytest.raises(UserError, match=r"differs from that of the start \(first difference 'conditioning\.guidance"):
        tiny_trainer(tmp_path / "run", VSD, teacher=teacher, start=begun)
    with pytest.raises(UserError, match=r"no model to start from; expected that of start = 'somewhere'"):
        tiny_trainer(tmp_path / "run", {**VSD, "start": "somewhere"}, teacher=teacher)
    other = dataclasses.replace(begun, codec=dataclasses.replace(begun.codec, shape=(1, 9, 9)))
    with pytest.raises(UserError, match=r"images of shape \(1, 8, 8\) and the start \(1, 9, 9\)"):
        tiny_trainer(tmp_path / "run", BOTH, teacher=teacher, start=other)
    symmetric = dataclasses.replace(begun, codec=Pixels.symmetric((1, 8, 8)))
    with pytest.raises(UserError, match="normalized otherwise"):
        tiny_trainer(tmp_path / "run", BOTH, teacher=teacher, start=symmetric)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["vsd", "scd-vsd"])
def test_a_teacher_is_needed(kind: str, teacher: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="distillation without a teacher"):
        tiny_trainer(tmp_path / "run", {"objective.kind": kind})
    consistency = dataclasses.replace(teacher, sampling=Sampling("flow_map"))
    with pytest.raises(UserError, match="the teacher is a consistency model; expected a diffusion model"):
        tiny_trainer(tmp_path / "run", {"objective.kind": kind}, teacher=consistency)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("objective.lambda_vsd", 0.0),
        ("objective.lambda_vsd", math.nan),
        ("objective.fake_lr", 0.0),
        ("objective.fake_lr", math.inf),
        ("objective.fake_updates", 0),
    ],
)
def test_settings_in_error(name: str, value: float, teacher: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}; expected"):
        tiny_trainer(tmp_path / "run", {**VSD, name: value}, teacher=teacher)
    assert not (tmp_path / "run").exists()


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vsd", "scd-vsd"])
def test_a_run_is_a_consistency_model_with_its_figures_logged(kind: str, teacher: Model, tmp_path: Path) -> None:
    changes = {**BOTH, "objective.kind": kind, "loop.sample_every": 3}
    tiny_trainer(tmp_path / "run", changes, teacher=teacher).run()
    model = load(tmp_path / "run", "cpu")
    assert (model.kind, "guidance" in model.takes, model.origin["objective"]) == ("consistency", True, kind)
    for steps in (1, 2):
        assert model.sample(3, steps=steps, guidance=1.5).shape == (3, 1, 8, 8)
    lines = read_metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["fake_loss"] > 0
        assert line["vsd_loss"] > 0 or line["iteration"] == 2
        assert all(len(line[f"{name}_by_time"]) == 8 for name in ("loss", "vsd_loss", "fake_loss"))
        assert {"weighted_loss", "fake_weighted_loss", "grad_norm", "fake_grad_norm", "lr"} <= set(line)
        assert not {"t", "vsd_t", "fake_t"} & set(line)
        assert ("tangent_norm" in line) == (kind == "scd-vsd")
        assert (line["loss"] == line["vsd_loss"]) == (kind == "vsd")


def test_figures_are_binned_by_the_time_of_their_loss() -> None:
    window = FigureWindow()
    low, high = torch.full((4,), 0.05), torch.full((4,), 1.55)
    one = torch.ones(4)
    window.add({"t": low, "loss": one, "vsd_t": high, "vsd_loss": 2 * one})
    figures = window.flush()
    assert set(figures) == {"loss", "loss_by_time", "vsd_loss", "vsd_loss_by_time"}
    assert figures["loss_by_time"] == [1.0] + [None] * 7
    assert figures["vsd_loss_by_time"] == [None] * 7 + [2.0]


WIDTH = ConditioningConfig(width=8)
NETWORKS: dict[str, NetworkConfig] = {
    "edm2": EDM2Config(width=16, mult=(1, 2), blocks=1, attention=(4,), conditioning=WIDTH),
    "ddpmpp": DDPMPPConfig(width=16, mult=(1, 2), blocks=1, attention=(4,), conditioning=WIDTH),
    "dit": DiTConfig(patch=2, width=16, depth=2, heads=2, conditioning=WIDTH),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_takes_part(name: str, tmp_path: Path) -> None:
    """Guided and in bf16; the guidance input of each network starts without effect, so the fake score is the teacher."""
    network = {"network": NETWORKS[name], "loop.iterations": 2}
    taught = tiny_trainer(tmp_path / "teacher", network).run()
    trainer = tiny_trainer(tmp_path / "run", {**BOTH, **network, "loop.precision": "bf16"}, teacher=taught)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, label, scale = torch.full((4,), 0.7), torch.arange(4), torch.full((4,), 1.5)
    with torch.no_grad():
        expected = taught.network(x, t, label=label)
        found = fake_of(trainer).eval()(x, t, label=label, guidance=scale)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    before = state_of(trainer)
    model = trainer.run()
    assert trainer.skipped == 0
    changed = {entry.split(".")[0] for entry in differing(before, state_of(trainer))}
    assert {"network", "fake", "ema", "vsd_weight", "fake_weight"} <= changed
    assert model.sample(2, steps=1, guidance=1.5).shape == (2, 1, 8, 8)


def test_an_unconditional_teacher(tmp_path: Path) -> None:
    data = dataclasses.replace(digits(), labels=None, class_names=())
    network = dataclasses.replace(NETWORK, conditioning=dataclasses.replace(NETWORK.conditioning, num_classes=0))
    plain = untrained_teacher()
    plain = dataclasses.replace(plain, network=build(network), spec=network, conditioner=Conditioner())
    config = tiny_config({"objective.kind": "scd-vsd", "network": network, "teacher": "t", "loop.iterations": 2})
    model = Trainer(config, tmp_path / "run", teacher=plain, dataset=data, progress=False).run()
    assert model.sample(2, steps=1).shape == (2, 1, 8, 8)


def test_the_command_starts_a_student_from_a_student(teacher: Model, tmp_path: Path) -> None:
    teacher.save(tmp_path / "teacher")
    begun = student(teacher, tmp_path / "begun")
    few = ["--loop.iterations", "1", "--loop.batch-size", "4", "--loop.device", "cpu", "--optimizer.lr", "1e-9"]
    main(
        ["distill", str(tmp_path / "teacher"), "--from", str(tmp_path / "begun"), "--out", str(tmp_path / "run"),
         "--objective.kind", "scd-vsd", "--objective.fake-updates", "2", "--optimizer.name", "adam", "--quiet", *few]
    )  # fmt: skip
    model = load(tmp_path / "run", "cpu")
    assert model.origin["objective"] == "scd-vsd"
    config = read_config(tmp_path / "run")
    assert config.start == str(tmp_path / "begun")
    assert config.objective.fake_updates == 2

    def gap(other: Model) -> Tensor:
        pairs = zip(model.network.parameters(), other.network.parameters(), strict=True)
        return torch.stack([(a - b).abs().max() for a, b in pairs]).max()

    assert gap(begun) < 1e-6 < gap(teacher)
