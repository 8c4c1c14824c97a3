"""Where the memory of a GPU goes under data-parallel training, and what fits into it of a student from diffusers."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trigflow.lab.plan.step import Step
from trigflow.lab.recipes.named import NamedRun
from trigflow.lab.recipes.starters import ADAPTERS
from trigflow.models.model import read_description, unloaded_parts
from trigflow.networks import network_from_state
from trigflow.runtime.errors import UserError
from trigflow.training.config import RunConfig

ParallelMode = Literal["ddp", "fsdp2"]

GIB = 2**30
BYTES = 4
"""Of a number in float32, in which weights, gradients, moments and averages are kept under autocast as well."""
USABLE = 0.9
"""Share of a GPU's memory to plan with; the rest is for workspaces of kernels and for gaps between tensors."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU.

    Attributes:
        weights: of the student.
        gradients: of the student.
        optimizer: moments of the student.
        averages: EMA copies of the student.
        teacher: weights of the teacher.
        fake_score: weights, gradients and moments of the fake score network.
        gathered: under fsdp2, what is whole for a moment: weights of two blocks, gradients of one, and all outside of blocks.
        fixed: activations that do not depend on the batch, such as normalized weights.
        per_sample: activations of one sample.
    """

    weights: float
    gradients: float
    optimizer: float
    averages: float
    teacher: float
    fake_score: float
    gathered: float
    fixed: float
    per_sample: float

    @property
    def states(self) -> float:
        """Everything but activations."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.teacher + self.fake_score + self.gathered

    def total(self, batch_gpu: int) -> float:
        """With this many samples a GPU at a time."""
        return self.states + self.fixed + batch_gpu * self.per_sample

    def largest_batch(self, available: float) -> int:
        """Most samples at a time in so many bytes, 0 when not one fits."""
        return max(0, int((available - self.states - self.fixed) // self.per_sample))


def memory(step: Step, parallel: ParallelMode, gpus: int) -> Memory:
    """What a run takes on each of `gpus` GPUs.

    ddp keeps everything on each. fsdp2 shards weights, gradients, moments and averages evenly, gathers the weights of a block
    for the time it is computed, one block ahead, and those outside of blocks for the whole step.
    """
    shards = gpus if parallel == "fsdp2" else 1
    student, teacher, fake = step.student, step.teacher, step.fake
    # The weights of the two largest blocks and the gradients of the largest, and all outside of blocks.
    gathered = sum(student.blocks[:2]) + sum(student.blocks[:1])
    # Of adapters less is trained than blocks hold; what is outside of these is the teacher's.
    gathered += sum(max(0, size.parameters - sum(size.blocks)) for size in (student, teacher, fake) if size is not None)
    return Memory(
        weights=BYTES * student.parameters / shards,
        gradients=BYTES * student.parameters / shards,
        optimizer=BYTES * student.moments / shards,
        averages=BYTES * step.averages * student.parameters / shards,
        teacher=0.0 if teacher is None else teacher.size / shards,
        fake_score=0.0 if fake is None else BYTES * (2 * fake.parameters + fake.moments) / shards,
        gathered=0.0 if shards == 1 else BYTES * gathered,
        fixed=step.many.activations - step.many.growing,
        per_sample=step.many.growing / step.many.batch,
    )


# Students of teachers from diffusers ------------------------------------------------------------------------------------


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
