"""`--dry`: the settings of a run and where they are from, before anything is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from trigflow.data.config import load_data
from trigflow.objectives import as_kind
from trigflow.training.config import RunConfig, flattened, to_dict
from trigflow.training.setup import fit_network


def as_kind_of(config: RunConfig, other: RunConfig) -> RunConfig:
    """The configuration with the kind of objective that another has, so that their settings can be compared."""
    return dataclasses.replace(config, objective=as_kind(config.objective, other.objective.kind))


def print_settings(config: RunConfig, out: Path, **decided: RunConfig) -> None:
    """Print every setting that a run of this configuration would have, those that the data decide among them.

    Beside its value stands the first layer that it is like this from: the defaults, what has `decided` on top of these by its
    name, in order, then the command line, then the data.

    Raises:
        UserError: as the run would, for settings that make no sense or data that cannot be read.
    """
    config.validate()
    fitted = fit_network(config, load_data(config.data, progress=False))
    layers = {"default": as_kind_of(RunConfig(), config), **decided, "command line": config, "data": fitted}
    flat = {name: flattened(to_dict(layer)) for name, layer in layers.items()}
    for setting, value in flat["data"].items():
        if setting == "format":
            continue
        origin = "data"
        for name, values in reversed(flat.items()):
            if setting not in values or values[setting] != value:
                break
            origin = name
        print(f"{setting:40} {value!s:28} {origin}")
    print(f"nothing was trained; without --dry this run goes to {out}")
