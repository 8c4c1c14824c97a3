"""Small networks of average velocities learn Gaussian data, judged against the exact flow of the same noise."""

import pytest
import torch
from torch import Tensor

from objectives.helpers import PROCESS, generator
from oracles.gaussian import GaussianOracle
from trigflow.networks import MLP, ConditioningConfig, MLPConfig
from trigflow.objectives import MeanFlowConfig, VelocityFunction, meanflow_loss
from trigflow.samplers import meanflow_sample, meanflow_times, network_velocity

DATA = GaussianOracle(torch.tensor([0.06, 0.25, 0.6]))
LARGEST_ERROR = (
    0.4  # of what is drawn, relative to it; 1 in one step of an untrained network, or one that learned no jumps
)


def untrained() -> MLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLP(MLPConfig(3, width=48, depth=2, conditioning=ConditioningConfig(width=16, takes_end=True)))


def train(config: MeanFlowConfig, teacher: VelocityFunction | None, iterations: int = 350, rate: float = 5e-3) -> MLP:
    net, g = untrained(), generator(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, betas=(0.9, 0.99))
    for i in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 2 * (1 - i / iterations))
        x0 = DATA.sample(256, g)
        noise, (t, end) = PROCESS.sample_noise(x0, g), config.draw(256, g)
        optimizer.zero_grad()
        meanflow_loss(net, PROCESS, x0, noise, t, end, teacher=teacher, config=config).value.backward()
        optimizer.step()
    return net


def error(net: MLP, steps: int) -> float:
    """Root mean square of the distance from the exact samples of the same noise, relative to these."""
    noise = PROCESS.sample_noise(torch.empty(2000, 3), generator(2))
    drawn = meanflow_sample(network_velocity(net, PROCESS), PROCESS, noise, meanflow_times(PROCESS, steps))
    exact: Tensor = DATA.consistency(noise, PROCESS.t_max)
    return float(((drawn - exact).square().mean(0) / exact.square().mean(0)).mean().sqrt())


@pytest.mark.parametrize("kind", ["teacher", "data"])
def test_average_velocities_are_learned(kind: str) -> None:
    config = MeanFlowConfig(std=1.6, equal=0.25)
    net = train(config, DATA.velocity if kind == "teacher" else None)
    for steps in (1, 2, 4):
        assert error(net, steps) < LARGEST_ERROR


def test_the_judge_knows_good_from_bad() -> None:
    """Flow matching alone learns the velocity, which is no average velocity."""
    assert error(untrained(), 1) > 2 * LARGEST_ERROR
    assert error(train(MeanFlowConfig(std=1.6, equal=1.0), DATA.velocity, iterations=150), 1) > 2 * LARGEST_ERROR
