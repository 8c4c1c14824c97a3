"""Jumps to the next time without noise between them, as of average velocities, against the exact flow of Gaussian data."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from oracles.gaussian import GaussianOracle
from trigflow.process import HALF_PI, TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.samplers import flow_map_sample, meanflow_times

PROCESS = TrigFlow()
GAUSSIAN = GaussianOracle(torch.tensor([0.02, 0.25, 1.5], dtype=torch.float64))


def exact(x: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """`v` with `cos(t - s) x_t - sin(t - s) v = x_t sqrt(V(s) / V(t))`."""
    moved = x * torch.sqrt(GAUSSIAN.variance(x, end) / GAUSSIAN.variance(x, t))
    d = (t - end)[:, None]
    return (torch.cos(d) * x - moved) / torch.sin(d)


def noise(n: int = 16) -> Tensor:
    return PROCESS.sample_noise(torch.empty(n, 3, dtype=torch.float64), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_exact_jumps_are_exact_in_any_number_of_steps(steps: int) -> None:
    z, calls = noise(), []

    def velocity(x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        calls.append((x.shape, t, end))
        return exact(x, t, end)

    drawn = flow_map_sample(velocity, PROCESS, z, meanflow_times(PROCESS, steps))
    torch.testing.assert_close(drawn, GAUSSIAN.consistency(z, PROCESS.t_max), rtol=1e-10, atol=1e-10)
    assert [shape for shape, _, _ in calls] == [z.shape] * steps
    assert all(t.shape == end.shape == (16,) and t.dtype == z.dtype for _, t, end in calls)
    assert all(torch.equal(end, later[1]) for (_, _, end), later in pairwise(calls))
    assert bool((calls[-1][2] == 0).all())


def test_the_steps_of_the_paper() -> None:
    """`z_r = z_tau - (tau - r) u` on the straight path, with a velocity of no special form."""
    z, times = noise(), (1.4, 0.9, 0.2)

    def velocity(x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        return torch.sin(3 * x) + (t - 2 * end)[:, None]

    def path(t: float) -> tuple[float, float]:
        m = math.cos(t) + math.sin(t)
        return m, math.sin(t) / m

    point = z / path(times[0])[0]
    for t, end in zip(times, [*times[1:], 0.0], strict=True):
        (m, tau), r = path(t), path(end)[1]
        v = velocity(m * point, torch.full((16,), t).double(), torch.full((16,), end).double())
        u = (math.sin(t) - math.cos(t)) * m * point + m * v
        point = point - (tau - r) * u
    drawn = flow_map_sample(velocity, PROCESS, z, times)
    torch.testing.assert_close(drawn, point, rtol=1e-6, atol=1e-6)


def test_half_precision_noise_is_computed_in_single() -> None:
    z = noise().bfloat16()
    drawn = flow_map_sample(lambda x, t, end: exact(x, t, end), PROCESS, z, meanflow_times(PROCESS, 4))
    assert drawn.dtype == torch.float32
    expected = GAUSSIAN.consistency(z.double(), PROCESS.t_max)
    torch.testing.assert_close(drawn.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("times", [(), (0.5, 0.5), (0.5, 1.0), (0.5, 0.0), (HALF_PI + 0.01,), (1.0, -0.1), (math.nan,)])
def test_times_must_decrease_inside_the_quarter_circle(times: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"expected one or more decreasing times in \(0, pi/2\]; use meanflow_times"):
        flow_map_sample(exact, PROCESS, noise(), times)
