"""Small students that learn a mixture of four modes in the plane, judged by what they draw.

One teacher is trained with the diffusion loss; the students start from it, as in the paper, and are then either distilled
(sCD) or trained on samples (sCT). Two numbers judge a set of samples: the energy distance to fresh data, whose own value
between two sets of data is about 0, and the share of samples within three standard deviations of each mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from objectives.helpers import PROCESS, consistency_loss, generator
from oracles.mixture import MixtureOracle
from trigflow.networks import MLP, ConditioningConfig, MLPConfig
from trigflow.objectives import AdaptiveWeight, Loss, TangentConfig, diffusion_loss
from trigflow.process import Proposal
from trigflow.samplers import consistency_times, flow_map_sample, heun, network_velocity, sigma_grid

MEANS = torch.tensor([[0.6, 0.3], [-0.3, 0.6], [-0.5, -0.4], [0.35, -0.55]])
SPREAD = 0.15
DATA = MixtureOracle(MEANS, torch.full((4,), SPREAD**2), torch.ones(4))
COUNT = 2000

LARGEST_DISTANCE = 0.01  # one mode is at 0.6, an untrained student at 0.2, three of the modes at 0.06
SMALLEST_SHARE = 0.17  # of a mode with a quarter of the data
SMALLEST_COVERAGE = 0.88  # of all samples; 0.989 for data

Step = Callable[[Tensor, Tensor, Tensor, int], Loss]


def energy_distance(a: Tensor, b: Tensor) -> float:
    """`2 E|a - b| - E|a - a'| - E|b - b'|`, unbiased: zero for two samples of one distribution."""

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))


def shares(x: Tensor) -> Tensor:
    """Share of the samples that lie within three standard deviations of each mode, `(4,)`."""
    near = torch.cdist(x, MEANS).min(dim=1)
    return torch.bincount(near.indices[near.values < 3 * SPREAD], minlength=4) / len(x)


def good(x: Tensor) -> bool:
    """The test that students must pass and everything else must fail."""
    share = shares(x)
    return (
        energy_distance(x, DATA.sample(COUNT, generator(100))[0]) < LARGEST_DISTANCE
        and float(share.min()) > SMALLEST_SHARE
        and float(share.sum()) > SMALLEST_COVERAGE
    )


def draw(net: MLP, steps: int) -> Tensor:
    noise = PROCESS.sample_noise(torch.empty(COUNT, 2), generator(101))
    times = consistency_times(PROCESS, steps)
    return flow_map_sample(network_velocity(net, PROCESS), PROCESS, noise, times, gamma=1.0, generator=generator(102))


def untrained() -> MLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLP(MLPConfig(width=64, depth=2, conditioning=ConditioningConfig(width=16)))


def train(net: MLP, step: Step, weight: AdaptiveWeight, iterations: int, rate: float) -> MLP:
    """Adam, the rate constant for the first half and then falling to zero."""
    optimizer = torch.optim.Adam([*net.parameters(), *weight.parameters()], lr=rate, betas=(0.9, 0.99))
    g, proposal = generator(1), Proposal(-0.8, 1.4)
    for i in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 2 * (1 - i / iterations))
        x0, _ = DATA.sample(256, g)
        noise, t = PROCESS.sample_noise(x0, g), proposal.sample(PROCESS, 256, g)
        optimizer.zero_grad()
        step(x0, noise, t, i).value.backward()
        optimizer.step()
    return net


def taught() -> MLP:
    """The teacher, see `conftest.py`."""
    net, weight = untrained(), AdaptiveWeight(PROCESS)

    def step(x0: Tensor, noise: Tensor, t: Tensor, iteration: int) -> Loss:
        return diffusion_loss(net, PROCESS, x0, noise, t, weight=weight)

    return train(net, step, weight, iterations=400, rate=2e-3)


def student(teacher: MLP, velocity: Callable[[Tensor, Tensor], Tensor] | None) -> MLP:
    """Distilled in 300 iterations, or trained on samples, whose gradients are noisier, in 500."""
    iterations = 300 if velocity else 500
    net, weight, config = copy.deepcopy(teacher), AdaptiveWeight(PROCESS), TangentConfig(warmup=iterations // 5)

    def step(x0: Tensor, noise: Tensor, t: Tensor, iteration: int) -> Loss:
        r = config.warmup_factor(iteration)
        return consistency_loss(net, x0, noise, t, teacher=velocity, tangent=config, r=r, weight=weight)

    return train(net, step, weight, iterations, rate=5e-4)


def test_the_judge_knows_good_from_bad(teacher: MLP) -> None:
    """Data pass; one mode, three modes, the right modes too wide, an untrained network and a teacher alone do not."""
    assert good(DATA.sample(COUNT, generator(7))[0])
    for components in ([0], [0, 1, 2]):
        label = torch.tensor(components).repeat(COUNT)[:COUNT]
        assert not good(DATA.sample(COUNT, generator(7), label)[0])
    assert not good(DATA.sample(COUNT, generator(7))[0] + 0.2 * torch.randn(COUNT, 2, generator=generator(8)))
    for steps in (1, 2):
        assert not good(draw(untrained(), steps))
        assert not good(draw(teacher, steps))


def test_diffusion_training_learns_the_velocity(teacher: MLP) -> None:
    g = generator(9)
    x0, _ = DATA.sample(5000, g)
    t = Proposal(-0.8, 1.4).sample(PROCESS, 5000, g)
    x_t = PROCESS.interpolate(x0, PROCESS.sample_noise(x0, g), t)
    with torch.no_grad():
        gap = (0.5 * teacher(x_t / 0.5, t) - DATA.velocity(x_t, t)).square().mean()
    assert gap < 0.1 * DATA.velocity(x_t, t).square().mean()
    start = PROCESS.sample_noise(torch.empty(COUNT, 2), generator(10))
    assert good(heun(network_velocity(teacher, PROCESS), start, sigma_grid(PROCESS, 18)))


@pytest.mark.parametrize("kind", ["exact teacher", "trained teacher", "samples"])
def test_students_learn_all_of_the_mixture(kind: str, teacher: MLP) -> None:
    """In two steps, and these easy data even in one."""
    velocity = {
        "exact teacher": DATA.velocity,
        "trained teacher": network_velocity(copy.deepcopy(teacher), PROCESS),
        "samples": None,
    }[kind]
    net = student(teacher, velocity)
    assert good(draw(net, 2))
    assert good(draw(net, 1))
