"""Runs of MeanFlow: what is drawn and learned in them, what they can draw, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training.tiny import all_digits, change, differing, state_of, tiny_config, tiny_trainer, untrained_teacher
from trigflow.cli import main
from trigflow.evaluation.evaluate_model import evaluations
from trigflow.lab.plan.step import Step
from trigflow.lab.recipes import get_run
from trigflow.lab.recipes.named import NamedRun
from trigflow.models.model import Model, load
from trigflow.objectives import flow_map_loss, objective_of
from trigflow.process import Proposal
from trigflow.runtime.errors import UserError
from trigflow.samplers import meanflow_times
from trigflow.training.config import from_dict, read_config, to_dict
from trigflow.training.trainer import Trainer

Changes = dict[str, Any]

DATA: Changes = {"objective.kind": "meanflow"}
DISTILL: Changes = {"objective.kind": "meanflow-distill"}
KINDS: dict[str, Changes] = {
    "data": DATA,
    "distilled": {**DISTILL, "objective.guidance_max": 2.0, "loop.channels_last": True},
    "learned weighting, muon": {**DISTILL, "objective.weighting": "learned", "optimizer.name": "muon"},
    "bf16 in parts": {**DATA, "loop.precision": "bf16", "loop.accumulate": 2},
}


@pytest.fixture(scope="module")
def teacher() -> Model:
    return untrained_teacher()


def make(changes: Changes, folder: Path, teacher: Model, resume: bool = False) -> Trainer:
    return tiny_trainer(folder, {"loop.iterations": 4, **changes}, teacher=teacher, resume=resume)


def draw(trainer: Trainer, n: int, seed: int = 0) -> dict[str, Tensor]:
    return trainer.batches.draw(torch.arange(n) % 100, torch.Generator().manual_seed(seed))


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_draws_in_any_number_of_steps_and_goes_on_where_it_stopped(kind: str, teacher: Model, tmp_path: Path) -> None:
    whole = make(KINDS[kind], tmp_path / "whole", teacher)
    model = whole.run()
    assert (whole.skipped, model.kind) == (0, "consistency")
    parts = make({**KINDS[kind], "loop.iterations": 2}, tmp_path / "parts", teacher)
    parts.run()
    resumed = make(KINDS[kind], tmp_path / "parts", teacher, resume=True)
    assert resumed.iteration == 2
    resumed.run()
    assert differing(state_of(resumed), state_of(whole)) == []

    loaded, seen = load(tmp_path / "whole", "cpu"), []
    assert "end" in loaded.spec.conditioning.takes
    for steps in (1, 2, 4):
        images = loaded.sample(12, steps=steps, seed=5)
        assert torch.equal(images, model.sample(12, steps=steps, seed=5))
        assert images.float().std() > 5
        assert evaluations(loaded, steps) == steps
        seen.append(images)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_a_student_starts_as_its_teacher(teacher: Model, tmp_path: Path) -> None:
    """For every end, and the error of flow matching from the teacher's velocity is zero."""
    trainer = make(DISTILL, tmp_path / "run", teacher)
    batch = draw(trainer, 16)
    x, t, label = batch["x0"] / 0.5, batch["t"], batch["condition.label"]
    for end in (t, batch["end"], torch.zeros_like(t)):
        assert torch.equal(trainer.network(x, t, label=label, end=end), teacher.network(x, t, label=label))
    still = make({**DISTILL, "objective.anchor": 1.0}, tmp_path / "still", teacher)
    figures = still.losses.first(draw(still, 16), 0).figures
    assert float(figures["loss"].max()) < 1e-10
    assert float(figures["tangent_norm"].max()) < 1e-5


