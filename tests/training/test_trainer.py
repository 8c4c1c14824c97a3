"""The trainer: what it computes, what it writes, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from training.tiny import NETWORK, change, differing, digits, state_of, tiny_config, tiny_trainer, untrained_teacher
from trigflow.conditions import Conditioner, null, takes
from trigflow.models.model import Model, load
from trigflow.networks import MLPConfig, build
from trigflow.objectives import Loss, diffusion
from trigflow.runtime.errors import UserError
from trigflow.samplers import Sampling
from trigflow.training.checkpoint import list_checkpoints
from trigflow.training.ema import power_exponent
from trigflow.training.log import read_metrics
from trigflow.training.runs import distill, train
from trigflow.training.setup import start_from
from trigflow.training.trainer import Trainer

Changes = dict[str, Any]


@pytest.fixture(scope="module")
def teacher() -> Model:
    return untrained_teacher()


def finite(state: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in state.values())


def patch_loss(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Loss], Loss]) -> None:
    """Let `change(call, loss)` replace what the diffusion objective returns; calls count from 0."""
    original, calls = diffusion.diffusion_loss, 0

    def changed(*args: Any, **kwargs: Any) -> Loss:
        nonlocal calls
        calls += 1
        return change(calls - 1, original(*args, **kwargs))

    monkeypatch.setattr(diffusion, "diffusion_loss", changed)


# Seeds and random numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_seed_gives_the_same_run_and_another_seed_another(dropout: float, tmp_path: Path) -> None:
    states = []
    for i, seed in enumerate((3, 3, 4)):
        trainer = tiny_trainer(
            tmp_path / str(i), {"loop.seed": seed, "loop.iterations": 3, "network.dropout": dropout, "data.flip": True}
        )
        trainer.run()
        states.append(state_of(trainer))
    assert differing(states[0], states[1]) == []
    learned = [name for name in states[0] if name.startswith("network.")]
    assert set(learned) <= set(differing(states[0], states[2]))


def test_seeds_reach_weights_order_and_noise_each(tmp_path: Path) -> None:
    one, two = (tiny_trainer(tmp_path / str(seed), {"loop.seed": seed}) for seed in (0, 1))
    assert differing(state_of(one), state_of(two))
    assert not torch.equal(one.order.indices(0), two.order.indices(0))
    figures = [trainer.step()[1]["t"] for trainer in (one, two)]
    assert not torch.equal(*figures)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_global_state_of_torch_is_left_alone(dropout: float, tmp_path: Path) -> None:
    torch.manual_seed(99)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    changes = {"network.dropout": dropout, "data.flip": True, "loop.iterations": 2, "loop.sample_every": 2}
    tiny_trainer(tmp_path / "run", changes).run()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_the_global_state_of_torch_does_not_matter(tmp_path: Path) -> None:
    states = []
    for i, seed in enumerate((0, 1)):
        torch.manual_seed(seed)
        trainer = tiny_trainer(tmp_path / str(i), {"network.dropout": 0.3, "loop.iterations": 2})
        trainer.run()
        states.append(state_of(trainer))
    assert differing(*states) == []


def test_dropout_changes_the_run(tmp_path: Path) -> None:
    states = []
    for dropout in (0.0, 0.5):
        trainer = tiny_trainer(tmp_path / str(dropout), {"network.dropout": dropout, "loop.iterations": 3})
        trainer.run()
        states.append(state_of(trainer))
    assert differing(*states)


# One step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("kind", ["diffusion", "scd"])
def test_accumulation_is_the_same_step_in_parts(kind: str, parts: int, teacher: Model, tmp_path: Path) -> None:
    grads, losses = [], []
    for accumulate in (1, parts):
        changes = {"loop.accumulate": accumulate, "objective.kind": kind, "data.flip": True}
        changes |= {"objective.guidance_max": 2.0} if kind == "scd" else {}
        trainer = tiny_trainer(tmp_path / str(accumulate), changes, teacher=teacher if kind == "scd" else None)
        scalars, figures = trainer.step()
        grads.append(torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None]))
        losses.append((float(scalars["weighted_loss"]), figures["t"], figures["loss"]))
    assert grads[0].norm() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5 * float(grads[0].abs().max()))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
    assert torch.equal(losses[1][1], losses[0][1])
    torch.testing.assert_close(losses[1][2], losses[0][2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(call: int, loss: Loss) -> Loss:
        if call != 1:
            return loss
        if fault == "loss":
            return Loss(loss.value * math.nan, loss.figures)
        hooked = loss.value * 1.0
        hooked.register_hook(lambda gradient: gradient * math.inf)
        return Loss(hooked, loss.figures)

    patch_loss(monkeypatch, spoil)
    trainer = tiny_trainer(tmp_path / "run", {"loop.iterations": 3, "loop.log_every": 1})
    trainer.step()
    before = state_of(trainer)
    trainer.step()
    assert differing(state_of(trainer), before) == []
    assert (trainer.iteration, trainer.skipped) == (2, 1)
    trainer.run()
    assert (trainer.iteration, trainer.skipped) == (3, 1)
    assert differing(state_of(trainer), before)
    assert finite(state_of(trainer))
    assert read_metrics(tmp_path / "run")[-1]["skipped"] == 1
    resumed = tiny_trainer(tmp_path / "run", {"loop.iterations": 3, "loop.log_every": 1}, resume=True)
    assert resumed.skipped == 1


def test_the_average_is_over_the_steps_that_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight of the k-th of n made steps: `(k/n)^(gamma+1) - ((k-1)/n)^(gamma+1)`; a skipped step is none."""
    patch_loss(monkeypatch, lambda call, loss: Loss(loss.value * (math.nan if call == 2 else 1.0), loss.figures))
    trainer = tiny_trainer(tmp_path / "run", {"ema.sigma_rel": 0.2})
    seen = []
    for _ in range(6):
        trainer.step()
        seen.append(trainer.network.inp.weight.detach().double().clone())
    del seen[2]
    power = power_exponent(0.2) + 1
    expected = sum(((k / 5) ** power - ((k - 1) / 5) ** power) * weight for k, weight in enumerate(seen, start=1))
    torch.testing.assert_close(trainer.ema.network.inp.weight.double(), expected, rtol=1e-5, atol=1e-7)


