"""Where the memory of a GPU goes under data-parallel training."""

from dataclasses import dataclass
from typing import Literal

from trigflow.lab.plan.step import Step

ParallelMode = Literal["ddp", "fsdp2"]

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
    gathered += sum(size.parameters - sum(size.blocks) for size in (student, teacher, fake) if size is not None)
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
