"""Compiled consistency steps of all networks against the engine, as `make compile-check` has them."""

from __future__ import annotations

from typing import Any

import compile_check
import torch

from gpu_parts.record import Record


def run(record: Record, tiny: bool) -> None:
    """Errors by network; at toy size of the smallest two, their graphs as they are traced."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for subject in (*compile_check.package(device), *compile_check.of_diffusers(device)):
        if tiny and subject.name not in ("mlp", "dit"):
            continue
        with record.guarded(subject.name):
            check = compile_check.Check(subject, device, "eager" if tiny else "inductor")
            errors = check.errors()
            equal = max(errors.values()) <= compile_check.MOST and not check.said
            record.add("networks", {"network": subject.name, "errors": errors, "equal": equal, "said": check.said})


def summary(part: dict[str, Any]) -> str:
    """One line."""
    rows = part.get("networks", [])
    return f"compiled {sum(row['equal'] for row in rows)} of {len(rows)} equal"
