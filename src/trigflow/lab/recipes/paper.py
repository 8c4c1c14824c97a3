"""The runs of the paper: CIFAR-10, ImageNet 64x64 in pixels, and ImageNet 512x512 in latents of 64x64.

Batch sizes, iterations, learning rates, schedules, betas, eps, dropout, averages, proposals and the shape of the tangent are
those of Lu and Song 2025 (tables of the appendix). A comment `ours` marks what it leaves open; docs/recipes.md says why each
is as it is.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from trigflow.data.config import DataConfig
from trigflow.lab.recipes.changes import change
from trigflow.lab.recipes.named import NamedRun
from trigflow.networks import DDPMPPConfig
from trigflow.networks.edm2 import edm2_config
from trigflow.objectives import Objective, TangentConfig, objective_of
from trigflow.process import Proposal
from trigflow.training.config import EMAConfig, LoopConfig, OptimizerConfig, RunConfig

TANGENT = TangentConfig(mode="normalize", c=0.1, warmup=10_000)


def long_loop(iterations: int, batch_size: int, precision: Literal["fp32", "bf16"]) -> LoopConfig:
    """The loop of a run of days. ours: how often it reports."""
    return LoopConfig(
        iterations=iterations,
        batch_size=batch_size,
        precision=precision,
        channels_last=True,
        log_every=100,
        sample_every=10_000,
        checkpoint_every=5_000,
    )


# CIFAR-10 -------------------------------------------------------------------------------------------------------------


def _cifar10(kind: Literal["diffusion", "sct", "scd"], dropout: float) -> RunConfig:
    """Teacher and students differ in the objective and in dropout alone."""
    settings: dict[str, Any] = {"label_dropout": 0.0} if kind == "diffusion" else {"tangent": TANGENT}
    return RunConfig(
        data=DataConfig(source="cifar10", flip=True, normalize="symmetric"),  # ours: flips
        network=DDPMPPConfig(dropout=dropout),
        objective=objective_of(kind, proposal=Proposal(-1.0, 1.4), **settings),
        optimizer=OptimizerConfig(name="radam", lr=1e-4, betas=(0.9, 0.99), schedule="constant"),
        ema=EMAConfig(kind="halflife", halflife_mimg=0.5),
        loop=long_loop(400_000, 512, "fp32"),
    )


CIFAR10 = {
    "teacher": _cifar10("diffusion", dropout=0.13),  # ours: that of EDM
    "sct": _cifar10("sct", dropout=0.20),
    "scd": _cifar10("scd", dropout=0.0),
}


# ImageNet -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SizeSettings:
    """What the paper sets for a size of EDM2; 64 stands for ImageNet 64x64, 512 for 512x512."""

    teacher_lr: float
    student_lr: float
    teacher_dropout: float
    teacher_iterations_64: int
    teacher_iterations_512: int
    teacher_sigma_rel_64: float
    teacher_sigma_rel_512: float
    sct_dropout_512: float
    scd_dropout_512: float


SIZES = {
    "s": SizeSettings(1e-2, 1e-4, 0.0, 1_048_000, 1_048_000, 0.075, 0.025, 0.25, 0.0),
    "m": SizeSettings(9e-3, 9e-5, 0.1, 1_486_000, 1_048_000, 0.06, 0.03, 0.35, 0.1),
    "l": SizeSettings(8e-3, 8e-5, 0.1, 761_000, 696_000, 0.04, 0.015, 0.35, 0.1),
    "xl": SizeSettings(7e-3, 7e-5, 0.1, 540_000, 598_000, 0.04, 0.02, 0.35, 0.1),
    "xxl": SizeSettings(6.5e-3, 6.5e-5, 0.1, 0, 376_000, 0.0, 0.015, 0.35, 0.1),  # trained on 512x512 alone
}

BATCH = 2048
TEACHER_WARMUP = 10_000_000 // BATCH
"""ours: the learning rate rises over the first 10 million images, as in EDM2; students start from trained weights."""
STUDENT_SIGMA_REL = 0.05
"""ours: the shorter one of the two averages that EDM2 tracks."""
LOW = 16
"""Resolutions up to this have the dropout of the students."""

PIXELS = DataConfig(source="imagenet64", normalize="symmetric")
LATENTS = DataConfig(source="imagenet512-latents", normalize="edm2")


def _teacher(
    name: str, size: SizeSettings, data: DataConfig, objective: Objective, *, t_ref: int, iterations: int, sigma_rel: float
) -> RunConfig:
    return RunConfig(
        data=data,
        network=dataclasses.replace(edm2_config(name), dropout=size.teacher_dropout),
        objective=objective,
        optimizer=OptimizerConfig(
            name="adam",
            lr=size.teacher_lr,
            betas=(0.9, 0.99),
            eps=1e-11,
            schedule="inverse_sqrt",
            t_ref=t_ref,
            warmup=TEACHER_WARMUP,
        ),
        ema=EMAConfig(kind="power", sigma_rel=sigma_rel, snapshot_every=20_000),
        loop=long_loop(iterations, BATCH, "bf16"),
    )


def _student(teacher: RunConfig, objective: Objective, *, lr: float, iterations: int, dropout: float) -> RunConfig:
    """Another objective, learning rate, length, dropout and average; all else is the teacher's."""
    return change(
        teacher,
        {
            "network.dropout": dropout,
            "network.dropout_up_to": LOW if dropout else None,
            "objective": objective,
            "optimizer.lr": lr,
            "optimizer.warmup": 0,
            "ema.sigma_rel": STUDENT_SIGMA_REL,
            "ema.snapshot_every": 10_000,
            "loop.iterations": iterations,
        },
    )


