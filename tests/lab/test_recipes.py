"""Presets: found by name and by data, what they promise, and that every one of them runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training.tiny import all_digits, change, model_from
from trigflow.data import ImageDataset, LatentDataset, open_dataset
from trigflow.data.captions import Captions
from trigflow.data.sources.opening import REGISTERED
from trigflow.lab.recipes import (
    DATA,
    RECIPES,
    RUNS,
    Recipe,
    get_recipe,
    get_run,
    preset,
    recipe_for,
    register,
    require_data,
    shrink,
)
from trigflow.lab.recipes.listing import list_recipes, resolve_run, show
from trigflow.models.model import Model
from trigflow.networks import build
from trigflow.runtime.errors import UserError
from trigflow.training.config import from_dict, to_dict
from trigflow.training.runs import with_dropout_of
from trigflow.training.setup import fit_network
from trigflow.training.trainer import Trainer

Cli = Callable[..., Any]

PAPER = [name for name in RUNS if name.startswith(("cifar10-", "img"))]
SIZES = {64: ("s", "m", "l", "xl"), 512: ("s", "m", "l", "xl", "xxl")}


@pytest.mark.parametrize("name", ["digits", "mnist", "images"])
def test_by_name(name: str) -> None:
    assert get_recipe(name) is RECIPES[name]
    assert isinstance(get_recipe(name), Recipe)


@pytest.mark.parametrize("name", ["", "Digits", "cifar"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(UserError) as caught:
        get_recipe(name)
    assert str(caught.value) == (f"unknown preset '{name}'; expected one of {', '.join(RECIPES)}; correct --preset")


def test_by_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipe_for("digits") == "digits"
    assert recipe_for("mnist") == "mnist"
    assert recipe_for("photos/") == "images"
    assert recipe_for(str(tmp_path)) == "images"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert recipe_for("./digits") == "images"


def test_data_that_come_along_have_their_recipe_beside_a_folder_of_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "waves", "adapters"):
        Path(name).mkdir()
        monkeypatch.setitem(RECIPES, name, RECIPES["digits"])
    monkeypatch.setitem(REGISTERED, "waves", lambda: open_dataset("digits"))
    assert [recipe_for(name) for name in ("digits", "waves", "adapters")] == ["digits", "waves", "images"]
    assert open_dataset("digits").name == "digits"


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"adapters"}))
def test_roles(name: str) -> None:
    recipe = get_recipe(name)
    assert recipe.teacher.objective.kind == "diffusion"
    assert recipe.student.objective.kind == "scd"
    assert recipe.teacher.data.source == recipe.student.data.source == name
    # A student takes the network of its teacher, and no higher learning rate.
    assert recipe.student.network == recipe.teacher.network
    assert recipe.student.optimizer.lr <= recipe.teacher.optimizer.lr
    # The second term of the tangent is in well before the end.
    assert 0 < recipe.student.objective.tangent.warmup <= recipe.student.loop.iterations / 2
    # Both are single runs as well.
    assert get_run(f"{name}-teacher").config is recipe.teacher
    assert get_run(f"{name}-scd").config is recipe.student


@pytest.mark.parametrize("name", RUNS)
def test_times_and_noise_levels_are_the_papers(name: str) -> None:
    config = get_run(name).config
    process = config.process
    assert (process.sigma_data, process.sigma_min, process.sigma_max) == (0.5, 0.002, 80.0)
    assert config.network.conditioning.time_map == "identity"
    assert config.network.conditioning.time_embedding == "positional"


def test_the_network_fits_any_data() -> None:
    config = fit_network(get_recipe("images").teacher, all_digits())
    assert (config.network.channels, config.network.conditioning.num_classes) == (1, 10)
    assert change(config, {"network": get_recipe("images").teacher.network}) == get_recipe("images").teacher


# The runs of the paper -----------------------------------------------------------------------------------------------


def test_names() -> None:
    expected = {f"cifar10-{role}" for role in ("teacher", "sct", "scd")}
    expected |= {f"img64-{size}-{role}" for size in SIZES[64] for role in ("teacher", "sct", "scd")}
    expected |= {f"img512-{size}-{role}" for size in SIZES[512] for role in ("teacher", "sct", "scd", "scd-vsd")}
    expected |= {f"dit-{size}-{role}" for size in ("b", "xl") for role in ("teacher", "sct", "scd")}
    expected |= {f"{name}-{role}" for name in RECIPES.keys() - {"adapters"} for role in ("teacher", "scd")}
    assert set(RUNS) == expected
    assert all(run.name == name for name, run in RUNS.items())


@pytest.mark.parametrize("name", RUNS)
def test_kinds(name: str) -> None:
    run = get_run(name)
    role = name.split("-", 1 if run.name.startswith(("cifar10", "digits", "mnist", "emoji", "images")) else 2)[-1]
    assert run.config.objective.kind == {"teacher": "diffusion"}.get(role, role)
    assert run.command == ("train" if role in ("teacher", "sct") else "distill")
    resolved = resolve_run(run)
    assert dataclasses.replace(resolved, teacher="runs/teacher").validate() is None
    assert from_dict(to_dict(resolved)) == resolved
    assert resolved.network.channels == run.shape[0]
    assert resolved.network.conditioning.num_classes == run.classes
    guided = getattr(resolved.objective, "guidance_max", 1.0) > 1
    assert resolved.network.conditioning.takes == (("guidance",) if guided else ())


@pytest.mark.parametrize("name", PAPER)
def test_what_every_run_of_the_paper_shares(name: str) -> None:
    config = get_run(name).config
    assert config.optimizer.betas == (0.9, 0.99)
    assert config.optimizer.weight_decay == 0
    assert config.optimizer.clip is None
    assert config.objective.adaptive_weight
    if config.objective.kind != "diffusion":
        tangent = config.objective.tangent
        assert (tangent.mode, tangent.c) == ("normalize", 0.1)
        assert tangent.warmup == (0 if config.objective.kind == "scd-vsd" else 10_000)
    assert config.data.normalize == ("edm2" if name.startswith("img512") else "symmetric")


@pytest.mark.parametrize(("role", "dropout"), [("teacher", 0.13), ("sct", 0.2), ("scd", 0.0)])
def test_cifar10(role: str, dropout: float) -> None:
    config = get_run(f"cifar10-{role}").config
    assert (config.loop.batch_size, config.loop.iterations, config.loop.precision) == (512, 400_000, "fp32")
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.schedule) == ("radam", 1e-4, "constant")
    assert (config.objective.proposal.mean, config.objective.proposal.std) == (-1.0, 1.4)
    assert (config.ema.kind, config.ema.halflife_mimg) == ("halflife", 0.5)
    network = config.network
    assert (network.width, network.mult, network.blocks, network.attention) == (128, (2, 2, 2), 4, (16,))
    assert network.dropout == dropout


# Channels, learning rate of teacher and student, dropout of the teacher; iterations in thousands and average of the teacher on
# 64x64 and on 512x512; dropout of sCT and sCD on 512x512.
TABLE: dict[str, tuple[Any, ...]] = {
    "s": (192, 1e-2, 1e-4, 0.0, 1048, 0.075, 1048, 0.025, 0.25, 0.0),
    "m": (256, 9e-3, 9e-5, 0.1, 1486, 0.06, 1048, 0.03, 0.35, 0.1),
    "l": (320, 8e-3, 8e-5, 0.1, 761, 0.04, 696, 0.015, 0.35, 0.1),
    "xl": (384, 7e-3, 7e-5, 0.1, 540, 0.04, 598, 0.02, 0.35, 0.1),
    "xxl": (448, 6.5e-3, 6.5e-5, 0.1, None, None, 376, 0.015, 0.35, 0.1),
}
ROLES = [(data, size, role) for data in (64, 512) for size in SIZES[data] for role in ("teacher", "sct", "scd", "scd-vsd")]


@pytest.mark.parametrize(("data", "size", "role"), [case for case in ROLES if case[::2] != (64, "scd-vsd")])
def test_imagenet(data: int, size: str, role: str) -> None:
    width, teacher_lr, student_lr, dropout, k_64, sigma_64, k_512, sigma_512, sct_512, scd_512 = TABLE[size]
    run = get_run(f"img{data}-{size}-{role}")
    config, network = run.config, run.config.network
    assert run.shape == ((3, 64, 64) if data == 64 else (4, 64, 64))
    assert (network.width, network.mult, network.blocks, network.modulation) == (width, (1, 2, 3, 4), 3, "double")
    assert (config.loop.batch_size, config.loop.precision) == (2048, "bf16")
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.eps, optimizer.schedule) == ("adam", 1e-11, "inverse_sqrt")
    assert optimizer.t_ref == (35_000 if data == 64 else 70_000)
    assert config.ema.kind == "power"
    proposal = (config.objective.proposal.mean, config.objective.proposal.std)
    if role == "teacher":
        assert proposal == ((-0.8, 1.6) if data == 64 else (-0.4, 1.0))
        assert optimizer.lr == teacher_lr
        assert config.loop.iterations == 1000 * (k_64 if data == 64 else k_512)
        assert config.ema.sigma_rel == (sigma_64 if data == 64 else sigma_512)
        assert (network.dropout, network.dropout_up_to) == (dropout, None)
        return
    assert proposal == ((-1.0, 1.6) if data == 64 else (-0.8, 1.6))
    assert optimizer.lr == student_lr
    assert (
        config.loop.iterations
        == {"sct": (400_000, 100_000), "scd": (400_000, 200_000), "scd-vsd": (0, 20_000)}[role][data == 512]
    )
    expected = {"sct": (0.45, sct_512), "scd": (0.0, scd_512), "scd-vsd": (0.0, scd_512)}[role][data == 512]
    assert network.dropout == expected
    assert network.dropout_up_to == (16 if expected else None)
    guided = data == 512 and role != "sct"
    assert config.objective.guidance_max == (2.0 if guided else 1.0)
    if role == "scd-vsd":
        objective = config.objective
        assert (objective.lambda_vsd, objective.fake_updates) == (1.0, 1)
        assert (objective.vsd_proposal.mean, objective.vsd_proposal.std) == (0.4, 2.0)


def test_guidance_has_what_it_needs() -> None:
    for run in RUNS.values():
        if getattr(run.config.objective, "guidance_max", 1.0) > 1:
            teacher = get_run(f"{run.name.rsplit('-scd', 1)[0]}-teacher")
            assert teacher.config.objective.label_dropout > 0
            assert teacher.classes > 1 or teacher.config.network.conditioning.text


# On the command line -------------------------------------------------------------------------------------------------


def test_presets_of_a_command() -> None:
    assert preset("digits", "train") is RECIPES["digits"].teacher
    assert preset("digits", "distill") is RECIPES["digits"].student
    assert preset("img64-s-teacher", "train") is RUNS["img64-s-teacher"].config
    for command in ("train", "distill"):
        assert preset("img64-s-sct", command) is RUNS["img64-s-sct"].config  # type: ignore[arg-type]
    for name in ("img64-s-scd", "img512-m-scd-vsd"):
        assert preset(name, "distill") is RUNS[name].config


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["train", "--preset", "img64-s-scd"], ["'img64-s-scd' distills", "trigflow distill TEACHER --preset img64-s-scd"]),
        (["train", "--preset", "img512-m-scd-vsd"], ["trigflow distill TEACHER --preset img512-m-scd-vsd"]),
        (["distill", "t", "--preset", "img64-s-teacher"], ["trains a teacher", "trigflow train --preset img64-s-teacher"]),
        (["train", "--preset", "img64-s"], ["unknown preset 'img64-s'", "img64-s-teacher, img64-s-sct, img64-s-scd"]),
        (["distill", "t", "--preset", "imagenet"], ["unknown preset 'imagenet'", "digits, mnist, emoji, images"]),
        (["train", "--preset", "img512-s-teacher"], ["'imagenet512-latents'", "trigflow encode", "--data PATH"]),
        (["train", "--preset", "cifar10-sct"], ["'cifar10'", "--data PATH"]),
        (["recipes", "img64"], ["unknown recipe 'img64'", "trigflow recipes"]),
        (["recipes", "img64-xl"], ["img64-xl-teacher"]),
    ],
)  # fmt: skip
def test_refusals(args: list[str], parts: list[str], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli(*args, *([] if args[0] == "recipes" else ["--out", tmp_path / "run"]))
    assert result.code == 2
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err
    assert list(tmp_path.iterdir()) == []


def test_data_that_only_the_user_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = {"digits", "mnist", "emoji"}
    assert {run.config.data.source for run in RUNS.values()} - embedded == set(DATA)
    for source in DATA:
        with pytest.raises(UserError, match="pass --data PATH"):
            require_data(source)
    for source in (*embedded, "photos"):
        require_data(source)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    require_data("cifar10")


def test_the_list(cli: Cli) -> None:
    listed = json.loads(cli("recipes", "--json").out)
    assert listed == list_recipes()
    assert [entry["name"] for entry in listed] == list(RUNS)
    by_name = {entry["name"]: entry for entry in listed}
    assert by_name["img512-xxl-teacher"] == {
        "name": "img512-xxl-teacher",
        "command": "train",
        "network": "edm2",
        "parameters": 1_523_164_773,
        "batch": 2048,
        "iterations": 376_000,
        "lr": 6.5e-3,
    }
    assert by_name["img64-s-sct"]["parameters"] == 280_209_381
    text = cli("recipes").out.splitlines()
    assert len(text) == len(RUNS) + 1
    row = next(line.split() for line in text if line.startswith("img512-xxl-scd "))
    assert [row[1], *row[4:6], row[-1]] == ["edm2", "2,048", "200,000", "distill"]


def test_one_in_full(cli: Cli) -> None:
    shown = json.loads(cli("recipes", "img512-s-scd", "--json").out)
    assert shown == json.loads(json.dumps(show("img512-s-scd")))
    assert from_dict(shown["config"]) == resolve_run(get_run("img512-s-scd"))
    assert (shown["sample"], shown["classes"]) == ([4, 64, 64], 1000)
    lines = dict(line.split(maxsplit=1) for line in cli("recipes", "img512-s-scd").out.splitlines())
    assert lines["config.objective.guidance_max"] == "2.0"
    assert lines["config.network.conditioning.takes"] == "['guidance']"


# Running -------------------------------------------------------------------------------------------------------------


def data_for(name: str) -> ImageDataset:
    """Eight random samples of 16x16, of two classes where the recipe has classes."""
    run = get_run(name)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8) % 2 if run.classes else None
    names = ("a", "b") if run.classes else ()
    shape = (8, run.shape[0], 16, 16)
    if run.shape[0] == 4:
        return LatentDataset("latents", 5 * torch.randn(shape, generator=generator), labels, names)
    captions = Captions.of([["a"], ["b"]] * 4) if run.config.network.conditioning.text else None
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return ImageDataset("images", images, labels, names, captions=captions)


def random_teacher(name: str, data: ImageDataset) -> Model:
    """The teacher of a student's recipe, with random weights."""
    run = get_run(f"{name.rsplit('-scd', 1)[0]}-teacher")
    config = fit_network(shrink(run.config), data)
    torch.manual_seed(0)
    network = build(config.network).eval().requires_grad_(False)
    return model_from(network, config, data, data.codec(config.data.normalize, 0.5))