def test_dropout_is_new_in_every_step_and_the_same_when_it_is_repeated(tmp_path: Path) -> None:
    drawn = []
    trainer = tiny_trainer(tmp_path / "run", {"network.dropout": 0.5})
    for iteration in (0, 1, 0):
        with trainer._dropout_stream(iteration):
            drawn.append(nn.functional.dropout(torch.ones(64), 0.5))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_a_skipped_step_is_a_valid_line_of_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(call: int, loss: Loss) -> Loss:
        figures = {**loss.figures, "loss": loss.figures["loss"] * math.nan}
        return Loss(loss.value * math.nan, figures) if call == 0 else loss

    patch_loss(monkeypatch, spoil)
    tiny_trainer(tmp_path / "run", {"loop.iterations": 2, "loop.log_every": 1}).run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [1, 1]
    assert lines[0]["loss"] is None
    assert lines[1]["loss"] > 0


def test_clipping_bounds_the_gradient(tmp_path: Path) -> None:
    bound = 1e-3
    free, clipped = (tiny_trainer(tmp_path / name, {"optimizer.clip": clip}) for name, clip in (("a", None), ("b", bound)))
    norms = []
    for trainer in (free, clipped):
        scalars, _ = trainer.step()
        norm = torch.stack([p.grad.norm() for p in trainer.parameters if p.grad is not None]).norm().item()
        norms.append((float(scalars["grad_norm"]), norm))
    assert norms[0][0] == pytest.approx(norms[0][1], rel=1e-5)
    assert norms[1][0] == norms[0][0] > bound  # what is logged is the norm before clipping
    assert norms[1][1] == pytest.approx(bound, rel=1e-3)


