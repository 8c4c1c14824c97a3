"""Discrete-time students of the mixture in the plane, judged as those of `test_learning`."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from torch import Tensor

from objectives.helpers import PROCESS
from objectives.test_learning import DATA, draw, good, train
from trigflow.networks import MLP
from trigflow.objectives import AdaptiveWeight, DiscreteConfig, Loss, TangentConfig, discrete_loss

ITERATIONS = 400


def student(teacher: MLP, config: DiscreteConfig, velocity: Callable[[Tensor, Tensor], Tensor] | None) -> MLP:
    net, weight, tangent = copy.deepcopy(teacher), AdaptiveWeight(PROCESS), TangentConfig(warmup=100)

    def step(x0: Tensor, noise: Tensor, t: Tensor, iteration: int) -> Loss:
        t, s = config.pairs(PROCESS, t, iteration, ITERATIONS)
        return discrete_loss(
            net, PROCESS, x0, noise, t, s, teacher=velocity, config=config, tangent=tangent,
            r=tangent.warmup_factor(iteration), weight=weight if config.learns_weight else None,
        )  # fmt: skip

    return train(net, step, weight, ITERATIONS, rate=5e-4)


@pytest.mark.parametrize(
    ("config", "velocity"),
    [
        pytest.param(DiscreteConfig(steps=16, solver="heun"), DATA.velocity, id="CD"),
        pytest.param(DiscreteConfig(schedule="ect"), None, id="ECT"),
    ],
)
def test_students_learn_all_of_the_mixture(
    config: DiscreteConfig, velocity: Callable[[Tensor, Tensor], Tensor] | None, teacher: MLP
) -> None:
    net = student(teacher, config, velocity)
    assert good(draw(net, 2))
    assert good(draw(net, 1))
