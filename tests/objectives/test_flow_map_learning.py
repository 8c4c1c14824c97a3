"""Small any-step students learn the mixture of test_learning.py by each of the residuals, from one teacher's weights."""

import dataclasses

import pytest
import torch
from torch import Tensor

from objectives.helpers import PROCESS, draws, generator
from objectives.test_learning import COUNT, DATA, good, train
from trigflow.networks import MLP
from trigflow.objectives import AdaptiveWeight, FlowMap, Loss, TangentConfig, flow_map_loss
from trigflow.process import Proposal
from trigflow.samplers import flow_map_sample, meanflow_times, network_velocity

NORMALIZED, RAW = (TangentConfig(mode=mode, warmup=50) for mode in ("normalize", "raw"))  # type: ignore[arg-type]
TIMES = Proposal(-0.8, 1.4)
CONFIGS = {
    "any-step": FlowMap(proposal=TIMES, tangent=NORMALIZED),
    "lagrangian": FlowMap(residual="lagrangian", proposal=TIMES, tangent=NORMALIZED),
    "semigroup": FlowMap(residual="semigroup", proposal=TIMES, anchor=0.25, tangent=RAW),
    "self": FlowMap(velocity="self", proposal=TIMES, anchor=0.5, tangent=RAW),
}


def with_end(net: MLP) -> MLP:
    """The same weights, in a network that is also told the end."""
    conditioning = dataclasses.replace(net.config.conditioning, takes=("end",))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = MLP(dataclasses.replace(net.config, conditioning=conditioning))
    result.load_state_dict(net.state_dict(), strict=False)
    return result


def draw(net: MLP, steps: int) -> Tensor:
    noise = PROCESS.sample_noise(torch.empty(COUNT, 2), generator(101))
    return flow_map_sample(network_velocity(net, PROCESS), PROCESS, noise, meanflow_times(PROCESS, steps))


@pytest.mark.parametrize("name", CONFIGS)
def test_students_learn_all_of_the_mixture(name: str, teacher: MLP) -> None:
    """In two deterministic jumps and in four; the weights they start from do not in two."""
    net, weight, config, random = with_end(teacher), AdaptiveWeight(PROCESS), CONFIGS[name], draws(256, seed=4)
    assert not good(draw(net, 2))

    def step(x0: Tensor, noise: Tensor, _: Tensor, iteration: int) -> Loss:
        t, end = config.draw(random).values()
        middle = end + (t - end) * torch.rand(len(t), generator=random.generator)
        velocity = DATA.velocity if config.velocity == "teacher" else None
        r = config.tangent.warmup_factor(iteration)
        return flow_map_loss(
            net, PROCESS, x0, noise, t, end, middle=middle, teacher=velocity, config=config, r=r, weight=weight
        )

    train(net, step, weight, iterations=250, rate=1e-3)
    for steps in (2, 4):
        assert good(draw(net, steps))
