"""The recipes as a table, and one of them in full."""

import dataclasses
import functools
from typing import Any

import torch

from trigflow.data import ImageDataset
from trigflow.data.captions import Captions
from trigflow.lab.recipes import RUNS, get_run
from trigflow.lab.recipes.named import NamedRun
from trigflow.networks import EDM2Config, NetworkConfig, build, name_of
from trigflow.training.config import Precision, RunConfig, flattened, to_dict
from trigflow.training.setup import fit_network


def resolve_run(run: NamedRun, precision: Precision | None = None) -> RunConfig:
    """The settings of a run as they are once the data it is meant for are there; in another precision, when given."""
    loop = run.config.loop if precision is None else dataclasses.replace(run.config.loop, precision=precision)
    if run.folder is not None:  # its network is as the teacher's
        return dataclasses.replace(run.config, loop=loop)
    labels = torch.zeros(0, dtype=torch.int64) if run.classes else None
    names = tuple(str(i) for i in range(run.classes))
    captions = Captions([]) if run.config.network.conditioning.text else None
    data = ImageDataset(run.name, torch.zeros(0, *run.shape, dtype=torch.uint8), labels, names, captions=captions)
    return fit_network(dataclasses.replace(run.config, loop=loop), data)


@functools.cache
def count_parameters(network: NetworkConfig) -> int:
    """Parameters of a network, counted without making them."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(network).parameters())


def list_recipes() -> list[dict[str, Any]]:
    """Of every recipe: `name`, `command` that starts it, `network`, `parameters`, `batch`, `iterations`, `lr`."""
    return [summary(run) for run in RUNS.values()]


def summary(run: NamedRun) -> dict[str, Any]:
    """A recipe in a line."""
    config = resolve_run(run)
    network = config.network.changed(dropout=0.0)  # so that runs of one network are counted once
    if isinstance(network, EDM2Config):
        network = dataclasses.replace(network, dropout_up_to=None)
    return {
        "name": run.name,
        "command": run.command,
        "network": name_of(config.network),
        "parameters": count_parameters(network),
        "batch": config.loop.batch_size,
        "iterations": config.loop.iterations,
        "lr": config.optimizer.lr,
    }


def show(name: str) -> dict[str, Any]:
    """A recipe in full: its line, the shape `sample` and number `classes` of its data, and every setting in `config`. Raises a
    UserError for an unknown name."""
    run = get_run(name)
    return {**summary(run), "sample": list(run.shape), "classes": run.classes, "config": to_dict(resolve_run(run))}


def as_table(recipes: list[dict[str, Any]]) -> str:
    """The list as text."""
    lines = [f"{'recipe':21} {'network':8} {'parameters':>12} {'batch':>6} {'iterations':>11} {'lr':>8}  start with"]
    lines += [
        f"{r['name']:21} {r['network']:8} {r['parameters'] / 1e6:10.2f} M {r['batch']:6,} {r['iterations']:11,} "
        f"{r['lr']:8.2g}  trigflow {r['command']}"
        for r in recipes
    ]
    return "\n".join(lines)


def as_lines(settings: dict[str, Any]) -> list[str]:
    """Nested settings as lines of dotted name and value."""
    return [f"{name:40} {value}" for name, value in flattened(settings).items()]
