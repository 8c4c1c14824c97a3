"""A recipe in miniature: the same objective, optimizer and schedule on a network that fits anywhere."""

import dataclasses
from typing import Any

from trigflow.networks import DDPMPPConfig, DiTConfig, EDM2Config, UNetConfig
from trigflow.objectives import Objective, StudentObjective
from trigflow.training.config import RunConfig

NARROW: dict[type[Any], dict[str, Any]] = {
    UNetConfig: {"width": 8, "blocks": 1},
    DDPMPPConfig: {"width": 8, "mult": (1, 2), "blocks": 1},
    EDM2Config: {"width": 16, "mult": (1, 2), "blocks": 1, "head_width": 16},
    DiTConfig: {"width": 32, "depth": 2, "heads": 2},
}
"""Settings of a network in miniature."""


def warmed_within(objective: Objective, iterations: int) -> Objective:
    """The objective with a tangent warmup, where it has one, of at most so many iterations."""
    if not isinstance(objective, StudentObjective):
        return objective
    tangent = dataclasses.replace(objective.tangent, warmup=min(objective.tangent.warmup, iterations))
    return dataclasses.replace(objective, tangent=tangent)


def shrink(config: RunConfig, *, iterations: int = 3, batch_size: int = 4) -> RunConfig:
    """The same run with a narrow network, a few steps of small batches, a tangent warmup that ends within them, and no
    sample grids, checkpoints or snapshots in between.

    Channels, classes and resolution are taken from the data as always, so images of 16x16 make it small altogether.
    """
    network = config.network.changed(
        **NARROW[type(config.network)],
        conditioning=dataclasses.replace(config.network.conditioning, width=8),
    )
    return dataclasses.replace(
        config,
        network=network,
        objective=warmed_within(config.objective, iterations - 1),
        ema=dataclasses.replace(config.ema, snapshot_every=0),
        loop=dataclasses.replace(
            config.loop,
            iterations=iterations,
            batch_size=batch_size,
            accumulate=1,
            log_every=1,
            sample_every=0,
            checkpoint_every=0,
            device="cpu",
        ),
    )
