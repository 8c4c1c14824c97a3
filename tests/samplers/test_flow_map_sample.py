"""The sampler of flow maps with any share of fresh noise: exact jumps stay exact."""

import math

import pytest
import torch
from torch import Tensor

from oracles.jumps import ExactJumps
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.samplers import consistency_times, flow_map_sample, network_velocity
from trigflow.samplers.flow_map import landing

PROCESS = TrigFlow(sigma_data=0.5)
VARIANCES = torch.tensor([0.02, 0.25, 1.5], dtype=torch.float64)
VELOCITY = network_velocity(ExactJumps(VARIANCES), PROCESS)


def noise(n: int, seed: int = 0) -> Tensor:
    return PROCESS.sample_noise(torch.empty(n, 3, dtype=torch.float64), torch.Generator().manual_seed(seed))


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
    x0 = flow_map_sample(VELOCITY, PROCESS, noise(40_000), times, gamma=gamma, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(x0.var(0), VARIANCES, rtol=0.03, atol=0)


def test_bad_arguments() -> None:
    z = noise(2)
    for times in ((), (0.5, 0.5), (2.0,), (0.5, 0.0)):
        with pytest.raises(UserError, match="times"):
            flow_map_sample(VELOCITY, PROCESS, z, times)
    for gamma in (1.5, -0.1, math.nan):
        with pytest.raises(UserError, match=r"^gamma=.*; expected a number in \[0, 1\]; "):
            flow_map_sample(VELOCITY, PROCESS, z, (1.0,), gamma=gamma)
    with pytest.raises(UserError, match="generator"):
        flow_map_sample(VELOCITY, PROCESS, z, (1.0, 0.5), gamma=0.5)
    with pytest.raises(UserError, match="fresh"):
        flow_map_sample(VELOCITY, PROCESS, z, (1.0, 0.5), gamma=0.5, fresh=[])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_network_is_told_where_its_jumps_end(gamma: float) -> None:
    z, times, seen = noise(2), (1.5, 1.0, 0.4), []

    def velocity(x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        seen.append((t[1].item(), end[1].item()))
        return VELOCITY(x, t, end)

    flow_map_sample(velocity, PROCESS, z, times, gamma=gamma, fresh=[noise(2, 1), noise(2, 2)])
    assert [t for t, _ in seen] == pytest.approx(list(times))
    ends = [math.atan(math.sqrt(1 - gamma**2) * math.tan(t)) for t in (1.0, 0.4)]
    assert [end for _, end in seen] == pytest.approx([*ends, 0.0])