def test_times_and_ends_of_a_batch(teacher: Model, tmp_path: Path) -> None:
    """They are those of the proposal; other random numbers are not moved by its settings."""
    proposal = Proposal(1.0 + math.log(0.5), 0.5)
    trainer = make({**DATA, "objective.proposal": proposal}, tmp_path / "run", teacher)
    batch = draw(trainer, 4000)
    t, end = batch["t"], batch["end"]
    assert bool(((end > 0) & (end <= t) & (t < torch.pi / 2)).all())
    assert float((t == end).double().mean()) == pytest.approx(0.75, abs=0.03)
    below = 1.0 - 0.5 / torch.pi**0.5  # the mean of the smaller of two normal numbers
    assert float(torch.log(torch.tan(end[end < t])).mean()) == pytest.approx(below, abs=0.05)
    other = draw(make(DATA, tmp_path / "other", teacher), 4000)
    for name in ("x0", "noise", "condition.label"):
        assert torch.equal(other[name], batch[name])
    assert set(batch) == {"x0", "noise", "t", "end", "condition.label"}


def test_the_step_is_that_of_the_objective(teacher: Model, tmp_path: Path) -> None:
    """With labels, drawn guidance scales and a guided teacher."""
    settings = {**DISTILL, "objective.guidance_max": 3.0, "objective.power": 0.5, "objective.anchor": 0.5}
    trainer = make(settings, tmp_path / "run", teacher)
    trainer.step()
    batch = draw(trainer, 16)
    label, scale = batch["condition.label"], batch["condition.guidance"]
    assert float(scale.max()) > 1
    expected = flow_map_loss(
        trainer.network, trainer.config.process, batch["x0"], batch["noise"], batch["t"], batch["end"],
        teacher=teacher.velocity({"label": label}, scale), conditions={"label": label, "guidance": scale},
        config=objective_of("meanflow-distill", power=0.5),
    )  # fmt: skip
    trainer.student.begin(1)
    values, figures = trainer.losses.backward(batch, 1, parts=1)
    assert values["weighted_loss"] == pytest.approx(float(expected.value.detach()), rel=1e-5)
    torch.testing.assert_close(figures["loss"], expected.figures["loss"])
    gradients = torch.autograd.grad(expected.value, list(trainer.network.parameters()))
    for mine, theirs in zip(trainer.network.parameters(), gradients, strict=True):
        torch.testing.assert_close(mine.grad, theirs, rtol=1e-3, atol=1e-6)


def test_accumulation_is_the_same_step_in_parts(teacher: Model, tmp_path: Path) -> None:
    gradients = []
    for parts in (1, 4):
        trainer = make({**DATA, "loop.accumulate": parts}, tmp_path / str(parts), teacher)
        trainer.step()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.network.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5 * float(gradients[0].abs().max()))


def test_the_weighting_is_learned_only_where_it_is_used(teacher: Model, tmp_path: Path) -> None:
    assert set(make(DATA, tmp_path / "error", teacher).modules) == {"network"}
    learned = make({**DATA, "objective.weighting": "learned"}, tmp_path / "learned", teacher)
    assert set(learned.modules) == {"network", "weight"}
    learned.step()
    assert learned.modules["weight"].linear.weight.abs().max() > 0
    fixed = {**DATA, "objective.weighting": "learned", "objective.adaptive_weight": False}
    assert set(make(fixed, tmp_path / "fixed", teacher).modules) == {"network"}


def test_from_scratch(tmp_path: Path) -> None:
    model = tiny_trainer(tmp_path / "run", {**DATA, "loop.iterations": 2}).run()
    assert "end" in model.spec.conditioning.takes
    assert model.sample(4, steps=1).shape == (4, 1, 8, 8)


# Sampling ------------------------------------------------------------------------------------------------------------


def test_sampling_times(teacher: Model, tmp_path: Path) -> None:
    """Given, or searched and kept with the model; without them even on the straight path."""
    model = make({**DISTILL, "loop.iterations": 2}, tmp_path / "run", teacher).run()
    t_max = model.process.t_max
    even = model.sample(8, steps=2)
    assert torch.equal(even, model.sample(8))  # two steps are the default
    assert torch.equal(even, model.sample(8, times=meanflow_times(model.process, 2)))
    other = model.sample(8, times=(t_max, 1.3))
    assert not torch.equal(even, other)
    model.times[2] = (t_max, 1.3)
    model.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", "cpu").sample(8, steps=2), other)
    for times in ((), (0.5, 1.0)):
        with pytest.raises(UserError, match="expected one or more decreasing times"):
            model.sample(8, times=times)