def test_the_learning_rate_follows_its_schedule(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", {"optimizer.schedule": "cosine", "optimizer.warmup": 2})
    rates = [trainer.step()[0]["lr"] for _ in range(6)]
    expected = [2e-3 * 0.5 * (1 + math.cos(math.pi * i / 6)) * min(1, (i + 1) / 2) for i in range(6)]
    assert rates == pytest.approx(expected)
    assert trainer.optimizer.param_groups[0]["lr"] == rates[-1]


@pytest.mark.parametrize("dropout", [0.0, 0.9])
def test_label_dropout_puts_the_null_label_in_this_share(dropout: float, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", {"objective.label_dropout": dropout})
    indices = torch.arange(100).repeat(20)
    label = trainer._batch(indices, torch.Generator().manual_seed(0))["condition.label"]
    dropped = label == trainer.network.null["label"]
    assert dropped.double().mean().item() == pytest.approx(dropout, abs=0.03)
    labels = digits().labels
    assert labels is not None
    assert torch.equal(label[~dropped], labels[indices][~dropped])


def test_students_keep_their_labels_and_draw_guidance(teacher: Model, tmp_path: Path) -> None:
    changes = {"objective.kind": "scd", "objective.guidance_max": 3.0}
    trainer = tiny_trainer(tmp_path / "run", changes, teacher=teacher)
    indices = torch.arange(100).repeat(20)
    batch = trainer._batch(indices, torch.Generator().manual_seed(0))
    labels = digits().labels
    assert labels is not None
    assert torch.equal(batch["condition.label"], labels[indices])
    scales = batch["condition.guidance"]
    assert scales.min() >= 1
    assert scales.max() <= 3
    assert scales.mean().item() == pytest.approx(2.0, abs=0.05)


def test_flips_mirror_half_of_the_images(tmp_path: Path) -> None:
    plain = tiny_trainer(tmp_path / "plain")
    flipping = tiny_trainer(tmp_path / "flip", {"data.flip": True})
    indices = torch.arange(100).repeat(4)
    whole = plain._batch(indices, torch.Generator().manual_seed(0))["x0"]
    x0 = flipping._batch(indices, torch.Generator().manual_seed(0))["x0"]
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(x0, whole, strict=True)])
    mirrored = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(x0, whole, strict=True)])
    assert bool((kept | mirrored).all())
    assert mirrored.double().mean().item() == pytest.approx(0.5, abs=0.1)


