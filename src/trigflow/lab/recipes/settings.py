"""Where each setting of a run is from: the preset, then what the teacher gives, then the command line, then the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trigflow.training.config import RunConfig, to_dict

SettingsLayer = tuple[str, RunConfig]
"""What is decided by something, by its name, on top of what the layers before have decided."""


def origins(layers: list[SettingsLayer]) -> list[tuple[str, Any, str]]:
    """Every setting of the last layer by dotted name, with its value and the name of the first layer that it is like this from.

    Args:
        layers: one or more, from the first decision to the last.
    """
    flat = [(name, flattened(to_dict(config))) for name, config in layers]
    final = flat[-1][1]
    found = []
    for setting, value in final.items():
        if setting == "format":
            continue
        origin = flat[-1][0]
        for name, values in reversed(flat):
            if setting not in values or values[setting] != value:
                break
            origin = name
        found.append((setting, value, origin))
    return found


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def origins_as_lines(layers: list[SettingsLayer]) -> list[str]:
    """`origins` as text."""
    return [f"{setting:40} {value!s:28} {origin}" for setting, value, origin in origins(layers)]
