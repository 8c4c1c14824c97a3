"""Formulas of losses against the definitions that they were made from, and against Gaussian data, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from objectives.helpers import GAUSSIAN, PROCESS, VARIANCES, batch, generator, student
from oracles.gaussian import GaussianOracle
from trigflow.objectives import DiscreteConfig, discrete_tangent, eulerian_tangent, flow_map_loss, objective_of, vsd_direction
from trigflow.objectives.discrete import _mean_velocity

SD = PROCESS.sigma_data


def close(a: Tensor, b: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def times(n: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(x0, z, t, s)` with s below t."""
    x0, noise, t = batch(n)
    return x0, noise, t, t * (0.05 + 0.9 * torch.rand(n, generator=generator(5), dtype=t.dtype))


def test_errors_of_average_velocities_are_those_of_the_straight_path() -> None:
    """MeanFlow as published: `u - (v - (tau - r) du/dtau)` at `z_tau = (1 - tau) x0 + tau z`, in units of sd."""
    net, (x0, noise, t, s) = student(takes=("end",)), times()

    def straight(angle: Tensor) -> Tensor:
        return torch.sin(angle) / (torch.cos(angle) + torch.sin(angle))

    def u(z: Tensor, tau: Tensor) -> Tensor:
        angle = torch.atan2(tau, 1 - tau)
        cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
        x = z * (cos + sin)
        return (sin - cos) * x + (cos + sin) * SD * net(x / SD, angle, end=s)

    tau, r = straight(t), straight(s)
    point, v = (1 - tau)[:, None] * x0 + tau[:, None] * noise, noise - x0
    average, change = torch.func.jvp(u, (point, tau), (v, torch.ones_like(tau)))
    error = (average - (v - (tau - r)[:, None] * change)) / SD
    loss = flow_map_loss(net, PROCESS, x0, noise, t, s, config=objective_of("meanflow", anchor=0.0))  # type: ignore[arg-type]
    square = error.square().sum(1)
    close(loss.value, (square / (square.detach() + 1e-3)).mean())


def test_the_semi_continuous_derivative_is_exact_for_rotations() -> None:
    x0, noise, t, s = times()
    a, b = torch.randn(2, *x0.shape, generator=generator(6), dtype=x0.dtype)

    def rotation(_: Tensor, time: Tensor) -> Tensor:
        return torch.cos(time)[:, None] * a + torch.sin(time)[:, None] * b

    x, v = PROCESS.interpolate(x0, noise, t), PROCESS.velocity(x0, noise, t)
    exact, other = (eulerian_tangent(rotation, PROCESS, x, v, t, s, {}, semi_step=h)[1] for h in (0.0, 0.3))
    close(other, exact)


def test_fixed_weights_are_those_of_noise_levels() -> None:
    _, _, t, s = times()
    later, earlier = PROCESS.sigma_from_time(t), PROCESS.sigma_from_time(s)
    for weighting, expected in (("gap", 1 / (later - earlier)), ("snr", 1 / later**2 + 1 / SD**2)):
        close(DiscreteConfig(weighting=weighting).weight(PROCESS, t, s), expected)  # type: ignore[arg-type]


def test_the_discrete_tangent_is_the_difference_of_two_consistency_functions() -> None:
    x0, noise, t, s = times()
    x, u = PROCESS.interpolate(x0, noise, t), PROCESS.velocity(x0, noise, t)
    later, earlier = torch.randn(2, *x0.shape, generator=generator(7), dtype=x0.dtype)
    before = PROCESS.denoise(PROCESS.ddim_step(x, u, t, s), SD * earlier, s)
    difference = (PROCESS.denoise(x, SD * later, t) - before) / torch.sin(t - s)[:, None]
    close(discrete_tangent(PROCESS, x, u, later, earlier, t, s), difference)


def test_a_step_of_heun_is_one_rotation_and_of_second_order() -> None:
    x0, noise, t, _ = times()
    x, errors = PROCESS.interpolate(x0, noise, t), []
    for share in (0.1, 0.05):
        s = t - share * t
        step, v = (t - s)[:, None], GAUSSIAN.velocity(x, t)
        reached = PROCESS.ddim_step(x, _mean_velocity(GAUSSIAN.velocity, x, t, s, "heun"), t, s)
        close(reached, x - step / 2 * (v + GAUSSIAN.velocity(x - step * v, s)))
        variance = [torch.cos(a)[:, None] ** 2 * VARIANCES + torch.sin(a)[:, None] ** 2 * SD**2 for a in (s, t)]
        errors.append((reached - x * (variance[0] / variance[1]).sqrt()).abs().max())
    assert errors[1] < errors[0] / 6  # of one step: third order


def test_the_direction_of_distillation_is_that_of_denoised_samples() -> None:
    sample, noise, t, _ = times()
    x = PROCESS.interpolate(sample, noise, t)
    fake = GaussianOracle(2 * VARIANCES + 0.1)
    found = vsd_direction(PROCESS.velocity(sample, noise, t), GAUSSIAN.velocity(x, t), fake.velocity(x, t))
    by_teacher, by_fake = (PROCESS.denoise(x, oracle.velocity(x, t), t) for oracle in (GAUSSIAN, fake))
    close(found, (by_fake - by_teacher) / (sample - by_teacher).abs().mean(1, keepdim=True), 1e-8)
