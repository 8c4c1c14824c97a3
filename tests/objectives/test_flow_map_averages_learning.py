"""Small networks of average velocities learn Gaussian data, judged against the exact flow of the same noise."""

import math

import pytest
import torch
from torch import Tensor

from objectives.helpers import PROCESS, draws, generator
from oracles.gaussian import GaussianOracle
from trigflow.networks import MLP, ConditioningConfig, MLPConfig
from trigflow.objectives import FlowMap, Objective, VelocityFunction, flow_map_loss, objective_of
from trigflow.process import Proposal
from trigflow.samplers import flow_map_sample, meanflow_times, network_velocity

DATA = GaussianOracle(torch.tensor([0.06, 0.25, 0.6]))
LARGEST_ERROR = 0.4  # of what is drawn, relative to it; 1 in one step of an untrained network, or one that learned no jumps


def untrained() -> MLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLP(MLPConfig(3, width=48, depth=2, conditioning=ConditioningConfig(width=16, takes=("end",))))


def averages(kind: str, anchor: float) -> Objective:
    """Times of a wide spread, and so many jumps of no length."""
    return objective_of(kind, proposal=Proposal(-0.4 + math.log(0.5), 1.6), anchor=anchor)


def train(config: Objective, iterations: int = 350, rate: float = 5e-3) -> MLP:
    assert isinstance(config, FlowMap)
    teacher: VelocityFunction | None = DATA.velocity if config.distills else None
    net, random = untrained(), draws(256, seed=1)
    g = random.generator
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, betas=(0.9, 0.99))
    for i in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 2 * (1 - i / iterations))
        x0 = DATA.sample(256, g)
        noise, jumps = PROCESS.sample_noise(x0, g), config.draw(random)
        optimizer.zero_grad()
        flow_map_loss(net, PROCESS, x0, noise, **jumps, teacher=teacher, config=config).value.backward()
        optimizer.step()
    return net


def error(net: MLP, steps: int) -> float:
    """Root mean square of the distance from the exact samples of the same noise, relative to these."""
    noise = PROCESS.sample_noise(torch.empty(2000, 3), generator(2))
    drawn = flow_map_sample(network_velocity(net, PROCESS), PROCESS, noise, meanflow_times(PROCESS, steps))
    exact: Tensor = DATA.consistency(noise, PROCESS.t_max)
    return float(((drawn - exact).square().mean(0) / exact.square().mean(0)).mean().sqrt())


@pytest.mark.parametrize("kind", ["meanflow-distill", "meanflow"])
def test_average_velocities_are_learned(kind: str) -> None:
    net = train(averages(kind, anchor=0.25))
    for steps in (1, 2, 4):
        assert error(net, steps) < LARGEST_ERROR


def test_the_judge_knows_good_from_bad() -> None:
    """Flow matching alone learns the velocity, which is no average velocity."""
    assert error(untrained(), 1) > 2 * LARGEST_ERROR
    assert error(train(averages("meanflow-distill", anchor=1.0), iterations=150), 1) > 2 * LARGEST_ERROR
