"""Conversion of a teacher to identity time: the closed forms, the fit, and what a whole conversion leaves behind."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.tiny import change, digits, model_from, tiny_config
from trigflow import Proposal, TrigFlow, UserError, load
from trigflow.networks import ConditioningConfig, DDPMPPConfig, DiTConfig, EDM2Config, MLPConfig, UNetConfig, build
from trigflow.samplers import Sampling
from trigflow.training.convert import SIGMAS, ConvertSettings, convert
from trigflow.training.setup import fit_network
from trigflow.training.timepath import (
    absorb_features,
    feature_map,
    fit_first_layer,
    fit_time_path,
    fit_unit_rows,
    proposal_times,
    stable_config,
    time_path,
    transplant,
)
from trigflow.training.trainer import Trainer

PROCESS, PROPOSAL = TrigFlow(0.5), Proposal(-1.0, 1.4)
FOURIER = ConditioningConfig("log", "fourier", fourier_scale=1.0, width=16, num_classes=10)
POSITIONAL = ConditioningConfig("log", "positional", width=16, num_classes=10)

NETWORKS: dict[str, Any] = {
    "edm2": EDM2Config(
        channels=1, resolution=8, width=16, mult=(1, 2), blocks=1, attention=(4,), head_width=16, modulation="gain",
        conditioning=FOURIER,
    ),
    "ddpmpp": DDPMPPConfig(
        channels=1, resolution=8, width=16, mult=(1, 2), blocks=1, attention=(4,), norm="add", augment=9,
        conditioning=POSITIONAL,
    ),
    "ddpmpp, adagn": DDPMPPConfig(
        channels=1, resolution=8, width=16, mult=(1,), blocks=1, attention=(), norm="adagn", conditioning=FOURIER
    ),
    "unet": UNetConfig(patch=2, width=16, mult=(1,), blocks=1, norm="adagn", conditioning=FOURIER),
    "dit": DiTConfig(channels=1, width=32, depth=1, heads=2, conditioning=POSITIONAL),
    "mlp": MLPConfig(features=3, width=16, depth=2, conditioning=FOURIER),
}  # fmt: skip
KINDS = list(NETWORKS)


def awake(config: Any, seed: int = 0) -> Any:
    """A network in which nothing is zero, the modulations least of all."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build(config)
        with torch.no_grad():
            for name, p in network.named_parameters():
                p.add_(0.3 if p.ndim == 0 else 0.1 * torch.randn_like(p))
                if ".affine." in name:
                    p.add_(0.1 * torch.randn_like(p))
    return network.eval().requires_grad_(False)


def swapped(kind: str, modulation: Any = "keep") -> tuple[Any, Any]:
    """The old network, and the new one with its weights."""
    old = awake(NETWORKS[kind])
    new = awake(stable_config(NETWORKS[kind], modulation), seed=1)
    transplant(new, old)
    return new, old


def save_run(folder: Path, kind: str, changes: dict[str, Any] | None = None) -> Path:
    """A run folder with an untrained network of digits."""
    data = digits()
    config = fit_network(change(tiny_config({"network": NETWORKS[kind]}), changes or {}), data)
    network = awake(config.network)
    model_from(network, config, data).save(folder)
    return folder


def error(new: nn.Module, old: nn.Module, t: Tensor, label: Tensor) -> float:
    """Of the modulations, relative to their variation."""
    mine, theirs = time_path(new).modulations(t, label), time_path(old).modulations(t, label)
    missed = sum((a - b).square().sum() for a, b in zip(mine, theirs, strict=True))
    return float((missed / sum((b - b.mean(0)).square().sum() for b in theirs)).sqrt())


# Closed forms --------------------------------------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_linear_map_of_the_features_is_found_and_absorbed() -> None:
    new, label = draw(500, 6), torch.arange(3).repeat(167)[:500]
    truth, offset, table = draw(6, 6, seed=1) + 3 * torch.eye(6), draw(6, seed=2), draw(6, 3, seed=3)
    old = new @ truth.T + offset
    first = nn.Linear(6, 20).double()
    before = first(old + table.T[label])
    absorb_features(first, [table], *feature_map(new, old, ridge=1e-12))
    torch.testing.assert_close(first(new + table.T[label]), before, rtol=1e-8, atol=1e-8)


