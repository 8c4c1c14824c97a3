"""Diffusion transformers on latents of ImageNet 256x256. These runs are not the paper's.

Teachers are trained as SiT was (Ma et al. 2024), students with what the paper gives to its latent models; docs/recipes.md
has every choice.
"""

import dataclasses

from trigflow.data.config import DataConfig
from trigflow.lab.recipes.changes import change
from trigflow.lab.recipes.named import NamedRun
from trigflow.lab.recipes.paper import TANGENT, long_loop
from trigflow.networks.dit import dit_config
from trigflow.objectives import objective_of
from trigflow.process import Proposal
from trigflow.training.config import EMAConfig, OptimizerConfig, RunConfig

SIZES = {"b": 400_000, "xl": 7_000_000}
"""Iterations of the teacher: those of SiT's comparison of sizes, and of its longest run."""


def _runs(size: str, iterations: int) -> dict[str, RunConfig]:
    teacher = RunConfig(
        data=DataConfig(source="imagenet256-latents"),
        network=dit_config(size, patch=2, channels=4, num_classes=1000),
        objective=objective_of(proposal=Proposal(-0.4, 1.0), label_dropout=0.1),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4, betas=(0.9, 0.99), schedule="constant"),
        ema=EMAConfig(kind="power", sigma_rel=0.05, snapshot_every=20_000),
        loop=dataclasses.replace(long_loop(iterations, 256, "bf16"), channels_last=False),
    )
    student = {"optimizer.lr": 5e-6, "ema.snapshot_every": 10_000, "loop.iterations": 200_000, "loop.batch_size": 1024}
    sct = objective_of("sct", proposal=Proposal(-0.8, 1.6), tangent=TANGENT)
    scd = objective_of("scd", proposal=Proposal(-0.8, 1.6), tangent=TANGENT, guidance_max=2.0)
    return {
        "teacher": teacher,
        "sct": change(teacher, {**student, "objective": sct}),
        "scd": change(teacher, {**student, "objective": scd}),
    }


TRANSFORMERS = tuple(
    NamedRun(f"dit-{size}-{role}", config, (4, 32, 32), 1000)
    for size, iterations in SIZES.items()
    for role, config in _runs(size, iterations).items()
)
