"""Settings changed by name: what recipes and the demo do to a run; and a recipe in miniature."""

import dataclasses
from typing import Any, TypeVar, cast

from trigflow.networks import DDPMPPConfig, DiTConfig, EDM2Config, UNetConfig
from trigflow.objectives import StudentObjective, as_kind
from trigflow.runtime.errors import UserError
from trigflow.training.config import RunConfig

Changes = dict[str, Any]
"""Settings of a `RunConfig` by dotted name, such as `{"objective.tangent.mode": "clip"}`."""


C = TypeVar("C")


def change(config: C, changes: Changes) -> C:
    """A copy with settings changed by dotted name: `change(config, {"loop.seed": 1})`. Raises a UserError for a setting that
    does not exist; the message lists its neighbours."""
    changed: Any = config
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        known = [f.name for f in dataclasses.fields(changed)] if dataclasses.is_dataclass(changed) else []
        if head not in known:
            raise UserError(f"unknown setting '{name}'; expected one of {', '.join(known)}; correct the name")
        inner = getattr(changed, head)
        if name == "objective.kind":
            inner = as_kind(inner, value)
        else:
            inner = change(inner, {rest: value}) if rest else value
        changed = dataclasses.replace(changed, **{head: inner})
    return cast(C, changed)


def warmed_within(config: RunConfig, iterations: int) -> Changes:
    """A tangent warmup, where the objective has one, of at most so many iterations."""
    if not isinstance(config.objective, StudentObjective):
        return {}
    return {"objective.tangent.warmup": min(config.objective.tangent.warmup, iterations)}


NARROW: dict[type[Any], Changes] = {
    UNetConfig: {"network.width": 8, "network.blocks": 1},
    DDPMPPConfig: {"network.width": 8, "network.mult": (1, 2), "network.blocks": 1},
    EDM2Config: {"network.width": 16, "network.mult": (1, 2), "network.blocks": 1, "network.head_width": 16},
    DiTConfig: {"network.width": 32, "network.depth": 2, "network.heads": 2},
}
"""Settings of a network in miniature."""


def shrink(config: RunConfig, *, iterations: int = 3, batch_size: int = 4) -> RunConfig:
    """The same run with a narrow network, a few steps of small batches, a tangent warmup that ends within them, and no
    sample grids, checkpoints or snapshots in between.

    Channels, classes and resolution are taken from the data as always, so images of 16x16 make it small altogether.
    """
    return change(
        config,
        {
            **NARROW[type(config.network)],
            "network.conditioning.width": 8,
            **warmed_within(config, iterations - 1),
            "ema.snapshot_every": 0,
            "loop.iterations": iterations,
            "loop.batch_size": batch_size,
            "loop.accumulate": 1,
            "loop.log_every": 1,
            "loop.sample_every": 0,
            "loop.checkpoint_every": 0,
            "loop.device": "cpu",
        },
    )
