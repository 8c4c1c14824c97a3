"""Small models of random weights, so that every input of the network shows in what is drawn."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from training.tiny import change, digits, digits_config, model_from
from trigflow.models.model import Kind, Model
from trigflow.networks import build
from trigflow.training.config import ObjectiveConfig, RunConfig


def student(
    changes: dict[str, Any] | None = None,
    *,
    kind: Kind = "consistency",
    times: dict[int, tuple[float, ...]] | None = None,
) -> Model:
    """A class-conditional student of digits; `changes` are settings by dotted name, as `{"objective.segments": 4}`."""
    config: RunConfig = digits_config(
        {"objective.kind": "scd", "network.mult": (1,), "teacher": "teacher", **(changes or {})}
    )
    config = change(config, {name: value for name, value in (changes or {}).items() if name.startswith("network.")})
    conditioning = dataclasses.replace(
        config.network.conditioning,
        takes_guidance=config.objective.guidance_max > 1,
        takes_end=config.objective.jumps,
    )
    config = dataclasses.replace(config, network=dataclasses.replace(config.network, conditioning=conditioning))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = build(config.network, config.process.sigma_data)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    if kind == "diffusion":
        config = dataclasses.replace(config, objective=ObjectiveConfig())
    model = model_from(network.eval().requires_grad_(False), config, digits())
    return dataclasses.replace(model, times=times or {})
