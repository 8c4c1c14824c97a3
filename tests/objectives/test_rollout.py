"""Samples of rollouts, and the joint loss on them."""

import itertools
import math

import pytest
import torch

from objectives.helpers import GAUSSIAN, PROCESS, batch, generator, student
from trigflow.objectives import diffusion_loss, fake_score_loss, rollout, rollout_times, vsd_loss
from trigflow.runtime.errors import UserError
from trigflow.samplers import flow_map_sample, network_velocity

TIMES = (PROCESS.t_max, 1.1, 0.4)


def noises(n: int, seed: int = 0) -> list[torch.Tensor]:
    g = generator(seed)
    return [PROCESS.sample_noise(torch.empty(n, 3, dtype=torch.float64), g) for _ in TIMES]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_rollouts_are_consistency_samples() -> None:
    net, (z, *fresh) = student(), noises(8)
    t = torch.full((8,), PROCESS.t_max, dtype=torch.float64)
    one_step = math.cos(PROCESS.t_max) * z - math.sin(PROCESS.t_max) * 0.5 * net(z / 0.5, t)
    close(rollout(net, PROCESS, z, TIMES[:1]), one_step)
    drawn = flow_map_sample(network_velocity(net, PROCESS), PROCESS, z, TIMES, gamma=1.0, fresh=fresh)
    close(rollout(net, PROCESS, z, TIMES, fresh), drawn)
    with pytest.raises(UserError, match="fresh"):
        rollout(net, PROCESS, z, TIMES)


def test_rollouts_of_the_exact_student_are_gaussian() -> None:
    z, *fresh = noises(40_000)
    x0 = rollout(lambda x, t: GAUSSIAN.F_consistency(x, t), PROCESS, z, TIMES, fresh)
    torch.testing.assert_close(x0.var(0), GAUSSIAN.variances, rtol=0.03, atol=0)


def test_the_gradient_goes_through_the_last_evaluation_only() -> None:
    net, (z, *fresh) = student(), noises(8)
    with torch.no_grad():
        before = rollout(net, PROCESS, z, TIMES[:2], fresh[:1])
        x_t = PROCESS.interpolate(before, fresh[1], TIMES[2])
    t = torch.full((8,), TIMES[2], dtype=torch.float64)
    last = PROCESS.denoise(x_t, 0.5 * net(x_t / 0.5, t), t)
    found = torch.autograd.grad(rollout(net, PROCESS, z, TIMES, fresh).square().sum(), list(net.parameters()))
    for one, other in zip(found, torch.autograd.grad(last.square().sum(), list(net.parameters())), strict=True):
        close(one, other)


def test_the_joint_loss_rests_where_all_is_right() -> None:
    """The exact student with the exact fake score: nothing moves."""
    z, *fresh = noises(8)
    _, noise, t = batch(8)
    x0 = rollout(lambda x, time: GAUSSIAN.F_consistency(x, time), PROCESS, z, TIMES, fresh)
    loss = vsd_loss(x0, PROCESS, noise, t, teacher=GAUSSIAN.velocity, fake=GAUSSIAN.velocity)
    close(loss.value, torch.zeros_like(loss.value))


def test_the_fake_score_is_weighted_by_time() -> None:
    net, (x0, noise, _) = student(), batch(8)
    for time in (0.2, 1.3):
        t = torch.full((8,), time, dtype=torch.float64)
        plain = diffusion_loss(net, PROCESS, x0, noise, t).value
        close(fake_score_loss(net, PROCESS, x0, noise, t).value, plain / torch.sin(t[0]) ** 2)


def test_times_of_rollouts_cycle() -> None:
    drawn = [rollout_times(PROCESS, i, 4, generator(i)) for i in range(8)]
    assert [len(times) for times in drawn] == [1, 2, 3, 4] * 2
    for times in drawn:
        assert times[0] == PROCESS.t_max
        assert all(0 < s < t for t, s in itertools.pairwise(times))
    with pytest.raises(UserError, match="rollouts"):
        rollout_times(PROCESS, 0, 0, generator())
