"""`--dry`: the settings of a run and where they are from, before anything is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from trigflow.data.config import load_data
from trigflow.lab.recipes.settings import SettingsLayer, origins_as_lines
from trigflow.objectives import as_kind
from trigflow.training.config import RunConfig
from trigflow.training.setup import fit_network


def as_kind_of(config: RunConfig, other: RunConfig) -> RunConfig:
    """The configuration with the kind of objective that another has, so that their settings can be compared."""
    return dataclasses.replace(config, objective=as_kind(config.objective, other.objective.kind))


def print_settings(layers: list[SettingsLayer], config: RunConfig, out: Path) -> None:
    """Print every setting that a run of this configuration would have, those that the data decide among them.

    Raises:
        UserError: as the run would, for settings that make no sense or data that cannot be read.
    """
    config.validate()
    fitted = fit_network(config, load_data(config.data, progress=False))
    print("\n".join(origins_as_lines([*layers, ("data", fitted)])))
    print(f"nothing was trained; without --dry this run goes to {out}")