def test_data_reach_the_network_with_the_standard_deviation_of_the_process(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", {"process.sigma_data": 0.7})
    x0 = trainer._batch(torch.arange(100), torch.Generator().manual_seed(0))["x0"]
    assert x0.std().item() == pytest.approx(0.7, rel=1e-3)
    assert x0.mean().item() == pytest.approx(0.0, abs=1e-4)
    symmetric = tiny_trainer(tmp_path / "symmetric", {"data.normalize": "symmetric"})
    x0 = symmetric._batch(torch.arange(100), torch.Generator().manual_seed(0))["x0"]
    assert (x0.min().item(), x0.max().item()) == (-1.0, 1.0)


@pytest.mark.parametrize("kind", ["diffusion", "sct", "scd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_objective_learns_in_both_precisions(kind: str, precision: str, teacher: Model, tmp_path: Path) -> None:
    changes = {"objective.kind": kind, "loop.precision": precision, "loop.iterations": 3, "loop.channels_last": True}
    trainer = tiny_trainer(tmp_path / "run", changes, teacher=None if kind == "diffusion" else teacher)
    before = state_of(trainer)
    model = trainer.run()
    after = state_of(trainer)
    assert finite(after)
    assert trainer.skipped == 0
    assert {name for name in before if name.endswith(".weight")} <= set(differing(before, after)) | {
        "network.conditioning.guidance.weight"
    }
    assert all(value.dtype == torch.float32 for name, value in after.items() if name.startswith("network."))
    assert model.kind == ("diffusion" if kind == "diffusion" else "consistency")
    assert model.sample(3).shape == (3, 1, 8, 8)


def test_channels_last_is_only_a_memory_order(tmp_path: Path) -> None:
    trainers = [tiny_trainer(tmp_path / str(last), {"loop.channels_last": last}) for last in (False, True)]
    assert trainers[1].network.inp.weight.is_contiguous(memory_format=torch.channels_last)
    losses = [float(trainer.step()[0]["weighted_loss"]) for trainer in trainers]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    changes = {"loop.iterations": 80, "loop.batch_size": 32, "loop.log_every": 20, "optimizer.lr": 5e-3}
    tiny_trainer(tmp_path / "run", changes).run()
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert losses[-1] < 0.85 * losses[0]


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "deep" / "run"
    tiny_trainer(folder, {"loop.sample_every": 3, "loop.checkpoint_every": 2, "loop.keep": 2}).run()
    return folder


def test_metrics_are_complete(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert {"loss", "loss_by_time", "weighted_loss", "grad_norm", "lr", "skipped", "images_per_second"} <= set(line)
        assert len(line["loss_by_time"]) == 8
        assert line["lr"] == 2e-3
        assert line["skipped"] == 0
        assert line["grad_norm"] > 0
        assert line["images_per_second"] > 0


def test_students_log_the_norm_of_the_tangent(teacher: Model, tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "run", {"objective.kind": "scd", "loop.iterations": 2}, teacher=teacher).run()
    line = read_metrics(tmp_path / "run")[-1]
    assert line["tangent_norm"] > 0
    assert len(line["tangent_norm_by_time"]) == 8


def test_grids_are_pictures_of_the_right_size(finished: Path) -> None:
    assert sorted(path.name for path in (finished / "samples").iterdir()) == ["00000003.png", "00000006.png"]
    with Image.open(finished / "samples" / "00000006.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        # 40 images in rows of 10, a gap of one pixel around each, magnified four times.
        assert picture.size == (4 * (10 * 9 + 1), 4 * (4 * 9 + 1))


def test_the_last_checkpoints_and_the_model_are_there(finished: Path) -> None:
    assert [path.name for path in list_checkpoints(finished)] == ["00000004", "00000006"]
    model = load(finished, "cpu")
    assert (model.kind, model.shape, model.num_classes) == ("diffusion", (1, 8, 8), 10)
    assert not list(finished.rglob(".*"))


def test_tensorboard_has_scalars_and_pictures(finished: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "lr", "grad_norm", "skipped"} <= set(tags["scalars"])
    assert tags["images"] == ["samples"]
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]


def test_a_run_works_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    tiny_trainer(tmp_path / "run", {"loop.iterations": 2}).run()
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert len(read_metrics(tmp_path / "run")) == 1


def test_the_model_is_the_average_not_the_last_weights(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", {"ema.sigma_rel": 0.25})
    model = trainer.run()
    average, last = trainer.ema.network.state_dict(), trainer.network.state_dict()
    assert differing(dict(load(tmp_path / "run", "cpu").network.state_dict()), dict(average)) == []
    assert differing(dict(model.network.state_dict()), dict(last))


# Settings and teachers that do not fit -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loop.iterations": 0}, "loop.iterations is 0"),
        ({"network": MLPConfig()}, "an MLP for images; expected a network for images"),
        ({"network": dataclasses.replace(NETWORK, width=0)}, "width"),
        ({"loop.device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"loop.device": "abacus"}, "device 'abacus' cannot be used"),
        ({"objective.kind": "scd"}, "distillation without a teacher"),
        ({"objective.kind": "scd", "teacher": "somewhere"}, "distillation without a teacher"),
    ],
)
def test_settings_in_error_leave_no_folder(changes: Changes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        tiny_trainer(tmp_path / "run", changes)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            UserError, match=r"cannot write .*(there is a file of that name|Not a directory)\); .*choose another --out"
        ):
            tiny_trainer(folder)
    assert (tmp_path / "file").read_text() == "here"


def scd(folder: Path, teacher: Model, changes: Changes | None = None, data: Any = None) -> Trainer:
    config = tiny_config({"objective.kind": "scd", "network": teacher.spec, "teacher": "t", **(changes or {})})
    return Trainer(config, folder, teacher=teacher, dataset=digits() if data is None else data, progress=False)


def test_a_student_begins_as_its_teacher(teacher: Model, tmp_path: Path) -> None:
    trainer = scd(tmp_path / "run", teacher, {"objective.guidance_max": 2.0})
    own = trainer.network.state_dict()
    given = teacher.network.state_dict()
    assert [name for name in given if not torch.equal(own[name], given[name])] == []
    x, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.7)
    label = torch.arange(4)
    with torch.no_grad():
        expected = teacher.network(x, t, label=label)
        for scale in (1.0, 1.7):  # the new input starts without effect
            guided = trainer.network(x, t, label=label, guidance=torch.full((4,), scale))
            torch.testing.assert_close(guided, expected)


def test_distill_takes_network_and_process_from_the_teacher(teacher: Model, tmp_path: Path) -> None:
    config = tiny_config({"objective.kind": "scd", "network.width": 32, "process.sigma_max": 50.0, "loop.iterations": 1})
    model = distill(change(config, {"data.source": "digits"}), teacher, tmp_path / "run", progress=False)
    assert model.spec.width == 8
    assert model.process == teacher.process
    assert model.origin["teacher"] == "teacher"


@pytest.mark.filterwarnings("error")
def test_generators_of_several_gpus_are_kept_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, given_back = [], []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: kept.append(device) or device)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: given_back.append((state, device)))
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    trainer = tiny_trainer(tmp_path / "run", {"network.dropout": 0.1})
    trainer.step()
    assert kept == [0, 1] * 2  # the weights, and the dropout of a step
    assert given_back == [(0, 0), (1, 1)] * 2


def test_distill_says_what_is_not_a_model_or_a_configuration(teacher: Model, tmp_path: Path) -> None:
    for given in (None, "runs/teacher", teacher.network):
        with pytest.raises(UserError, match=rf"a {type(given).__name__} as the teacher; expected a Model"):
            distill(tiny_config({"objective.kind": "scd"}), given, tmp_path / "run")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"config is \{\}; expected a RunConfig"):
        distill({}, teacher, tmp_path / "run")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_train_opens_the_data_it_is_told_to(tmp_path: Path) -> None:
    model = train(tiny_config({"loop.iterations": 1}), tmp_path / "run", progress=False)
    assert (model.num_classes, model.class_names[3]) == (10, "3")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"values": torch.zeros(100, 1, 9, 8, dtype=torch.uint8)}, r"images of shape \(1, 9, 8\) and the teacher \(1, 8, 8\)"),
        ({"labels": None, "class_names": ()}, "classes 0 and the teacher 10"),
    ],
)
def test_data_that_are_not_the_teachers(data: Changes, message: str, teacher: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        scd(tmp_path / "run", teacher, data=dataclasses.replace(digits(), **data))
    assert list(tmp_path.iterdir()) == []


def test_process_that_is_not_the_teachers(teacher: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sigma_data 0\.6 and the teacher 0\.5"):
        scd(tmp_path / "run", teacher, {"process.sigma_data": 0.6})


def test_a_student_is_no_teacher(teacher: Model, tmp_path: Path) -> None:
    student = dataclasses.replace(teacher, sampling=Sampling("flow_map"))
    with pytest.raises(UserError, match="the teacher is a consistency model; expected a diffusion model"):
        scd(tmp_path / "run", student)


def test_guidance_needs_classes(teacher: Model, tmp_path: Path) -> None:
    data = dataclasses.replace(digits(), labels=None, class_names=())
    network = change(NETWORK, {"conditioning.num_classes": 0})
    plain = dataclasses.replace(teacher, network=build(network), spec=network, conditioner=Conditioner())
    with pytest.raises(UserError, match="the teacher is unconditional; expected a class-conditional teacher"):
        scd(tmp_path / "run", plain, {"objective.guidance_max": 2.0}, data)
    network = scd(tmp_path / "run", plain, {}, data).network
    assert (takes(network), null(network)) == (frozenset(), {})


def test_start_from_names_the_first_difference() -> None:
    small, large = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"first difference '1\.weight'"):
        start_from(large, small)
    with pytest.raises(UserError, match=r"first difference '1\.weight'"):
        start_from(small, large)
    with pytest.raises(UserError, match=r"first difference '0\.weight'"):
        start_from(nn.Sequential(nn.Linear(3, 2)), small)


def test_one_class_is_no_class(tmp_path: Path) -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    data = dataclasses.replace(digits(), labels=labels, class_names=("only",))
    trainer = Trainer(tiny_config({"loop.iterations": 1}), tmp_path / "run", dataset=data, progress=False)
    model = trainer.run()
    assert (model.num_classes, model.class_names) == (0, ())
    assert model.sample(2).shape == (2, 1, 8, 8)
