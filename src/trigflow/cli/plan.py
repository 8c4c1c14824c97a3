"""`trigflow plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Plan:
    """Say what a recipe takes before it is started: operations, memory on each GPU, hours. Needs no GPU.

    Example: trigflow plan img512-xxl-scd --gpus 64 --gpu h100
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """Name of a recipe, see trigflow recipes."""
    gpus: int = 1
    """Number of GPUs."""
    batch_gpu: int | None = None
    """Samples on each GPU at a time; by default the most that fit and divide the batch."""
    gpu: str = "h100"
    """a100-40g, a100-80g, h100, h200, b200, l4, l40s, rtx4090 or mi300x."""
    utilization: float = 0.4
    """Share of the GPU's peak rate that training reaches; the hours depend on it."""
    memory: float | None = None
    """GiB of memory of a GPU, in place of what the named one has."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """ddp: everything on each GPU. fsdp2: weights, gradients, moments and averages sharded."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """In place of the recipe's."""
    checkpointing: bool = False
    """Blocks are computed again in the backward pass instead of kept."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> None:
        import json

        from trigflow.lab.plan import make_plan
        from trigflow.lab.plan.text import describe

        plan = make_plan(
            self.recipe,
            gpus=self.gpus,
            batch_gpu=self.batch_gpu,
            gpu=self.gpu,
            utilization=self.utilization,
            memory_gib=self.memory,
            parallel=self.parallel,
            precision=self.precision,
            checkpointing=self.checkpointing,
        )
        print(json.dumps(plan.as_dict(), indent=2) if self.json else describe(plan))
