"""Editing against what it must keep, and against Gaussian data, where what it draws has a closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oracles.gaussian import GaussianOracle
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.samplers import consistency_times, flow_map_sample, heun, network_velocity, sigma_grid
from trigflow.samplers.editing import LUMINANCE, Edit, Known, Noise, Sampler, blocks, gray, outside, spherical, weighed

PROCESS = TrigFlow(sigma_data=0.5)
SD = PROCESS.sigma_data
N = 40_000


def noises(*shape: int, seed: int = 0) -> Noise:
    def noise(k: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 * seed + k)
        return SD * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return noise


def few_steps(times: tuple[float, ...], gamma: float = 1.0) -> Sampler:
    return lambda velocity, noise: flow_map_sample(
        velocity, PROCESS, noise(0), times, gamma=gamma, fresh=[noise(k) for k in range(1, len(times))] if gamma else None
    )


def drawn(edit: Edit, velocity: Callable[..., Tensor], schedule: tuple[float, ...], noise: Noise, gamma: float = 1.0) -> Tensor:
    times = edit.times(schedule)
    return edit.around(few_steps(times, gamma), PROCESS, times[0])(velocity, noise)


class Correlated:
    """Two coordinates, the axes of whose Gaussian are turned by 45 degrees, and their consistency function, which is linear."""

    variances = torch.tensor([0.4, 0.02], dtype=torch.float64)
    axes = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) * math.sqrt(0.5)

    def matrix(self, t: float) -> Tensor:
        """f(x, t) = M x."""
        V = math.cos(t) ** 2 * self.variances + math.sin(t) ** 2 * SD**2
        return self.axes @ torch.diag((self.variances / V).sqrt()) @ self.axes.T

    def velocity(self, x: Tensor, t: Tensor, *end: Tensor) -> Tensor:
        time = float(t[0])
        return (math.cos(time) * x - x @ self.matrix(time).T) / math.sin(time)

    def chain(self, y: float, times: tuple[float, ...]) -> tuple[float, float]:
        """Mean and variance of the second coordinate, where the first is y and taken from there at every step (algorithm 4)."""
        mean, variance = 0.0, 0.0
        for k, t in enumerate(times):
            M, c, s = self.matrix(t), math.cos(t), math.sin(t)
            before = c**2 * variance + (s**2 if k else 1.0) * SD**2  # from noise alone at first
            mean = float(M[1, 0] * c * y + M[1, 1] * c * mean)
            variance = float(M[1, 0] ** 2 * s**2 * SD**2 + M[1, 1] ** 2 * before)
        return mean, variance

    def expected(self, y: float) -> float:
        """Mean of the second coordinate given the first."""
        covariance = self.axes @ torch.diag(self.variances) @ self.axes.T
        return float(covariance[1, 0] / covariance[0, 0] * y)


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_inpainting_of_a_gaussian_is_the_chain_of_algorithm_4(steps: int) -> None:
    oracle, y, times = Correlated(), 0.7, consistency_times(PROCESS, steps)
    edit = Edit(torch.tensor([[y, 99.0]], dtype=torch.float64), 1.0, outside(torch.tensor([[False, True]])))
    x = drawn(edit, oracle.velocity, times, noises(N, 2))
    mean, variance = oracle.chain(y, times)
    assert (x[:, 0] == y).all()
    assert x[:, 1].mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / N))
    assert x[:, 1].var().item() == pytest.approx(variance, rel=0.04)


def test_with_steps_what_is_drawn_comes_to_fit_what_is_known() -> None:
    oracle, y = Correlated(), 0.7
    far = [abs(oracle.chain(y, consistency_times(PROCESS, steps))[0] - oracle.expected(y)) for steps in (1, 2, 8)]
    assert far[0] > far[1] > far[2]


@pytest.mark.parametrize("strength", [0.2, 0.6, 0.9])
def test_picture_to_picture_of_a_gaussian_has_its_mean_and_variance(strength: float) -> None:
    variances = torch.tensor([0.02, 1.5], dtype=torch.float64)
    velocity = network_velocity(GaussianOracle(variances).student(), PROCESS)
    y = torch.tensor([[0.3, -0.8]], dtype=torch.float64)
    x = drawn(Edit(y, strength), velocity, (PROCESS.t_max,), noises(N, 2))
    t = strength * PROCESS.t_max
    V = math.cos(t) ** 2 * variances + math.sin(t) ** 2 * SD**2
    mean, variance = (variances / V).sqrt() * math.cos(t) * y[0], variances / V * math.sin(t) ** 2 * SD**2
    assert ((x.mean(0) - mean).abs() < 5 * (variance / N).sqrt()).all()
    torch.testing.assert_close(x.var(0), variance, rtol=0.04, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_known_part_is_on_its_way_at_every_time(gamma: float) -> None:
    """The network sees `cos(t) y + sin(t) z` there, with noise z of deviation sd."""
    y, seen = torch.tensor([[0.7, 99.0]], dtype=torch.float64), []
    oracle = Correlated()

    def velocity(x: Tensor, t: Tensor, *end: Tensor) -> Tensor:
        seen.append((float(t[0]), x[:, 0]))
        return oracle.velocity(x, t)

    drawn(Edit(y, 1.0, outside(torch.tensor([[False, True]]))), velocity, (1.5, 1.0, 0.4), noises(N, 2), gamma)
    for t, x in seen:
        z = (x - math.cos(t) * 0.7) / math.sin(t)
        assert z.mean().item() == pytest.approx(0, abs=0.02)
        assert z.std().item() == pytest.approx(SD, rel=0.03)
    if gamma == 0:  # one noise, all the way
        z = [(x - math.cos(t) * 0.7) / math.sin(t) for t, x in seen]
        torch.testing.assert_close(z[0], z[2])


def test_solvers_keep_the_known_and_draw_the_rest() -> None:
    variances = torch.tensor([0.02, 1.5], dtype=torch.float64)
    velocity = network_velocity(GaussianOracle(variances).teacher(), PROCESS)
    edit = Edit(torch.tensor([[0.3, 0.0]], dtype=torch.float64), 1.0, outside(torch.tensor([[False, True]])))
    grid = sigma_grid(PROCESS, 18).tolist()
    x = edit.around(lambda v, noise: heun(v, noise(0), edit.times(grid)), PROCESS, grid[0])(velocity, noises(N, 2))
    assert (x[:, 0] == 0.3).all()
    assert x[:, 1].var().item() == pytest.approx(1.5, rel=0.04)


def test_strength_one_is_sampling_and_none_is_the_picture() -> None:
    oracle, noise = Correlated(), noises(5, 2)
    y, times = torch.tensor([[0.4, -0.2]], dtype=torch.float64), (1.5, 0.9)
    assert torch.equal(drawn(Edit(y), oracle.velocity, times, noise), few_steps(times)(oracle.velocity, noise))
    errors = [(drawn(Edit(y, s), oracle.velocity, times, noise) - y).abs().max().item() for s in (0.1, 0.01, 1e-4)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_a_strength_leaves_the_later_times() -> None:
    y, grid = torch.zeros(1, 2), (1.5, 1.0, 0.5)
    assert Edit(y).times(grid) == grid
    assert Edit(y, 0.8).times(grid) == (0.8 * 1.5, 1.0, 0.5)
    assert Edit(y, 0.5).times(grid) == (0.75, 0.5)
    assert Edit(y, 0.1).times(grid) == (0.1 * 1.5,)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, math.nan, math.inf])
def test_a_strength_out_of_range(strength: float) -> None:
    with pytest.raises(UserError, match=r"^strength .*; expected .*; correct"):
        Edit(torch.zeros(1, 2), strength)


BLACK, WHITE = torch.full((1, 3, 4, 4), -1.0), torch.full((1, 3, 4, 4), 1.0)


def parts() -> dict[str, tuple[Known, Callable[[Tensor], Tensor]]]:
    """Every kind of knowledge, and by itself what is known of a picture."""
    weights = torch.tensor(LUMINANCE)[:, None, None]
    mask = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    return {
        "mask": (outside(mask), lambda x: x.masked_fill(mask, 0)),
        "gray": (gray(BLACK, WHITE), lambda x: (weights * x).sum(1, keepdim=True)),
        "blocks": (blocks(2, BLACK, WHITE), lambda x: F.avg_pool2d(x, 2)),
    }


@pytest.mark.parametrize("kind", ["mask", "gray", "blocks"])
def test_known_parts_are_orthogonal_projections(kind: str) -> None:
    known, of = parts()[kind]
    x, y, other = (torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(k)) for k in range(3))
    part = known.put(torch.zeros_like(x), x)
    torch.testing.assert_close(of(known.put(x, y)), of(y))
    torch.testing.assert_close(known.put(torch.zeros_like(x), part), part)
    rest = other - known.put(torch.zeros_like(x), other)
    assert (part * rest).sum().abs() < 1e-4
    assert rest.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["gray", "blocks"])
def test_what_is_known_outlasts_the_range_of_bytes(kind: str) -> None:
    known, of = parts()[kind]
    g = torch.Generator().manual_seed(0)
    y = 2 * torch.rand(5, 1, 4, 4, generator=g) - 1
    y = (y if kind == "gray" else F.avg_pool2d(y, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)).repeat(1, 3, 1, 1)
    y[0], y[1] = -1, 1
    wild = 3 * torch.randn(5, 3, 4, 4, generator=g)
    x = known.finish(wild, y)
    assert x.abs().max() <= 1 + 1e-5
    torch.testing.assert_close(of(x.clamp(-1, 1)), of(y), rtol=0, atol=1e-5)
    assert torch.equal(x[:2], y[:2])  # black and white are all there is of their luminance and mean
    tame = y + 0.01 * torch.randn(y.shape, generator=g)
    inside = (y.abs() < 0.9).expand_as(y).all(1, keepdim=True)
    torch.testing.assert_close((known.finish(tame, y) - known.put(tame, y)) * inside, torch.zeros_like(y), rtol=0, atol=1e-6)


def test_noise_between_noises_is_as_likely() -> None:
    one, other = (noises(N, 2, seed=k)(0) for k in (1, 2))
    assert torch.equal(spherical(one, other, 0), one)
    assert torch.equal(spherical(one, other, 1), other)
    for share in (0.25, 0.5, 0.8):
        assert spherical(one, other, share).std().item() == pytest.approx(SD, rel=0.02)
    with pytest.raises(UserError, match="from 0 to 1"):
        spherical(one, other, 1.5)


def test_weighed_velocities_are_those_of_the_weighed_data() -> None:
    x, t, at = torch.randn(4, 2), torch.full((4,), 0.7), [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])]
    velocities = [
        (w, lambda x, t, y=y: PROCESS.convert(y.expand_as(x), x, t, "x0", "velocity"))
        for w, y in zip((0.25, 0.75), at, strict=True)
    ]
    x0 = PROCESS.denoise(x, weighed(velocities)(x, t), t)
    torch.testing.assert_close(x0, torch.tensor([0.25, 2.25]).expand(4, 2))
    assert weighed(velocities[:1]) is velocities[0][1]