def test_no_fresh_noise_is_drawn(teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, drawn = make({**DISTILL, "loop.iterations": 1}, tmp_path / "run", teacher).run(), []
    noise = Model.noise
    monkeypatch.setattr(Model, "noise", lambda self, seed, k, *where: drawn.append(k) or noise(self, seed, k, *where))
    model.sample(4, steps=4)
    assert drawn == [0]


def test_a_guided_student_takes_the_scale(teacher: Model, tmp_path: Path) -> None:
    model = make({**DISTILL, "objective.guidance_max": 3.0, "optimizer.lr": 0.05}, tmp_path / "run", teacher).run()
    assert "guidance" in model.takes
    assert not torch.equal(model.sample(8, steps=1, guidance=1.0), model.sample(8, steps=1, guidance=3.0))


def test_a_run_can_be_planned() -> None:
    """One pass with a tangent, as sCD has, and the embedding of the end."""
    run = get_run("img512-s-scd")
    narrow = {"network.width": 32, "network.mult": (1, 2), "network.blocks": 1, "network.head_width": 32}
    scd, meanflow = (
        Step(NamedRun("x", change(run.config, {**narrow, "objective.kind": kind}), (4, 16, 16), 10))
        for kind in ("scd", "meanflow-distill")
    )
    assert meanflow.teacher == scd.teacher
    assert meanflow.count(4).total == pytest.approx(scd.count(4).total, rel=1e-2)
    assert set(meanflow.batch(2)) == {"x0", "noise", "t", "end", "condition.label", "condition.guidance"}


# Settings ------------------------------------------------------------------------------------------------------------


def test_settings_survive_json() -> None:
    objective = objective_of(
        "meanflow-distill", proposal=Proposal(-2.0, 2.0), anchor=0.25, weighting="learned", power=0.75, c=0.01
    )
    config = tiny_config({"objective": objective, "teacher": "a"})
    assert from_dict(to_dict(config)) == config
    config.validate()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("anchor", 1.5, r"objective.anchor is 1.5; expected .*\[0, 1\]"),
        ("proposal.std", 0.0, "std=0.0; expected .* std > 0"),
        ("proposal.mean", float("nan"), "mean=nan, .*; expected finite numbers"),
        ("power", -1.0, "objective.power is -1.0; expected 0 or more"),
        ("c", 0.0, "objective.c is 0.0; expected a positive number"),
    ],
)
def test_settings_out_of_range(name: str, value: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config({**DATA, f"objective.{name}": value}).validate()


def test_distillation_wants_a_teacher(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="distillation without a teacher"):
        tiny_config(DISTILL).validate()
    with pytest.raises(UserError, match="distillation without a teacher"):
        Trainer(change(tiny_config(DISTILL), {"teacher": "a"}), tmp_path / "run", dataset=all_digits(), progress=False)
    assert not (tmp_path / "run").exists()


def test_on_the_command_line(teacher: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher.save(tmp_path / "teacher")
    quick = ["--iterations", "2", "--batch-size", "8", "--loop.sample-every", "0", "--loop.device", "cpu", "--quiet"]
    run = ["distill", str(tmp_path / "teacher"), "--out", str(tmp_path / "run"), *quick]
    main([*run, "--objective.kind", "meanflow-distill", "--objective.anchor", "0.5"])
    main(["sample", str(tmp_path / "run"), "--steps", "1", "--num", "4", "--out", str(tmp_path / "a.png"), "--quiet"])
    assert (tmp_path / "a.png").is_file()
    assert read_config(tmp_path / "run").objective.anchor == 0.5
    train = ["train", "--data", "digits", "--out", str(tmp_path / "bad"), *quick]
    with pytest.raises(SystemExit) as left:
        main([*train, "--objective.kind", "meanflow-distill"])
    assert left.value.code == 2
    assert "train without a teacher cannot distill" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