def test_the_map_is_the_minimum_it_claims_and_the_identity_where_nothing_varies() -> None:
    new = draw(400, 5)
    new[:, 3:] = 0.7  # constant features
    old = torch.tanh(new @ draw(5, 5, seed=1))
    ridge = 0.05
    linear, offset = feature_map(new, old, ridge)
    torch.testing.assert_close(linear[3:, 3:], torch.eye(2, dtype=torch.float64))
    rho = ridge * new.square().mean()

    def cost(linear: Tensor, offset: Tensor) -> Tensor:
        gap = new @ linear.T + offset - old
        return gap.square().sum(1).mean() + rho * (linear - torch.eye(5)).square().sum()

    gradients = torch.func.grad(cost, argnums=(0, 1))(linear, offset)
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)


def test_unit_rows_are_the_best_of_their_length() -> None:
    times = proposal_times(PROCESS, PROPOSAL, 500)
    features = torch.cat([torch.cos(times[:, None] * w) for w in (1.0, 0.5, 0.1, 0.01)] + [draw(500, 2)], dim=1)
    target = torch.stack([torch.log(torch.tan(times)), torch.sin(9 * times), 0.01 * times], dim=1)
    rows = fit_unit_rows(features, target)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3, dtype=torch.float64))
    best = (features @ rows.T - target).square().mean(0)
    for seed in range(20):
        for size in (1e-3, 0.1, 10.0):
            other = rows + size * draw(3, 6, seed=seed)
            other = other / other.norm(dim=1, keepdim=True)
            assert bool(((features @ other.T - target).square().mean(0) >= best - 1e-9).all())


def test_unit_rows_that_made_the_target_are_found_again() -> None:
    features, truth = draw(300, 6), draw(4, 6, seed=1)
    truth = truth / truth.norm(dim=1, keepdim=True)
    torch.testing.assert_close(fit_unit_rows(features, features @ truth.T), truth, rtol=1e-6, atol=1e-6)


def test_times_follow_the_proposal() -> None:
    tau = torch.log(0.5 * torch.tan(proposal_times(PROCESS, PROPOSAL)))
    assert float(tau.mean()) == pytest.approx(PROPOSAL.mean, abs=1e-3)
    assert float(tau.std()) == pytest.approx(PROPOSAL.std, rel=1e-3)


# Networks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_fits_is_kept(kind: str) -> None:
    old = awake(NETWORKS[kind])
    new = awake(stable_config(NETWORKS[kind]), seed=1)
    fresh = transplant(new, old)
    assert fresh == []
    assert new.config.conditioning.time_map == "identity"
    assert new.config.conditioning.time_embedding == "positional"
    given = old.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in new.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_time_path_is_the_one_the_network_uses(kind: str) -> None:
    """Another time moves the modulations; with them held, it has no effect."""
    network, path = awake(NETWORKS[kind]), time_path(awake(NETWORKS[kind]))
    t, label = torch.tensor([0.3, 1.2]), torch.tensor([1, 10])
    seen: list[Tensor] = []
    layers = dict(network.named_modules())
    heads = [m.emb_linear for m in layers.values() if hasattr(m, "emb_linear")]
    heads += [m.affine for m in layers.values() if isinstance(getattr(m, "affine", None), nn.Linear)]
    gains = [m.emb_gain for m in layers.values() if hasattr(m, "emb_linear")] or [1.0] * len(heads)
    for head, gain in zip(heads, gains, strict=True):
        head.register_forward_hook(lambda module, given, out, gain=gain: seen.append(gain * out))
    x = torch.ones(2, 3) if kind == "mlp" else torch.ones(2, 1, 8, 8)
    network(x, t, label=label)
    mine = path.modulations(t, label)
    assert len(mine) == len(seen) > 0
    for a, b in zip(sorted(mine, key=lambda m: m.sum().item()), sorted(seen, key=lambda m: m.sum().item()), strict=True):
        torch.testing.assert_close(a, b)
    assert path.features(t).shape == (2, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fit_brings_the_modulations_back(kind: str) -> None:
    new, old = swapped(kind)
    others = {name: value.clone() for name, value in new.state_dict().items()}
    fit = fit_time_path(new, old, PROCESS, PROPOSAL, iterations=150, batch_size=64)
    assert fit.closed_form < 0.75 * fit.swapped
    assert fit.fitted <= fit.closed_form
    assert fit.fitted < 0.5 * fit.swapped
    t = proposal_times(PROCESS, PROPOSAL, 220).float()
    label = torch.arange(220) % 11
    assert error(new, old, t, label) == pytest.approx(fit.fitted, rel=0.3)
    assert not any(p.requires_grad for p in new.parameters())
    touched = {n for n, value in new.state_dict().items() if not torch.equal(value, others[n])}
    path_words = ("affine", "emb_linear", "emb_noise", "emb_gain", "map_", "conditioning")
    assert touched
    assert all(any(word in name for word in path_words) for name in touched), touched


def test_labels_keep_their_effect_in_the_closed_form() -> None:
    """The mapped label and augmentation weights give what they gave, to rounding."""
    new, old = swapped("ddpmpp")
    path, old_path = time_path(new), time_path(old)
    fit_first_layer(path, old_path, proposal_times(PROCESS, PROPOSAL))
    for mine, theirs in zip(path.added, old_path.added, strict=True):
        expected = old_path.first.weight @ theirs
        torch.testing.assert_close(path.first.weight @ mine, expected, rtol=1e-3, atol=1e-4)
        assert not torch.equal(mine, theirs)


def test_a_fit_that_does_not_help_is_not_kept() -> None:
    new, old = swapped("unet")
    first = fit_time_path(new, old, PROCESS, PROPOSAL, iterations=0)
    assert first.fitted == first.closed_form < first.swapped
    same = copy.deepcopy(old)
    again = fit_time_path(same, old, PROCESS, PROPOSAL, iterations=3)
    assert again.fitted < 1e-3


def test_gain_becomes_double_normalization_of_the_same_weights() -> None:
    new, old = swapped("edm2", "double")
    assert new.config.modulation == "double"
    given = old.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in new.state_dict().items())
    fit = fit_time_path(new, old, PROCESS, PROPOSAL, iterations=50, batch_size=64)
    assert fit.fitted < 0.75 * fit.swapped


