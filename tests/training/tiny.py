"""Runs that finish in a moment: an 8-wide U-Net of one level on a few 8x8 digits."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trigflow.codecs import Codec
from trigflow.conditions import takes
from trigflow.data import Dataset, ImageDataset, open_dataset
from trigflow.models.model import Model
from trigflow.networks import ConditioningConfig, UNetConfig
from trigflow.objectives import Objective, StudentObjective, TangentConfig, as_kind, known, objective_of
from trigflow.training.config import LoopConfig, OptimizerConfig, RunConfig, origin_of
from trigflow.training.saving import Resume
from trigflow.training.setup import fit_network
from trigflow.training.trainer import Trainer

NETWORK = UNetConfig(patch=2, width=8, mult=(1,), blocks=1, conditioning=ConditioningConfig(width=8))
TWO_LEVELS = dataclasses.replace(NETWORK, mult=(1, 2))
"""For what depends on the parts of a network: this one goes down and up."""


@functools.cache
def all_digits() -> ImageDataset:
    return open_dataset("digits")


@functools.cache
def digits(n: int = 100) -> ImageDataset:
    """The first n digits."""
    return all_digits().subset(torch.arange(n))


def tiny_objective(kind: str = "diffusion", **settings: Any) -> Objective:
    """The objective of this name, with a warmup of 4 iterations where its name says nothing of the tangent."""
    warmed = issubclass(known(kind).objective, StudentObjective) and "tangent" not in known(kind).settings
    return objective_of(kind, **({"tangent": TangentConfig(warmup=4)} if warmed else {}), **settings)


def tiny_config(changes: dict[str, Any] | None = None) -> RunConfig:
    """A teacher, or what `objective.kind` says, of 6 iterations; `changes` as in `change`."""
    changes = changes or {}
    config = RunConfig(
        network=NETWORK,
        objective=tiny_objective(changes.get("objective.kind", "diffusion")),
        optimizer=OptimizerConfig(lr=2e-3),
        loop=LoopConfig(iterations=6, batch_size=8, log_every=2, sample_every=0, checkpoint_every=0, seed=3, device="cpu"),
    )
    return change(config, changes)


def change(config: Any, changes: dict[str, Any]) -> Any:
    """A copy with settings changed by dotted name: `change(config, {"loop.seed": 1})`. Another `objective.kind`, which is
    another class, comes first, and keeps what both have."""
    if "objective.kind" in changes:
        config = dataclasses.replace(config, objective=as_kind(config.objective, changes["objective.kind"]))
    for name, value in changes.items():
        if name == "objective.kind":
            continue
        head, _, rest = name.partition(".")
        inner = change(getattr(config, head), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{head: inner})
    return config


def tiny_trainer(
    folder: Path,
    changes: dict[str, Any] | None = None,
    *,
    teacher: Model | None = None,
    start: Model | None = None,
    resume: Resume = False,
) -> Trainer:
    """A trainer on `digits()`, without progress bar; a student's network is the teacher's."""
    config = tiny_config(changes)
    if teacher is not None:
        config = dataclasses.replace(config, teacher="teacher", network=teacher.spec)
    return Trainer(config, folder, teacher=teacher, start=start, dataset=digits(), resume=resume, progress=False)


def digits_config(changes: dict[str, Any] | None = None) -> RunConfig:
    """`tiny_config` with the channels and classes of `digits()`."""
    return fit_network(tiny_config(changes), digits())


def model_from(network: nn.Module, config: RunConfig, data: Dataset, codec: Codec | None = None) -> Model:
    """The model that a run of this configuration on these data would be, around a network."""
    codec = codec or data.codec("measured", config.process.sigma_data)
    sampling, origin = config.objective.sampling, origin_of(config)
    told = data.conditioner(takes(network))
    return Model(network, config.network, config.process, codec, sampling, told, origin=origin)


def untrained_teacher(seed: int = 0) -> Model:
    """A class-conditional diffusion model of digits whose weights, its output layer included, are random."""
    from trigflow.networks import build

    data = digits()
    config = digits_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(config.network)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    network.eval().requires_grad_(False)
    return model_from(network, config, data)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that a run is at a moment: weights, their average, optimizer moments; copied."""
    state = {f"{name}.{key}": value for name, module in trainer.modules.items() for key, value in module.state_dict().items()}
    state |= {f"ema.{key}": value for key, value in trainer.ema.network.state_dict().items()}
    for name, optimizer in trainer.optimizers.items():
        for index, moments in optimizer.state_dict()["state"].items():
            state |= {f"{name}.{index}.{key}": torch.as_tensor(value) for key, value in moments.items()}
    return {name: value.detach().clone() for name, value in state.items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the entries that are not equal bit for bit."""
    return [name for name in {**a, **b} if name not in a or name not in b or not torch.equal(a[name], b[name])]