@pytest.mark.parametrize("name", RUNS)
def test_every_recipe_runs(name: str, tmp_path: Path) -> None:
    run, data = get_run(name), data_for(name)
    config = shrink(run.config)
    teacher = random_teacher(name, data) if config.objective.distills else None
    if teacher is not None:
        network = with_dropout_of(config.network, teacher.spec)
        config = dataclasses.replace(config, teacher="teacher", network=network)
    trainer = Trainer(config, tmp_path / "run", teacher=teacher, dataset=data, progress=False)
    before = [p.detach().clone() for p in trainer.parameters]
    for _ in range(2):
        scalars, figures = trainer.step()
    assert trainer.skipped == 0
    assert figures["loss"].shape == (4,)
    assert scalars["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    assert trainer.config.network.dropout == run.config.network.dropout


def test_miniatures_change_only_sizes() -> None:
    config = get_run("img512-m-sct").config
    small = shrink(config, iterations=5, batch_size=2)
    assert (small.optimizer, small.process, small.data) == (config.optimizer, config.process, config.data)
    assert (small.network.dropout, small.network.dropout_up_to) == (0.35, 16)
    assert change(small.objective, {"tangent.warmup": 10_000}) == config.objective
    assert small.objective.tangent.warmup == 4
    assert (small.loop.iterations, small.loop.batch_size, small.loop.precision) == (5, 2, "bf16")


def test_a_teacher_and_a_student_by_name(photos: Callable[..., Path], cli: Cli, tmp_path: Path) -> None:
    """Recipes of ImageNet on the command line, made narrow by its options."""
    data = photos(*(f"{name}/{i}.png" for name in ("cats", "dogs") for i in range(4)), size=(16, 16))
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    few = ["--iterations", 2, "--batch-size", 4, "--loop.sample-every", 0, "--quiet"]
    narrow = ["--network.width", 16, "--network.mult", 1, 2, "--network.blocks", 1, "--network.head-width", 16]
    result = cli("train", "--preset", "img64-s-teacher", "--data", data, "--out", teacher, *few, *narrow)
    assert result.code == 0, result.err
    result = cli("distill", teacher, "--preset", "img64-s-scd", "--out", student, *few)
    assert result.code == 0, result.err
    for folder, name in ((teacher, "img64-s-teacher"), (student, "img64-s-scd")):
        found, recipe = from_dict(json.loads((folder / "config.json").read_text())), get_run(name).config
        assert found.objective == recipe.objective
        assert found.optimizer == recipe.optimizer
        assert found.ema == recipe.ema
        assert (found.network.width, found.network.resolution, found.network.dropout) == (16, 16, recipe.network.dropout)


def test_a_student_has_its_own_dropout(cli: Cli, teacher_folder: Path, tmp_path: Path) -> None:
    """The architecture is the teacher's; dropout comes from the command line or the preset."""
    few = ["--iterations", 1, "--batch-size", 4, "--loop.sample-every", 0, "--quiet"]
    settings = {}
    for name, extra in {"given": ["--dropout", 0.25], "teachers": [], "presets": ["--preset", "cifar10-sct"]}.items():
        assert cli("distill", teacher_folder, "--out", tmp_path / name, *few, *extra).code == 0
        settings[name] = json.loads((tmp_path / name / "config.json").read_text())["network"]
    assert [settings[name]["dropout"] for name in ("given", "teachers", "presets")] == [0.25, 0.0, 0.2]
    assert {s["width"] for s in settings.values()} == {8}
    assert {s["kind"] for s in settings.values()} == {"unet"}


@pytest.mark.parametrize("name", ["digits", "adapters", "img512-s-scd"])
def test_presets_that_come_along_are_not_replaced(name: str) -> None:
    known = dict(RECIPES)
    with pytest.raises(UserError, match=f"'{name}' is taken by a preset that comes along; expected a new one"):
        register(name, RECIPES["mnist"])
    assert known == RECIPES
