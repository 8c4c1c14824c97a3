"""Jumps to 0 with fresh noise between them (`gamma=1`): consistency sampling."""

import math

import pytest
import torch
from torch import Tensor

from oracles.gaussian import GaussianOracle
from trigflow.process import HALF_PI, TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.samplers import consistency_times, flow_map_sample, network_velocity

PROCESS = TrigFlow(sigma_data=0.5)
VARIANCES = torch.tensor([0.02, 0.25, 1.5], dtype=torch.float64)
ORACLE = GaussianOracle(VARIANCES)
VELOCITY = network_velocity(ORACLE.student(), PROCESS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return PROCESS.sample_noise(torch.empty(n, 3, dtype=dtype), generator(seed))


def test_one_step_is_the_exact_map_from_noise_to_data() -> None:
    z = noise(50)
    x0 = flow_map_sample(VELOCITY, PROCESS, z, consistency_times(PROCESS, 1), gamma=1.0)
    torch.testing.assert_close(x0, ORACLE.consistency(z, PROCESS.t_max), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_exact_model_keeps_the_marginal_in_any_number_of_steps(steps: int) -> None:
    x0 = flow_map_sample(VELOCITY, PROCESS, noise(40_000), consistency_times(PROCESS, steps), gamma=1.0, generator=generator(1))
    torch.testing.assert_close(x0.var(0), VARIANCES, rtol=0.03, atol=0)
    torch.testing.assert_close(x0.mean(0) / VARIANCES.sqrt(), torch.zeros(3, dtype=torch.float64), rtol=0, atol=0.02)
    kurtosis = (x0 / x0.std(0)).pow(4).mean(0)
    torch.testing.assert_close(kurtosis, torch.full((3,), 3.0, dtype=torch.float64), rtol=0, atol=0.15)


def test_two_steps_follow_the_formula() -> None:
    z, fresh = noise(6), noise(6, seed=9)
    first = ORACLE.consistency(z, PROCESS.t_max)
    expected = ORACLE.consistency(math.cos(1.1) * first + math.sin(1.1) * fresh, 1.1)
    x0 = flow_map_sample(VELOCITY, PROCESS, z, consistency_times(PROCESS, 2), gamma=1.0, fresh=[fresh])
    torch.testing.assert_close(x0, expected, rtol=1e-10, atol=1e-12)


def test_second_step_forgets_part_of_the_error_of_the_first() -> None:
    """A first step that shrinks its samples: the second leaves `cos^2(t) l / V(t)` of the error in the variance."""
    shrink, t_mid = 0.8, 1.1

    def velocity(x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        f = ORACLE.consistency(x, t) * (shrink if t[0] > 1.5 else 1.0)
        return (torch.cos(t)[:, None] * x - f) / torch.sin(t)[:, None]

    samples = flow_map_sample(velocity, PROCESS, noise(40_000), (PROCESS.t_max, t_mid), gamma=1.0, generator=generator(1))
    left = math.cos(t_mid) ** 2 * VARIANCES / ORACLE.variance(samples, t_mid)
    torch.testing.assert_close(samples.var(0) / VARIANCES, 1 - left * (1 - shrink**2), rtol=0.03, atol=0)


def test_generator_decides_the_fresh_noise() -> None:
    z, times = noise(5), consistency_times(PROCESS, 3)
    first, again, other = (flow_map_sample(VELOCITY, PROCESS, z, times, gamma=1.0, generator=generator(s)) for s in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    g = generator(4)
    fresh = [PROCESS.sample_noise(z, g), PROCESS.sample_noise(z, g)]
    assert torch.equal(first, flow_map_sample(VELOCITY, PROCESS, z, times, gamma=1.0, fresh=fresh))


def test_random_numbers_come_from_nowhere_else() -> None:
    z, state = noise(5), torch.random.get_rng_state()
    flow_map_sample(VELOCITY, PROCESS, z, consistency_times(PROCESS, 3), gamma=1.0, generator=generator(4))
    assert torch.equal(torch.random.get_rng_state(), state)
    g = generator(4)
    flow_map_sample(VELOCITY, PROCESS, z, consistency_times(PROCESS, 1), gamma=1.0, generator=g)
    assert torch.equal(g.get_state(), generator(4).get_state())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_one_evaluation_a_step_and_no_gradient(steps: int) -> None:
    seen: list[Tensor] = []
    scale = torch.ones((), requires_grad=True)

    def velocity(x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        seen.append(t)
        assert bool((end == 0).all())
        return scale * VELOCITY(x, t, end)

    times = consistency_times(PROCESS, steps)
    x0 = flow_map_sample(velocity, PROCESS, noise(2, dtype=torch.float32), times, gamma=1.0, generator=generator())
    assert not x0.requires_grad
    assert all(t.shape == (2,) and t.dtype == torch.float32 for t in seen)
    assert [t[0].item() for t in seen] == pytest.approx(list(times))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_noise_is_computed_in_float32_and_left_alone(dtype: torch.dtype) -> None:
    z = noise(4).to(dtype)
    before = z.clone()
    x0 = flow_map_sample(VELOCITY, PROCESS, z, consistency_times(PROCESS, 2), gamma=1.0, fresh=[z])
    assert x0.dtype == torch.float32
    assert torch.equal(z, before)
    exact = flow_map_sample(VELOCITY, PROCESS, z.float(), consistency_times(PROCESS, 2), gamma=1.0, fresh=[z.float()])
    assert torch.equal(x0, exact)


def test_times_may_be_a_tensor() -> None:
    z, times = noise(4), consistency_times(PROCESS, 2)
    from_tensor = flow_map_sample(
        VELOCITY, PROCESS, z, torch.tensor(times, dtype=torch.float64), gamma=1.0, generator=generator(2)
    )
    assert torch.equal(from_tensor, flow_map_sample(VELOCITY, PROCESS, z, times, gamma=1.0, generator=generator(2)))


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [(), (0.0,), (1.5, 0.0), (1.0, 1.1), (1.1, 1.1), (1.6,), (1.5, math.nan, 0.5), (-0.1,)])
def test_times_must_decrease_within_the_quarter_circle(times: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"times \(.*\); expected one or more decreasing times in \(0, pi/2\]; .+"):
        flow_map_sample(VELOCITY, PROCESS, noise(2), times, gamma=1.0, generator=generator())


def test_start_at_half_pi_is_allowed() -> None:
    z = noise(3)
    x0 = flow_map_sample(VELOCITY, PROCESS, z, (HALF_PI,), gamma=1.0)
    torch.testing.assert_close(x0, z * VARIANCES.sqrt() / 0.5, rtol=1e-9, atol=1e-12)


def test_several_steps_need_a_source_of_noise() -> None:
    with pytest.raises(UserError, match=r"no source of fresh noise for 2 steps; .*; pass generator"):
        flow_map_sample(VELOCITY, PROCESS, noise(2), consistency_times(PROCESS, 2), gamma=1.0)


@pytest.mark.parametrize("shapes", [[], [(2, 3), (2, 3)], [(1, 3)]])
def test_fresh_noise_must_fit(shapes: list[tuple[int, ...]]) -> None:
    fresh = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(UserError, match=r"fresh noise of shapes .*; expected 1 tensors of shape \(2, 3\)"):
        flow_map_sample(VELOCITY, PROCESS, noise(2), consistency_times(PROCESS, 2), gamma=1.0, fresh=fresh)
