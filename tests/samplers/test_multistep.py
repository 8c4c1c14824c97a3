"""The multistep sampler and the velocity of a network that is told the end of a jump."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.gaussian import GaussianOracle
from oracles.jumps import ExactJumps
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.samplers import consistency_sample, multistep_sample, network_velocity
from trigflow.segments import segment_ends

PROCESS = TrigFlow(sigma_data=0.5)
VARIANCES = torch.tensor([0.02, 0.25, 1.5], dtype=torch.float64)
ORACLE = GaussianOracle(VARIANCES)
VELOCITY = network_velocity(ExactJumps(VARIANCES), PROCESS)
COUNTS = (1, 2, 3, 4, 8, 16)


def noise(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return PROCESS.sample_noise(torch.empty(n, 3, dtype=dtype), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("segments", COUNTS)
def test_exact_jumps_draw_exact_samples(segments: int) -> None:
    z = noise(50)
    x0 = multistep_sample(VELOCITY, PROCESS, z, segments)
    torch.testing.assert_close(x0, ORACLE.consistency(z, PROCESS.t_max), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("segments", COUNTS)
def test_samples_are_gaussian_with_the_variances_of_the_data(segments: int) -> None:
    x0 = multistep_sample(VELOCITY, PROCESS, noise(40_000), segments)
    torch.testing.assert_close(x0.var(0), VARIANCES, rtol=0.03, atol=0)
    kurtosis = (x0 / x0.std(0)).pow(4).mean(0)
    torch.testing.assert_close(kurtosis, torch.full((3,), 3.0, dtype=torch.float64), rtol=0, atol=0.15)


def test_one_segment_is_one_step_of_a_consistency_model() -> None:
    z = noise(20, dtype=torch.float32)
    velocity = network_velocity(ORACLE.student(), PROCESS)
    expected = consistency_sample(velocity, PROCESS, z, (PROCESS.t_max,))
    assert torch.equal(multistep_sample(velocity, PROCESS, z, 1), expected)


def test_the_velocity_of_the_diffusion_model_gives_steps_of_ddim() -> None:
    """With the same velocity for every end: `x_s = cos(t - s) x_t - sin(t - s) v`."""
    z = noise(7)
    x, times = z, [PROCESS.t_max, *reversed(segment_ends(4)[:-1])]
    for t, s in pairwise(times):
        x = PROCESS.ddim_step(x, ORACLE.velocity(x, t), t, s)
    drawn = multistep_sample(lambda x, t, end: ORACLE.velocity(x, t), PROCESS, z, 4)
    torch.testing.assert_close(drawn, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("segments", [1, 2, 5])
def test_one_evaluation_a_segment_without_gradient_or_randomness(segments: int) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    scale, state, z = torch.ones((), requires_grad=True), torch.random.get_rng_state(), noise(2, dtype=torch.float32)

    def velocity(x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        seen.append((t, end))
        return scale * VELOCITY(x, t, end)

    x0 = multistep_sample(velocity, PROCESS, z, segments)
    assert not x0.requires_grad
    assert torch.equal(x0, multistep_sample(VELOCITY, PROCESS, z, segments))
    assert torch.equal(torch.random.get_rng_state(), state)
    ends = segment_ends(segments)
    assert [t[1].item() for t, _ in seen] == pytest.approx([PROCESS.t_max, *ends[-2:0:-1]])
    assert [end[1].item() for _, end in seen] == pytest.approx(ends[-2::-1])
    assert all(time.shape == (2,) and time.dtype == torch.float32 for pair in seen for time in pair)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_noise_is_computed_in_float32_and_left_alone(dtype: torch.dtype) -> None:
    z = noise(4).to(dtype)
    before = z.clone()
    x0 = multistep_sample(VELOCITY, PROCESS, z, 2)
    assert x0.dtype == torch.float32
    assert torch.equal(z, before)
    assert torch.equal(x0, multistep_sample(VELOCITY, PROCESS, z.float(), 2))


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"^0 segments of the quarter circle; expected at least 1; raise segments$"):
        multistep_sample(VELOCITY, PROCESS, noise(2), 0)
    with pytest.raises(UserError, match=r"^400 segments .*; expected it to begin below t_max = 1\.5645; use fewer"):
        multistep_sample(VELOCITY, PROCESS, noise(2), 400)


# The end, passed on by network_velocity ----------------------------------------------------------------------------------


class Recorder(nn.Module):
    def __init__(self, takes_end: bool | None) -> None:
        super().__init__()
        if takes_end is not None:
            self.takes_end = takes_end

    def forward(self, x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        self.rest = rest
        return x


def test_a_network_that_takes_the_end_is_told_it() -> None:
    network, x, t = Recorder(True), noise(3), torch.tensor([0.3, 0.9, 1.5], dtype=torch.float64)
    velocity, end = network_velocity(network, PROCESS), torch.tensor([0.0, 0.5, 1.2], dtype=torch.float64)
    torch.testing.assert_close(velocity(x, t, end), x)
    assert network.rest[:2] == (None, None)
    assert network.rest[2] is end
    velocity(x, t)
    assert network.rest[2] is t  # a jump of no length


@pytest.mark.parametrize("takes_end", [None, False])
def test_a_network_that_does_not_is_not(takes_end: bool | None) -> None:
    network, x, t = Recorder(takes_end), noise(3), torch.full((3,), 0.5, dtype=torch.float64)
    velocity = network_velocity(network, PROCESS, label=2)
    velocity(x, t, t / 2)
    assert len(network.rest) == 2
    velocity(x, t)
    assert len(network.rest) == 2


def test_the_velocity_at_an_end_of_its_own_is_that_of_the_ode() -> None:
    """The limit of ever shorter jumps, with the exact network."""
    x, t = noise(3), torch.tensor([0.3, 0.9, 1.5], dtype=torch.float64)
    torch.testing.assert_close(VELOCITY(x, t), ORACLE.velocity(x, t), rtol=1e-12, atol=1e-12)
    assert math.isfinite(VELOCITY(x, torch.zeros_like(t)).sum())
