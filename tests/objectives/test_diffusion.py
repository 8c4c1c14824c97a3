"""The diffusion loss against the exact velocity of Gaussian data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from objectives.helpers import GAUSSIAN, PROCESS, VARIANCES, batch, generator, student
from oracles.gaussian import OracleNetwork
from oracles.mixture import MixtureOracle
from trigflow.objectives import AdaptiveWeight, diffusion_loss


def irreducible(t: Tensor) -> Tensor:
    """Variance of v that x_t leaves open, per element.

    v and x_t are jointly Gaussian: `Var v = cos^2 sd^2 + sin^2 l`, `Cov(v, x_t) = sin cos (sd^2 - l)`, so with
    `V = Var x_t = cos^2 l + sin^2 sd^2`, `Var(v | x_t) = Var v - Cov^2 / V = l sd^2 / V`.
    """
    cos2, sin2 = torch.cos(t)[:, None] ** 2, torch.sin(t)[:, None] ** 2
    return (VARIANCES * 0.25 / (cos2 * VARIANCES + sin2 * 0.25)).mean(1)


def z_score(values: Tensor, expected: Tensor | float) -> float:
    """Distance of the mean of `values - expected` from zero in standard errors."""
    gap = values - expected
    return float(gap.mean().abs() / (gap.std() / len(gap) ** 0.5))


def test_exact_velocity_leaves_the_irreducible_variance() -> None:
    x0, z, t = batch(100_000)
    loss = diffusion_loss(GAUSSIAN.teacher(), PROCESS, x0, z, t)
    assert z_score(loss.figures["loss"].double(), irreducible(t)) < 4
    torch.testing.assert_close(loss.value, irreducible(t).mean(), rtol=0.01, atol=0)
    # also at the ends: everything but x0 is known at 0, everything but z at pi/2
    for time, left in ((1e-3, 0.25), (1.5698, float(VARIANCES.mean()))):
        value = diffusion_loss(GAUSSIAN.teacher(), PROCESS, x0, z, torch.full_like(t, time)).value
        torch.testing.assert_close(value, torch.tensor(left, dtype=torch.float64), rtol=0.02, atol=0)


def test_any_other_velocity_costs_the_square_of_its_distance() -> None:
    """`E || sd F - v ||^2 = irreducible + sd^2 || F - F* ||^2`: the exact velocity is the minimum."""
    x0, z, t = batch(100_000)
    exact = diffusion_loss(GAUSSIAN.teacher(), PROCESS, x0, z, t).figures["loss"].double()
    x = PROCESS.interpolate(x0, z, t) / 0.5
    for change in (lambda x, t: 0.2 * x, lambda x, t: torch.sin(3 * x) * t[:, None], lambda x, t: 0.3 + 0 * x):
        moved = OracleNetwork(lambda x, t, label, change=change: GAUSSIAN.F_velocity(x, t) + change(x, t))
        more = diffusion_loss(moved, PROCESS, x0, z, t).figures["loss"].double() - exact
        distance = 0.25 * change(x, t).square().mean(1)
        assert z_score(more, distance) < 4
        assert distance.mean() > 5 * more.std() / len(t) ** 0.5


def test_gradient_vanishes_at_the_exact_velocity() -> None:
    """Of `F = a F* + b x + c`, at a = 1, b = c = 0 within the standard error, and not elsewhere."""
    x0, z, t = batch(100_000)

    def slopes(a: float, b: float, c: float) -> Tensor:
        knobs = torch.tensor([a, b, c], dtype=torch.float64).repeat(len(t), 1).requires_grad_()

        def network(x: Tensor, t: Tensor) -> Tensor:
            return knobs[:, :1] * GAUSSIAN.F_velocity(x, t) + knobs[:, 1:2] * x + knobs[:, 2:]

        loss = diffusion_loss(network, PROCESS, x0, z, t)
        return torch.autograd.grad(loss.value * len(t), knobs)[0]

    best = slopes(1, 0, 0)
    assert all(z_score(best[:, k], 0.0) < 4 for k in range(3))
    elsewhere = slopes(0.9, 0.05, 0.05)
    assert all(z_score(elsewhere[:, k], 0.0) > 4 for k in range(3))


def test_best_weight_of_the_exact_velocity_is_minus_the_log_variance() -> None:
    """One time, so one error e: the gradient of the weight is `e exp(w) - 1`, zero at `w = -log e`."""
    x0, z, t = batch(50_000)
    t = torch.full_like(t, 0.9)
    weight = AdaptiveWeight(PROCESS).double()
    left = float(irreducible(t[:1]))
    for shift, sign in ((0.0, 0), (0.3, 1), (-0.3, -1)):
        with torch.no_grad():
            weight.linear.bias.fill_(-torch.tensor(left).log() + shift)
        loss = diffusion_loss(GAUSSIAN.teacher(), PROCESS, x0, z, t, weight=weight)
        (slope,) = torch.autograd.grad(loss.value, weight.linear.bias)
        spread = float(loss.figures["loss"].std()) / left / len(t) ** 0.5
        assert abs(slope.item() - (torch.tensor(shift).exp().item() - 1)) < 5 * spread
        assert sign == 0 or slope.sign().item() == sign


def test_value_and_gradient_formula() -> None:
    """`mean[ exp(w) / D || sd F - v ||^2 - w ]`, by hand, on images."""
    g = generator(1)
    x0, z = (torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    t, w = torch.tensor([0.1, 0.8, 1.5], dtype=torch.float64), torch.tensor([0.2, -1.0, 0.7], dtype=torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return scale * torch.tanh(x)

    loss = diffusion_loss(network, PROCESS, x0, z, t, weight=lambda t: w)
    by_hand = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        x_t = torch.cos(t[i]) * x0[i] + torch.sin(t[i]) * z[i]
        torch.testing.assert_close(seen[0][i], x_t / 0.5)
        gap = 0.5 * scale * torch.tanh(x_t / 0.5) - (torch.cos(t[i]) * z[i] - torch.sin(t[i]) * x0[i])
        assert abs(loss.figures["loss"][i].item() - gap.square().sum().item() / 32) < 1e-6
        by_hand = by_hand + (w[i].exp() * gap.square().sum() / 32 - w[i]) / 3
    torch.testing.assert_close(loss.value, by_hand)
    torch.testing.assert_close(torch.autograd.grad(loss.value, scale), torch.autograd.grad(by_hand, scale))


def test_figures() -> None:
    x0, z, t = batch(7)
    figures = diffusion_loss(student(), PROCESS, x0, z, t, weight=lambda t: 3 + t).figures
    assert figures.keys() == {"t", "loss"}
    assert all(f.shape == (7,) and f.dtype == torch.float32 and not f.requires_grad for f in figures.values())
    torch.testing.assert_close(figures["t"], t.float())
    assert torch.equal(figures["loss"], diffusion_loss(student(), PROCESS, x0, z, t).figures["loss"])


def test_labels_reach_the_network() -> None:
    class Recorder(nn.Module):
        def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
            self.given = conditions
            return x

    x0, z, t = batch(3)
    recorder, label = Recorder(), torch.tensor([2, 0, 1])
    diffusion_loss(recorder, PROCESS, x0, z, t, conditions={"label": label})
    assert recorder.given.keys() == {"label"}
    assert torch.equal(recorder.given["label"], label)
    diffusion_loss(recorder, PROCESS, x0, z, t)
    assert recorder.given == {}


def test_the_right_labels_make_a_conditional_teacher_better() -> None:
    mixture = MixtureOracle(torch.tensor([[-0.6, 0.0], [0.6, 0.0]]), torch.tensor([0.02, 0.02]), torch.ones(2))
    g = generator(3)
    x0, label = mixture.sample(4000, g)
    z, t = PROCESS.sample_noise(x0, g), 0.3 + torch.rand(4000, generator=g)
    right, none, wrong = (
        diffusion_loss(mixture.teacher(), PROCESS, x0, z, t, conditions=given).value
        for given in ({"label": label}, None, {"label": 1 - label})
    )
    assert right < 0.9 * none
    assert none < 0.9 * wrong
