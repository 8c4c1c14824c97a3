"""Jumps from segment to segment without noise between them: multistep students."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from oracles.gaussian import GaussianOracle
from oracles.jumps import ExactJumps
from trigflow.process import TrigFlow
from trigflow.samplers import flow_map_sample, network_velocity, segment_times
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
    x0 = flow_map_sample(VELOCITY, PROCESS, z, segment_times(PROCESS, segments))
    torch.testing.assert_close(x0, ORACLE.consistency(z, PROCESS.t_max), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("segments", COUNTS)
def test_samples_are_gaussian_with_the_variances_of_the_data(segments: int) -> None:
    x0 = flow_map_sample(VELOCITY, PROCESS, noise(40_000), segment_times(PROCESS, segments))
    torch.testing.assert_close(x0.var(0), VARIANCES, rtol=0.03, atol=0)
    kurtosis = (x0 / x0.std(0)).pow(4).mean(0)
    torch.testing.assert_close(kurtosis, torch.full((3,), 3.0, dtype=torch.float64), rtol=0, atol=0.15)


def test_the_velocity_of_the_diffusion_model_gives_steps_of_ddim() -> None:
    """With the same velocity for every end: `x_s = cos(t - s) x_t - sin(t - s) v`."""
    z = noise(7)
    x, times = z, [PROCESS.t_max, *reversed(segment_ends(4)[:-1])]
    for t, s in pairwise(times):
        x = PROCESS.ddim_step(x, ORACLE.velocity(x, t), t, s)
    drawn = flow_map_sample(lambda x, t, end: ORACLE.velocity(x, t), PROCESS, z, segment_times(PROCESS, 4))
    torch.testing.assert_close(drawn, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("segments", [1, 2, 5])
def test_one_evaluation_a_segment_without_gradient_or_randomness(segments: int) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    scale, state, z = torch.ones((), requires_grad=True), torch.random.get_rng_state(), noise(2, dtype=torch.float32)

    def velocity(x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        seen.append((t, end))
        return scale * VELOCITY(x, t, end)

    x0 = flow_map_sample(velocity, PROCESS, z, segment_times(PROCESS, segments))
    assert not x0.requires_grad
    assert torch.equal(x0, flow_map_sample(VELOCITY, PROCESS, z, segment_times(PROCESS, segments)))
    assert torch.equal(torch.random.get_rng_state(), state)
    ends = segment_ends(segments)
    assert [t[1].item() for t, _ in seen] == pytest.approx([PROCESS.t_max, *ends[-2:0:-1]])
    assert [end[1].item() for _, end in seen] == pytest.approx(ends[-2::-1])
    assert all(time.shape == (2,) and time.dtype == torch.float32 for pair in seen for time in pair)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_noise_is_computed_in_float32_and_left_alone(dtype: torch.dtype) -> None:
    z = noise(4).to(dtype)
    before = z.clone()
    x0 = flow_map_sample(VELOCITY, PROCESS, z, segment_times(PROCESS, 2))
    assert x0.dtype == torch.float32
    assert torch.equal(z, before)
    assert torch.equal(x0, flow_map_sample(VELOCITY, PROCESS, z.float(), segment_times(PROCESS, 2)))