def _img64(name: str, size: SizeSettings) -> dict[str, RunConfig]:
    """Pixels. ours: no label dropout, because nothing here is guided."""
    teacher = _teacher(
        f"img64-{name}",
        size,
        PIXELS,
        objective_of(proposal=Proposal(-0.8, 1.6), label_dropout=0.0),
        t_ref=35_000,
        iterations=size.teacher_iterations_64,
        sigma_rel=size.teacher_sigma_rel_64,
    )
    sct, scd = (objective_of(kind, proposal=Proposal(-1.0, 1.6), tangent=TANGENT) for kind in ("sct", "scd"))
    return {
        "teacher": teacher,
        "sct": _student(teacher, sct, lr=size.student_lr, iterations=400_000, dropout=0.45),
        "scd": _student(teacher, scd, lr=size.student_lr, iterations=400_000, dropout=0.0),
    }


def _img512(name: str, size: SizeSettings) -> dict[str, RunConfig]:
    """Latents. ours: a tenth of the labels dropped, which guidance needs; and no tangent warmup in scd-vsd, which starts
    from a finished student: with r = 0 the loss would turn that back into its teacher."""
    teacher = _teacher(
        f"img512-{name}",
        size,
        LATENTS,
        objective_of(proposal=Proposal(-0.4, 1.0), label_dropout=0.1),
        t_ref=70_000,
        iterations=size.teacher_iterations_512,
        sigma_rel=size.teacher_sigma_rel_512,
    )
    proposal = Proposal(-0.8, 1.6)
    sct = objective_of("sct", proposal=proposal, tangent=TANGENT)
    scd = objective_of("scd", proposal=proposal, tangent=TANGENT, guidance_max=2.0)
    vsd = objective_of(
        "scd-vsd", proposal=proposal, tangent=dataclasses.replace(TANGENT, warmup=0), guidance_max=2.0, lambda_vsd=1.0,
        vsd_proposal=Proposal(0.4, 2.0), fake_updates=1,
    )  # fmt: skip
    lr, dropout = size.student_lr, size.scd_dropout_512
    return {
        "teacher": teacher,
        "sct": _student(teacher, sct, lr=lr, iterations=100_000, dropout=size.sct_dropout_512),
        "scd": _student(teacher, scd, lr=lr, iterations=200_000, dropout=dropout),
        "scd-vsd": _student(teacher, vsd, lr=lr, iterations=20_000, dropout=dropout),
    }


PAPER = (
    *(NamedRun(f"cifar10-{role}", config, (3, 32, 32), 0) for role, config in CIFAR10.items()),
    *(
        NamedRun(f"img64-{name}-{role}", config, (3, 64, 64), 1000)
        for name, size in SIZES.items()
        if size.teacher_iterations_64
        for role, config in _img64(name, size).items()
    ),
    *(
        NamedRun(f"img512-{name}-{role}", config, (4, 64, 64), 1000)
        for name, size in SIZES.items()
        for role, config in _img512(name, size).items()
    ),
)