@pytest.mark.parametrize("kind", ["ddpmpp", "ddpmpp, adagn"])
def test_ddpmpp_becomes_double(kind: str) -> None:
    old = awake(NETWORKS[kind])
    new = awake(stable_config(NETWORKS[kind], "double"), seed=1)
    assert transplant(new, old) == []
    mine, theirs = (net.get_submodule("model.dec.8x8_block0.affine") for net in (new, old))
    emb = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    scale, shift = mine(emb).chunk(2, dim=1)
    if kind == "ddpmpp":
        torch.testing.assert_close(scale, torch.ones_like(scale))
        torch.testing.assert_close(shift, theirs(emb))
    else:
        torch.testing.assert_close(torch.cat([scale - 1, shift], dim=1), theirs(emb), rtol=1e-4, atol=1e-5)
    affine = new.state_dict()["model.dec.8x8_block0.affine.weight"].clone()
    fit = fit_time_path(new, old, PROCESS, PROPOSAL, iterations=50, batch_size=64)
    assert fit.fitted < 0.5 * fit.swapped
    assert torch.equal(new.state_dict()["model.dec.8x8_block0.affine.weight"], affine)  # nothing to fit it to


# Conversion ----------------------------------------------------------------------------------------------------------

QUICK = ConvertSettings(iterations=4, batch_size=8, fit_iterations=100, lr=1e-4, seed=1)


def run(run_folder: Path, out: Path, **changes: Any) -> Any:
    settings = dataclasses.replace(QUICK, **changes)
    return convert(run_folder, out, settings, dataset=digits(), device="cpu", progress=False)


