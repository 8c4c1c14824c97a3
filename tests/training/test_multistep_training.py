"""Multistep students from the settings to the samples: trained, resumed, saved, drawn, measured, planned."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.tiny import change, differing, digits, state_of, tiny_config, tiny_trainer, untrained_teacher
from trigflow import UserError, load, model_of
from trigflow.conditions import takes
from trigflow.evaluation.evaluate_model import evaluations
from trigflow.lab.plan import Step
from trigflow.lab.recipes import NamedRun, get_run
from trigflow.models.model import Model
from trigflow.networks import ConditioningConfig, CustomConfig, DDPMPPConfig, EDM2Config, NetworkConfig, build
from trigflow.objectives import flow_map_loss, objective_of
from trigflow.process import TrigFlow
from trigflow.samplers import flow_map_sample, network_velocity, segment_times
from trigflow.segments import segment_bounds
from trigflow.training.config import from_dict, to_dict
from trigflow.training.describe import describe_run
from trigflow.training.setup import fit_network, start_from

SCD = {"objective.kind": "scd", "objective.segments": 4}


@pytest.fixture(scope="module")
def teacher() -> Model:
    return untrained_teacher()


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [1, 2, 4, 8, 16])
def test_the_student_takes_the_end_where_there_are_segments(segments: int) -> None:
    config = tiny_config({"objective.kind": "sct", "objective.segments": segments})
    config.validate()
    assert fit_network(config, digits()).network.conditioning.takes == (("end",) if segments > 1 else ())
    assert from_dict(to_dict(config)) == config


def test_a_configuration_from_before_there_were_segments_can_be_read() -> None:
    """In the first format, where the network said with `takes_end` what `takes` says now."""
    config = tiny_config({"objective.kind": "sct"})
    raw = to_dict(config)
    del raw["format"], raw["objective"]["segments"], raw["network"]["conditioning"]["takes"]
    assert from_dict(raw) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective.segments": 0}, r"^objective.segments is 0; expected at least 1; correct the setting$"),
        ({"objective.kind": "vsd"}, r"^objective.segments is 4; expected 1, .* jumps to 0; correct the setting$"),
        ({"objective.kind": "scd-vsd"}, r"^objective.segments is 4; expected 1, .* jumps to 0; correct the setting$"),
        ({"objective.kind": "meanflow"}, r"^objective.segments is 4; expected 1 with jumps any, .*; correct the setting$"),
        ({"process": TrigFlow(sigma_max=0.8)}, r"^4 segments .*; expected it to begin below t_max = 1.0122; use fewer"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config({**SCD, **changes}), teacher="teacher")
    with pytest.raises(UserError, match=words):
        config.validate()
    with pytest.raises(UserError, match=words):
        tiny_trainer(tmp_path / "run", {**SCD, **changes})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["diffusion", "ct", "cd"])
def test_others_have_no_segments(kind: str) -> None:
    with pytest.raises(UserError, match=rf"^objective.segments for the objective {kind}; expected one of .*; correct"):
        objective_of(kind, segments=4)
    raw = to_dict(tiny_config({"objective.kind": kind}))
    raw["objective"]["segments"] = 4
    with pytest.raises(UserError, match="segments"):
        from_dict(raw)


# Runs ----------------------------------------------------------------------------------------------------------------


def test_a_student_starts_as_its_teacher_for_every_end(teacher: Model, tmp_path: Path) -> None:
    network = tiny_trainer(tmp_path, SCD, teacher=teacher).network
    x, t, label = torch.randn(4, 1, 8, 8), torch.linspace(0.2, 1.5, 4), torch.tensor([1, 2, 3, 10])
    for end in (torch.zeros(4), t / 2):
        assert torch.equal(network(x, t, label=label, end=end), teacher.network(x, t, label=label))


def test_the_loss_is_that_of_the_segments(teacher: Model, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, SCD, teacher=teacher)
    batch = trainer.batches.draw(torch.arange(8), torch.Generator().manual_seed(0))
    told, (end, _) = {"label": batch["condition.label"]}, segment_bounds(batch["t"], 4)
    assert torch.equal(batch["end"], end)
    assert end.max() > 0
    expected = flow_map_loss(
        trainer.network, trainer.config.process, batch["x0"], batch["noise"], batch["t"], end,
        teacher=teacher.velocity(told), conditions=told, r=0.25, weight=trainer.student.weights["weight"],
        config=objective_of("scd", segments=4, tangent=trainer.config.objective.tangent),
    )  # fmt: skip
    assert torch.equal(trainer.losses.first(batch, 1).value, expected.value)


@pytest.mark.parametrize(("kind", "segments"), [("scd", 4), ("sct", 2)])
def test_it_is_trained_saved_and_drawn(kind: str, segments: int, teacher: Model, tmp_path: Path) -> None:
    changes = {"objective.kind": kind, "objective.segments": segments, "loop.sample_every": 3}
    trainer = tiny_trainer(tmp_path, changes, teacher=teacher)
    start = trainer.network.conditioning.end_time.weight.detach().clone()
    model = trainer.run()
    assert not torch.equal(trainer.network.conditioning.end_time.weight, start)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["00000003.png", "00000006.png"]
    again = load(tmp_path, "cpu")
    assert (again.kind, again.default_steps(), evaluations(again, None)) == ("consistency", segments, segments)
    drawn = again.sample(3, seed=5)
    assert torch.equal(drawn, model.sample(3, seed=5, steps=segments))
    z, velocity = again.noise(5, 0, 0, 3), network_velocity(again.network, again.process, {"label": torch.arange(3)})
    x0 = flow_map_sample(velocity, again.process, z, segment_times(again.process, segments))
    assert torch.equal(drawn, again.codec.stored(x0))
    assert "objective.segments" in describe_run(tmp_path)


def test_other_steps_and_times_are_refused(teacher: Model, tmp_path: Path) -> None:
    model = tiny_trainer(tmp_path, {**SCD, "loop.iterations": 1}, teacher=teacher).run()
    for steps in (1, 2, 3, 5):
        with pytest.raises(
            UserError, match=rf"^{steps} steps for a multistep model of 4 segments; expected 4 steps, one .*; drop --steps$"
        ):
            model.sample(2, steps=steps)
    with pytest.raises(UserError, match=r"^sampling times for a multistep model of 4 segments; expected 4 .*; drop times$"):
        model.sample(2, times=(1.5, 1.0, 0.5, 0.2))


def test_a_guided_student(teacher: Model, tmp_path: Path) -> None:
    changes = {**SCD, "objective.guidance_max": 2.0, "loop.iterations": 2}
    model = tiny_trainer(tmp_path, changes, teacher=teacher).run()
    assert "guidance" in model.takes
    assert model.sample(2, guidance=1.5).shape == (2, 1, 8, 8)


def test_a_run_is_resumed(teacher: Model, tmp_path: Path) -> None:
    whole = tiny_trainer(tmp_path / "whole", SCD, teacher=teacher)
    whole.run()
    part = tiny_trainer(tmp_path / "part", SCD, teacher=teacher)
    for _ in range(3):
        part.step()
    part.save_checkpoint()
    rest = tiny_trainer(tmp_path / "part", SCD, teacher=teacher, resume=True)
    assert rest.iteration == 3
    rest.run()
    assert differing(state_of(whole), state_of(rest)) == []


def test_one_segment_is_the_run_it_always_was(teacher: Model, tmp_path: Path) -> None:
    """Same weights, and no input for the end."""
    runs = [
        tiny_trainer(tmp_path / name, {"objective.kind": "scd", **changes}, teacher=teacher)
        for name, changes in (("a", {}), ("b", {"objective.segments": 1}))
    ]
    for trainer in runs:
        trainer.run()
    assert differing(*map(state_of, runs)) == []
    assert not any("end_time" in name for name in state_of(runs[1]))


def test_a_student_of_fewer_segments_as_the_start(teacher: Model, tmp_path: Path) -> None:
    one = tiny_trainer(tmp_path / "one", {"objective.kind": "scd"}, teacher=teacher).run()
    four = tiny_trainer(tmp_path / "four", {**SCD, "start": "one"}, teacher=teacher, start=one)
    own, given = four.network.state_dict(), one.network.state_dict()
    assert all(torch.equal(own[name], value) for name, value in given.items())
    with pytest.raises(UserError, match="the student's network differs from that of the start"):
        start_from(one.network, four.network, "start")


# Other networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network",
    [
        EDM2Config(1, 8, 16, mult=(1, 2), blocks=1, attention=(), head_width=8, conditioning=ConditioningConfig(width=8)),
        DDPMPPConfig(1, 8, 8, mult=(1, 2), blocks=1, attention=(), conditioning=ConditioningConfig(width=8)),
    ],
)
def test_the_networks_of_the_paper(network: NetworkConfig, tmp_path: Path) -> None:
    changes = {"objective.kind": "sct", "objective.segments": 2, "network": network, "loop.iterations": 2}
    trainer = tiny_trainer(tmp_path, changes)
    model = trainer.run()
    assert trainer.skipped == 0
    assert "end" in takes(model.network)
    assert model.sample(2).shape == (2, 1, 8, 8)


class Own(nn.Module):
    """`F(x, t)`, and with an end where `takes` says so."""

    def __init__(self, told: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(65, 64)
        if told is not None:
            self.takes = frozenset(told)

    def forward(self, x: Tensor, t: Tensor, **told: Tensor) -> Tensor:
        assert told.keys() == takes(self)
        clock = t - told["end"] if told else t
        return torch.tanh(self.linear(torch.cat([x.flatten(1), clock[:, None]], dim=1))).reshape(x.shape)


def train_own(folder: Path, network: nn.Module, changes: dict[str, Any]) -> Model:
    from trigflow.training.trainer import Trainer

    settings = {"objective.kind": "sct", "loop.iterations": 2, **changes}
    return Trainer(tiny_config(settings), folder, network=network, dataset=digits(), progress=False).run()


@pytest.mark.parametrize("told", [None, (), ("end",)])
def test_a_module_of_the_users_own_with_and_without_the_input(told: tuple[str, ...] | None, tmp_path: Path) -> None:
    model = train_own(tmp_path, Own(told), {"objective.segments": 4})
    assert isinstance(model.spec, CustomConfig)
    assert model.spec.conditioning.takes == (told or ())
    again = load(tmp_path, "cpu", network=Own(told))
    assert torch.equal(again.sample(2), model.sample(2))
    if not told:
        plain = train_own(tmp_path / "plain", Own(told), {})
        assert plain.sample(2, steps=1).shape == (2, 1, 8, 8)


def test_a_module_of_the_users_own_that_does_not_fit_the_run(tmp_path: Path) -> None:
    for changes in ({}, {"objective.kind": "diffusion"}):
        with pytest.raises(UserError, match=r"^the network takes end and the run has no jumps with ends; expected .*; set"):
            train_own(tmp_path / "run", Own(("end",)), changes)
    for told in (None, ()):
        with pytest.raises(
            UserError, match=r"^the network does not take end and the run learns average velocities, .*expected .*; add"
        ):
            train_own(tmp_path / "run", Own(told), {"objective.kind": "meanflow"})
    assert not (tmp_path / "run").exists()


def test_a_model_around_a_module_that_takes_the_end() -> None:
    model = model_of(Own(("end",)), (1, 8, 8))
    assert model.spec.conditioning.takes == ("end",)
    assert model.sample(2, steps=3).shape == (2, 1, 8, 8)  # a diffusion model: jumps of no length


# Planning ------------------------------------------------------------------------------------------------------------


def test_a_multistep_run_can_be_planned() -> None:
    """As many operations as one of a single segment, but for the embedding of the end."""
    run = get_run("img512-s-scd")
    narrow = {"network.width": 32, "network.mult": (1, 2), "network.blocks": 1, "network.head_width": 32}
    counts = [Step(NamedRun("x", change(run.config, {**narrow, "objective.segments": m}), (4, 16, 16), 10)) for m in (1, 4)]
    one, four = counts
    assert four.student.parameters > one.student.parameters
    assert four.teacher == one.teacher
    assert four.forward == pytest.approx(one.forward, rel=1e-2)
    assert four.count(4).total == pytest.approx(one.count(4).total, rel=1e-2)
    assert "end" in takes(build(counts[1].config.network))
