"""Students of teachers from diffusers: what they take, and what fits."""

import dataclasses
from pathlib import Path
from typing import Any

from trigflow.lab.plan.memory import USABLE, memory
from trigflow.lab.plan.step import Step
from trigflow.lab.recipes.named import NamedRun
from trigflow.lab.recipes.starters import ADAPTERS
from trigflow.models.model import read_description, unloaded_parts
from trigflow.networks import network_from_state
from trigflow.runtime.errors import UserError
from trigflow.training.config import RunConfig

GIB = 2**30


def student_of(folder: Path, lora: int | None, config: RunConfig = ADAPTERS) -> NamedRun:
    """The run that distills the teacher in a folder, with adapters of this rank or, for None, whole. Raises a UserError for a
    folder that holds no teacher from diffusers, or a rank below 1."""
    if lora is not None and lora < 1:
        raise UserError(f"--lora {lora}; expected a rank of at least 1; change it")
    codec, _ = unloaded_parts(folder)
    network: Any = network_from_state(read_description(folder / "model.json")["network"])
    if not hasattr(network, "adapter"):
        raise UserError(f"'{folder}' is no teacher from diffusers; expected one, or the name of a recipe; see trigflow recipes")
    network = network.changed(adapter=dataclasses.replace(network.adapter, rank=lora or 0, full=lora is None))
    return NamedRun(str(folder), dataclasses.replace(config, network=network), tuple(codec.shape), 0, str(folder))


def fitted(config: RunConfig, folder: Path, gib: float) -> RunConfig:
    """The configuration of a student with as few parts of a batch as fit into so much memory, and with blocks computed again in
    the backward pass where even one sample does not fit otherwise. Raises a UserError if not one sample fits at all."""
    network: Any = config.network
    run = student_of(folder, None if network.adapter.full else network.adapter.rank, config)
    available, batch = GIB * USABLE * gib, config.loop.batch_size
    for again in (False, True):
        most = memory(Step(run, checkpointing=again), "ddp", 1).largest_batch(available)
        parts = next((n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= most), 0)
        if parts:
            loop = dataclasses.replace(config.loop, accumulate=parts)
            return dataclasses.replace(config, loop=loop, parallel=dataclasses.replace(config.parallel, recompute=again))
    need = memory(Step(run, checkpointing=True), "ddp", 1).total(1) / GIB
    raise UserError(
        f"one sample at a time needs {need:.1f} GiB; expected at most {USABLE:.0%} of --memory {gib:g}; use a smaller --lora "
        "rank, import the teacher with --dtype bfloat16, or a smaller --size"
    )