@pytest.mark.parametrize("kind", ["edm2", "ddpmpp", "unet", "dit"])
def test_a_conversion(kind: str, tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", kind)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = run(folder, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    model = load(tmp_path / "out", "cpu")
    assert model.spec == stable_config(load(folder, "cpu").spec)
    assert model.kind == "diffusion"
    assert model.codec == load(folder, "cpu").codec
    assert model.sample(2, steps=2).shape == (2, 1, 8, 8)
    stages = result.stages
    assert list(stages) == ["swapped", "fitted", "tuned"]
    middle = slice(2, 6)  # noise levels that the proposal covers
    assert sum(stages["fitted"].change[middle]) < 0.7 * sum(stages["swapped"].change[middle])
    assert stages["tuned"].change != stages["fitted"].change
    written = json.loads((tmp_path / "out" / "convert.json").read_text())
    assert written["sigma"] == list(SIGMAS)
    assert written["held_images"] == 10
    assert written["stages"]["tuned"]["change"] == list(stages["tuned"].change)
    assert written["time_path"]["fitted"] <= written["time_path"]["closed_form"]
    table = result.table().splitlines()
    assert len(table) == len(SIGMAS) + 3
    assert "tuned" in table[1]


def test_the_same_seed_gives_the_same_teacher(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", "unet")
    one, two, three = (run(folder, tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2)))
    assert one.stages == two.stages
    states = [result.model.network.state_dict() for result in (one, two, three)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(not torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_run(tmp_path / "run", "unet")
    whole = run(folder, tmp_path / "whole")
    step = Trainer.step

    def interrupted(trainer: Trainer) -> Any:
        if trainer.iteration == 2:
            raise KeyboardInterrupt
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "part")
    with pytest.raises(UserError, match="--resume"):
        run(folder, tmp_path / "part")
    with pytest.raises(UserError, match=r"nothing to resume in '.*none'; expected a conversion that was interrupted"):
        convert(folder, tmp_path / "none", QUICK, dataset=digits(), device="cpu", resume=True, progress=False)
    assert not (tmp_path / "none").exists()
    shutil.copytree(tmp_path / "part", tmp_path / "early")
    shutil.rmtree(tmp_path / "early" / "checkpoints")  # as of one that was killed before the first
    for part in ("part", "early"):
        rest = convert(folder, tmp_path / part, QUICK, dataset=digits(), device="cpu", resume=True, progress=False)
        assert rest.stages == whole.stages
        ends = [load(tmp_path / name, "cpu").network.state_dict() for name in ("whole", part)]
        assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    shutil.rmtree(tmp_path / "part" / "checkpoints")
    with pytest.raises(UserError, match="holds a model and no checkpoint"):
        convert(folder, tmp_path / "part", QUICK, dataset=digits(), device="cpu", resume=True, progress=False)


def test_without_fine_tuning(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", "unet")
    result = run(folder, tmp_path / "out", iterations=0)
    assert list(result.stages) == ["swapped", "fitted"]
    model = load(tmp_path / "out", "cpu")
    written, held = model.network.state_dict(), result.model.network.state_dict()
    assert all(torch.equal(value, held[name]) for name, value in written.items())


def test_an_unconditional_teacher_leaves_the_labels_of_the_data(tmp_path: Path) -> None:
    data = dataclasses.replace(digits(), labels=None, class_names=())
    config = fit_network(tiny_config({"network": NETWORKS["unet"]}), data)
    model_from(awake(config.network), config, data).save(tmp_path / "run")
    assert run(tmp_path / "run", tmp_path / "out").model.num_classes == 0


def test_mistakes(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", "unet")
    stable = save_run(tmp_path / "stable", "unet", {"network.conditioning": ConditioningConfig(width=16)})
    student = tmp_path / "student"
    dataclasses.replace(load(folder, "cpu"), sampling=Sampling("flow_map")).save(student)
    lost = save_run(tmp_path / "lost", "unet", {"data.source": str(tmp_path / "nowhere")})
    out = tmp_path / "out"
    few = digits().subset(torch.tensor([0]))
    wide = dataclasses.replace(digits(), values=digits().values.repeat(1, 1, 1, 2))
    two = dataclasses.replace(digits(), labels=digits().labels % 2, class_names=("even", "odd"))
    mistakes: list[tuple[Callable[[], Any], str]] = [
        (lambda: run(stable, out), "already"),
        (lambda: run(student, out), "student"),
        (lambda: convert(lost, out, QUICK, device="cpu", progress=False), "pass --data"),
        (lambda: convert(folder, out, QUICK, dataset=few, device="cpu", progress=False), "1 images"),
        (lambda: convert(folder, out, QUICK, dataset=wide, device="cpu", progress=False), "images of shape"),
        (lambda: convert(folder, out, QUICK, dataset=two, device="cpu", progress=False), "classes 2 and the teacher 10"),
        (lambda: run(folder, out, modulation="double"), "edm2 or ddpmpp"),
        (lambda: run(folder, out, iterations=-1), "iterations is -1"),
        (lambda: run(folder, out, lr=0.0), "lr is 0.0"),
        (lambda: run(folder, out, iterations="5"), "iterations is '5'; expected a whole number"),
        (lambda: run(folder, out, modulation="triple"), "modulation is 'triple'; expected one of keep, double"),
        (lambda: convert(folder, out, {"lr": 1.0}), "expected a ConvertSettings"),  # type: ignore[arg-type]
        (lambda: run(folder, folder), "already holds a run"),
        (lambda: time_path(nn.Linear(2, 2)), "no time path"),
    ]
    for make, message in mistakes:
        with pytest.raises(UserError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
        assert not out.exists()
