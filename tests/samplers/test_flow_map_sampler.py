"""The sampler of flow maps: its ends are the samplers of before, and between them exact jumps stay exact."""

import math

import pytest
import torch
from torch import Tensor

from oracles.gaussian import GaussianOracle
from oracles.jumps import ExactJumps
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.samplers import (
    consistency_sample,
    consistency_times,
    meanflow_sample,
    meanflow_times,
    multistep_sample,
    network_velocity,
)
from trigflow.samplers.flow_map import flow_map_sample, landing, search_times_and_gamma, segment_times

PROCESS = TrigFlow(sigma_data=0.5)
VARIANCES = torch.tensor([0.02, 0.25, 1.5], dtype=torch.float64)
VELOCITY = network_velocity(ExactJumps(VARIANCES), PROCESS)


def noise(n: int, seed: int = 0) -> Tensor:
    return PROCESS.sample_noise(torch.empty(n, 3, dtype=torch.float64), torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_ends_are_the_samplers_of_before(steps: int) -> None:
    z, times = noise(20), meanflow_times(PROCESS, steps)
    close(flow_map_sample(VELOCITY, PROCESS, z, times), meanflow_sample(VELOCITY, PROCESS, z, times))
    close(
        flow_map_sample(VELOCITY, PROCESS, z, segment_times(PROCESS, steps)),
        multistep_sample(VELOCITY, PROCESS, z, steps),
    )
    velocity = network_velocity(GaussianOracle(VARIANCES).student(), PROCESS)
    times, fresh = consistency_times(PROCESS, steps), [noise(20, k) for k in range(1, steps)]
    close(
        flow_map_sample(velocity, PROCESS, z, times, gamma=1.0, fresh=fresh),
        consistency_sample(velocity, PROCESS, z, times, fresh=fresh),
    )
    one, other = (torch.Generator().manual_seed(5) for _ in range(2))
    close(
        flow_map_sample(velocity, PROCESS, z, times, gamma=1.0, generator=one),
        consistency_sample(velocity, PROCESS, z, times, other),
    )


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
def test_noise_leads_back_to_the_time(gamma: float) -> None:
    for t in (1e-6, 0.4, 1.1, PROCESS.t_max):
        end, keep, add = landing(t, gamma)
        assert math.tan(end) == pytest.approx(math.sqrt(1 - gamma**2) * math.tan(t), rel=1e-9)
        assert keep == pytest.approx(math.cos(t) / math.cos(end), rel=1e-9)
        assert add**2 == pytest.approx(math.sin(t) ** 2 - math.cos(t) ** 2 * math.tan(end) ** 2, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_samples_have_the_variances_of_the_data(gamma: float) -> None:
    times = consistency_times(PROCESS, 3)
    x0 = flow_map_sample(
        VELOCITY, PROCESS, noise(40_000), times, gamma=gamma, generator=torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(x0.var(0), VARIANCES, rtol=0.03, atol=0)


def test_the_search_covers_gamma() -> None:
    def score(times: tuple[float, ...], gamma: float) -> float:
        return (times[1] - 0.9) ** 2 + (gamma - 0.5) ** 2

    found, gamma = search_times_and_gamma(score, PROCESS, 2)
    assert gamma == 0.5
    assert found.times[1] == pytest.approx(0.9, abs=0.01)
    assert len(found.trials) <= 48
    assert search_times_and_gamma(lambda times, gamma: 1.0, PROCESS, 1)[0].times == (PROCESS.t_max,)


def test_bad_arguments() -> None:
    z = noise(2)
    for times in ((), (0.5, 0.5), (2.0,), (0.5, 0.0)):
        with pytest.raises(UserError, match="times"):
            flow_map_sample(VELOCITY, PROCESS, z, times)
    with pytest.raises(UserError, match="gamma"):
        flow_map_sample(VELOCITY, PROCESS, z, (1.0,), gamma=1.5)
    with pytest.raises(UserError, match="generator"):
        flow_map_sample(VELOCITY, PROCESS, z, (1.0, 0.5), gamma=0.5)
    with pytest.raises(UserError, match="fresh"):
        flow_map_sample(VELOCITY, PROCESS, z, (1.0, 0.5), gamma=0.5, fresh=[])
    with pytest.raises(UserError, match="gammas"):
        search_times_and_gamma(lambda times, gamma: 0.0, PROCESS, 2, gammas=())
