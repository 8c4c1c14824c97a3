"""Presets for the small data sets that come with trigflow, and for any folder of images."""

import dataclasses
from typing import Any, Literal

from trigflow.data.config import DataConfig
from trigflow.lab.recipes.named import Recipe
from trigflow.networks import ConditioningConfig, TextConfig, UNetConfig
from trigflow.objectives import TangentConfig, objective_of
from trigflow.process import Proposal
from trigflow.training.config import LoopConfig, OptimizerConfig, RunConfig

DIGITS_NETWORK = UNetConfig(patch=2, width=64, mult=(1,), blocks=1, conditioning=ConditioningConfig(width=32))
MNIST_NETWORK = UNetConfig(patch=2, width=32, mult=(1, 2), blocks=1)
EMOJI_NETWORK = UNetConfig(
    channels=3,
    patch=4,
    width=64,
    mult=(1, 2, 2),
    blocks=1,
    attention=(1,),
    conditioning=ConditioningConfig(text=TextConfig(length=48)),
)
"""For a CPU: pictures of 48x48 are folded to 12x12 positions first, and most of the width is at 6x6 and 3x3. 6 million weights,
0.2 billion multiplications a picture."""
IMAGES_NETWORK = UNetConfig(patch=2, width=96, mult=(1, 2, 2), blocks=2, attention=(2,), dropout=0.1)


def _teacher(
    data: str,
    network: UNetConfig,
    *,
    iterations: int,
    batch_size: int,
    lr: float,
    optimizer: Literal["adam", "muon"] = "adam",
    every: int = 1_000,
) -> RunConfig:
    """Velocity prediction, a cosine schedule."""
    return RunConfig(
        data=DataConfig(source=data),
        network=network,
        objective=objective_of("diffusion", proposal=Proposal(-1.0, 1.4)),
        optimizer=OptimizerConfig(name=optimizer, lr=lr, schedule="cosine", warmup=50),
        loop=LoopConfig(
            iterations=iterations, batch_size=batch_size, sample_every=every, checkpoint_every=every, channels_last=True
        ),
    )


def _student(teacher: RunConfig, *, iterations: int, batch_size: int, lr: float, **objective: Any) -> RunConfig:
    """sCD with the data, network and intervals of the teacher."""
    return dataclasses.replace(
        teacher,
        objective=objective_of("scd", **objective),
        optimizer=dataclasses.replace(teacher.optimizer, lr=lr, warmup=0),
        loop=dataclasses.replace(teacher.loop, iterations=iterations, batch_size=batch_size),
    )


DIGITS = _teacher("digits", DIGITS_NETWORK, iterations=1_000, batch_size=64, lr=5e-3, optimizer="muon", every=500)
MNIST = _teacher("mnist", MNIST_NETWORK, iterations=2_500, batch_size=48, lr=5e-3, optimizer="muon")
# What is drawn is decided at high noise: half of the draws are above sigma 1, so that words are learned soon.
EMOJI = dataclasses.replace(
    _teacher("emoji", EMOJI_NETWORK, iterations=12_000, batch_size=64, lr=5e-3, optimizer="muon", every=500),
    objective=objective_of("diffusion", proposal=Proposal(0.0, 1.6), label_dropout=0.1),
    optimizer=OptimizerConfig(name="muon", lr=5e-3, schedule="inverse_sqrt", t_ref=4_000, warmup=100),
)
IMAGES = _teacher("images", IMAGES_NETWORK, iterations=50_000, batch_size=64, lr=1e-3, every=2_000)

ADAPTERS = RunConfig(
    objective=objective_of("scd", proposal=Proposal(-0.8, 1.6), tangent=TangentConfig(warmup=500), adaptive_weight=False),
    optimizer=OptimizerConfig(name="adam", lr=1e-4, schedule="constant", warmup=50),
    loop=LoopConfig(iterations=4_000, batch_size=16, sample_every=500, checkpoint_every=500),
)
"""Students of teachers imported from diffusers, as adapters or whole."""

RECIPES: dict[str, Recipe] = {
    "digits": Recipe(
        DIGITS,
        _student(
            DIGITS,
            iterations=3_600,
            batch_size=48,
            lr=5e-3,
            # With 64 elements a sample, ||g|| is about 0.5: c = 0.1 would be a fifth of it. Normalized tangents have the same
            # error at every time, which leaves a learned weighting nothing to do; less weight at high noise does more.
            tangent=TangentConfig(warmup=100, c=0.01, prior=0.5),
            adaptive_weight=False,
            # About uniform in t. Errors made near t = 0 are carried to every later time, so mass there matters most.
            proposal=Proposal(-1.2, 1.6),
        ),
    ),
    "mnist": Recipe(
        MNIST,
        _student(
            MNIST,
            iterations=9_000,
            batch_size=48,
            lr=5e-3,
            tangent=TangentConfig(warmup=200, c=0.03, prior=0.5),
            adaptive_weight=False,
            proposal=Proposal(-1.2, 1.6),
        ),
    ),
    "emoji": Recipe(
        EMOJI,
        _student(
            EMOJI,
            iterations=12_000,
            batch_size=64,
            lr=2e-3,
            tangent=TangentConfig(warmup=500, c=0.1),
            proposal=Proposal(-0.8, 1.6),
            adaptive_weight=False,
            guidance_max=4.0,
            condition_dropout=0.1,
        ),
    ),
    "images": Recipe(
        IMAGES,
        _student(
            IMAGES,
            iterations=100_000,
            batch_size=64,
            lr=1e-4,
            tangent=TangentConfig(warmup=5_000),
            proposal=Proposal(-1.0, 1.4),
        ),
    ),
}
"""`digits` is the demo's, measured in benchmarks/digits.py, and `mnist` in benchmarks/mnist.py. The teacher of `mnist` is brief
so that both fit an hour of two cores. `images`, for any folder or zip, is a starting point."""
