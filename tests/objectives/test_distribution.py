"""Variational score distillation, against the divergence of Gaussians and by what small generators learn."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from objectives.helpers import PROCESS, batch, consistency_loss, generator, student
from objectives.test_learning import COUNT, DATA, draw, energy_distance, shares, train
from oracles.gaussian import GaussianOracle
from trigflow.networks import MLP
from trigflow.objectives import AdaptiveWeight, Loss, diffusion_loss, rollout, vsd_direction, vsd_loss
from trigflow.process import HALF_PI, Proposal
from trigflow.samplers import flow_map_sample, network_velocity

SD = PROCESS.sigma_data
ONE = (PROCESS.t_max,)  # times of a rollout of one step
RENOISE = Proposal(0.4, 2.0)


def noise(like: Tensor, seed: int) -> Tensor:
    return PROCESS.sample_noise(like, generator(seed))


class Scaled(nn.Module):
    """The generator `G(z) = a z`, of any dimension, as a network F."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a.clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (torch.cos(t)[:, None] - self.a) * x / torch.sin(t)[:, None]


# The generator -------------------------------------------------------------------------------------------------------


def test_generating_is_sampling_in_one_step() -> None:
    net, z = student(), noise(batch(20)[0], 1)
    with torch.no_grad():
        sample = rollout(net, PROCESS, z, ONE)
    expected = flow_map_sample(network_velocity(net, PROCESS), PROCESS, z, ONE)
    torch.testing.assert_close(sample, expected, rtol=1e-6, atol=1e-7)


def test_labels_and_scales_reach_the_generator() -> None:
    net, z = student(num_classes=3, takes=("guidance",)), noise(batch(6)[0], 1)
    label, scale = torch.tensor([0, 1, 2, 3, 0, 1]), torch.linspace(1, 2, 6, dtype=torch.float64)
    with torch.no_grad():
        sample = rollout(net, PROCESS, z, ONE, conditions={"label": label, "guidance": scale})
        other_label = rollout(net, PROCESS, z, ONE, conditions={"label": (label + 1) % 3, "guidance": scale})
        other_scale = rollout(net, PROCESS, z, ONE, conditions={"label": label, "guidance": scale + 0.3})
    assert not torch.isclose(sample, other_label).any(dim=1).all()
    assert not torch.isclose(sample, other_scale).any(dim=1).all()


# The direction -------------------------------------------------------------------------------------------------------


def test_the_direction_is_that_of_the_formula() -> None:
    """`delta = (x0_fake - x0_teacher) / mean|G - x0_teacher|`, in denoised samples."""
    x0, n, t = batch(50)
    x_t = PROCESS.interpolate(x0, n, t)
    fake, teacher = (oracle.velocity(x_t, t) for oracle in (GaussianOracle(torch.tensor(v)) for v in (0.1, 0.9)))
    denoised = {name: PROCESS.denoise(x_t, v, t) for name, v in (("fake", fake), ("teacher", teacher))}
    error = (x0 - denoised["teacher"]).abs().mean(dim=1, keepdim=True)
    expected = (denoised["fake"] - denoised["teacher"]) / error
    torch.testing.assert_close(vsd_direction(PROCESS.velocity(x0, n, t), teacher, fake), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("t", [1e-6, 1e-4, HALF_PI - 1e-4, HALF_PI - 1e-6])
def test_the_direction_survives_float32_at_the_ends(t: float) -> None:
    x0, n, _ = batch(50)
    deltas = []
    for dtype in (torch.float64, torch.float32):
        times = torch.full((50,), t, dtype=torch.float64).to(dtype)
        x, z = x0.to(dtype), n.to(dtype)
        x_t = PROCESS.interpolate(x, z, times)
        v, w = (GaussianOracle(torch.tensor(variance)).velocity(x_t, times) for variance in (0.1, 0.9))
        deltas.append(vsd_direction(PROCESS.velocity(x, z, times), w, v).double())
    torch.testing.assert_close(deltas[1], deltas[0], rtol=1e-3, atol=1e-5)


def test_a_perfect_teacher_of_a_point_divides_by_no_zero() -> None:
    v = torch.ones(3, 4)
    assert bool(vsd_direction(v, v, v + 1).isfinite().all())
    assert vsd_direction(v, v, v).abs().max() == 0


# The gradient --------------------------------------------------------------------------------------------------------


def kl_gradient(a: Tensor, variances: Tensor, t: float) -> Tensor:
    """Gradient in a of `KL(a z, noised to t || data, noised to t)`, by autograd through the formula for Gaussians."""
    a = a.clone().requires_grad_()
    c, s = math.cos(t), math.sin(t)
    mine, data = (c**2 * var + s**2 * SD**2 for var in (a**2 * SD**2, variances))
    divergence = kl_divergence(Normal(0.0, mine.sqrt()), Normal(0.0, data.sqrt())).sum()
    return torch.autograd.grad(divergence, a)[0]


def vsd_gradient(a: Tensor, variances: Tensor, t: float, n: int, weight: AdaptiveWeight | None = None) -> Tensor:
    """Gradient of the loss, with exact scores of the generator and of the data."""
    net = Scaled(a)
    z = SD * torch.randn(n, len(a), generator=generator(1), dtype=torch.float64)
    loss = vsd_loss(
        rollout(net, PROCESS, z, ONE),
        PROCESS,
        noise(z, 2),
        torch.full((n,), t, dtype=torch.float64),
        teacher=GaussianOracle(variances).velocity,
        fake=GaussianOracle(a**2 * SD**2).velocity,
        weight=weight,
    )
    loss.value.backward()
    assert net.a.grad is not None
    return net.a.grad


VARIANCES = torch.linspace(0.05, 1.2, 100, dtype=torch.float64)
SCALES = torch.linspace(2.0, 0.3, 100, dtype=torch.float64)  # of the generator: too wide at first, too narrow at last


@pytest.mark.parametrize("t", [0.1, 0.5, 1.0, 1.3])
def test_the_gradient_is_that_of_the_divergence(t: float) -> None:
    """Up to a positive factor. With 100 coordinates the scale of a sample, their mean, is nearly a constant."""
    expected = kl_gradient(SCALES, VARIANCES, t)
    gradient = vsd_gradient(SCALES, VARIANCES, t, n=4000)
    assert torch.cosine_similarity(gradient, expected, dim=0) > 0.995
    clear = expected.abs() > 0.05 * expected.abs().max()
    assert torch.equal(gradient[clear].sign(), expected[clear].sign())


def test_the_weighting_scales_the_gradient_and_turns_it_nowhere() -> None:
    weight = AdaptiveWeight(PROCESS).double()
    with torch.no_grad():
        weight.linear.bias.fill_(0.7)
    plain, weighted = (vsd_gradient(SCALES, VARIANCES, 0.8, 50, w) for w in (None, weight))
    torch.testing.assert_close(weighted, math.exp(0.7) * plain, rtol=1e-6, atol=1e-12)
    assert weight.linear.bias.grad is not None


def test_the_value_is_the_size_of_delta_and_its_gradient_is_delta() -> None:
    x0, n, t = batch(10)
    x0.requires_grad_()
    teacher, fake = (GaussianOracle(torch.tensor(v)).velocity for v in (0.3, 0.6))
    loss = vsd_loss(x0, PROCESS, n, t, teacher=teacher, fake=fake)
    x_t = PROCESS.interpolate(x0, n, t)
    delta = vsd_direction(PROCESS.velocity(x0, n, t), teacher(x_t, t), fake(x_t, t)).detach()
    torch.testing.assert_close(loss.value, delta.square().mean())
    torch.testing.assert_close(loss.figures["loss"], delta.square().mean(1).float())
    assert torch.equal(loss.figures["t"], t.float())
    loss.value.backward()
    torch.testing.assert_close(x0.grad, 2 * delta / delta.numel())


def test_nothing_but_the_generator_gets_a_gradient() -> None:
    nets = [student(seed) for seed in range(3)]
    z, n, t = batch(10)
    teacher, fake = (network_velocity(net, PROCESS) for net in nets[1:])
    vsd_loss(rollout(nets[0], PROCESS, z, ONE), PROCESS, n, t, teacher=teacher, fake=fake).value.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in nets[0].blocks.parameters())
    assert all(p.grad is None for net in nets[1:] for p in net.parameters())


@pytest.mark.parametrize("t", [0.1, 0.8, 1.4])
def test_where_the_distributions_agree_nothing_moves(t: float) -> None:
    fixed = (VARIANCES / SD**2).sqrt()
    assert kl_gradient(fixed, VARIANCES, t).abs().max() < 1e-12
    assert vsd_gradient(fixed, VARIANCES, t, n=100).abs().max() < 1e-12
    assert vsd_gradient(1.01 * fixed, VARIANCES, t, n=100).abs().max() > 1e-5


def test_a_guided_fake_score_is_told_the_scale() -> None:
    net = student(num_classes=3, takes=("guidance",))
    x0, n, t = batch(6)
    label, scale = torch.tensor([0, 1, 2, 3, 0, 1]), torch.linspace(1, 2, 6, dtype=torch.float64)
    loss = diffusion_loss(net, PROCESS, x0, n, t, conditions={"label": label, "guidance": scale})
    prediction = SD * net(PROCESS.interpolate(x0, n, t) / SD, t, label=label, guidance=scale)
    torch.testing.assert_close(loss.value, (prediction - PROCESS.velocity(x0, n, t)).square().mean())


# Learning ------------------------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """The generator `G(z) = m + A z`."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.a = nn.Parameter(torch.eye(2, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        sample = self.m + SD * x @ self.a.T
        return (torch.cos(t)[:, None] * SD * x - sample) / (torch.sin(t)[:, None] * SD)


class GaussianScore(nn.Module):
    """The diffusion network of `N(m, L L^T)`."""

    def __init__(self, m: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.m, self.factor = nn.Parameter(m.clone()), nn.Parameter(factor.clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x_t, cos, sin = SD * x, torch.cos(t)[:, None], torch.sin(t)[:, None]
        covariance = self.factor @ self.factor.T
        noised = cos[..., None] ** 2 * covariance + sin[..., None] ** 2 * SD**2 * torch.eye(2, dtype=x.dtype)
        whitened = torch.linalg.solve(noised, x_t - cos * self.m)
        x0 = self.m + cos * whitened @ covariance
        return (cos * x_t - x0) / (sin * SD)


def test_an_affine_generator_finds_mean_and_covariance() -> None:
    """Both players are of the exact families, so the end is exact but for the noise of the batches."""
    mean, factor = torch.tensor([0.4, -0.3]).double(), torch.tensor([[0.5, 0.0], [0.3, 0.2]]).double()
    data, net = GaussianScore(mean, factor), Affine()
    fake, teacher = copy.deepcopy(data), network_velocity(data, PROCESS)
    optimizers = [torch.optim.Adam(module.parameters(), lr=0.02, betas=(0.5, 0.99)) for module in (net, fake)]
    g, like = generator(3), torch.empty(128, 2, dtype=torch.float64)

    def distance() -> float:
        """Largest error of the mean and of the covariance."""
        with torch.no_grad():
            covariance = SD**2 * net.a @ net.a.T
            return max(float((net.m - mean).abs().max()), float((covariance - factor @ factor.T).abs().max()))

    assert distance() > 0.3
    for i in range(400):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.02 * min(1.0, 2 * (1 - i / 400))
            optimizer.zero_grad()
        z, n, m = (PROCESS.sample_noise(like, g) for _ in range(3))
        t, s = (RENOISE.sample(PROCESS, 128, g).double().clamp(1e-3, HALF_PI - 1e-3) for _ in range(2))
        sample = rollout(net, PROCESS, z, ONE)
        vsd_loss(sample, PROCESS, n, t, teacher=teacher, fake=network_velocity(fake, PROCESS)).value.backward()
        diffusion_loss(fake, PROCESS, sample.detach(), m, s).value.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert distance() < 0.03


@pytest.mark.parametrize(("kind", "iterations"), [("vsd", 250), ("scd-vsd", 150)])
def test_students_learn_all_of_a_mixture_in_one_step(kind: str, iterations: int, teacher: MLP) -> None:
    """A learned fake score, starting as the teacher; every mode is found, though the gradient is of the mode-seeking KL."""
    net, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    weights = [AdaptiveWeight(PROCESS) for _ in range(3)]
    learned = network_velocity(copy.deepcopy(teacher), PROCESS)
    optimizer = torch.optim.Adam([*fake.parameters(), *weights[2].parameters()], lr=1e-3, betas=(0.9, 0.99))
    g, like = generator(4), torch.empty(256, 2)

    def step(x0: Tensor, noise: Tensor, t: Tensor, iteration: int) -> Loss:
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, 2 * (1 - iteration / iterations))
        z, n, m = (PROCESS.sample_noise(like, g) for _ in range(3))
        s, u = (RENOISE.sample(PROCESS, 256, g) for _ in range(2))
        sample = rollout(net, PROCESS, z, ONE)
        score = network_velocity(fake, PROCESS)
        value = vsd_loss(sample, PROCESS, n, s, teacher=learned, fake=score, weight=weights[0]).value
        if kind == "scd-vsd":
            value = value + consistency_loss(net, x0, noise, t, teacher=learned, weight=weights[1]).value
        optimizer.zero_grad()
        diffusion_loss(fake, PROCESS, sample.detach(), m, u, weight=weights[2]).value.backward()
        optimizer.step()
        return Loss(value)

    train(net, step, nn.ModuleList(weights[:2]), iterations=iterations, rate=5e-4)
    data = DATA.sample(COUNT, generator(100))[0]
    assert energy_distance(draw(teacher, 1), data) > 0.1
    assert energy_distance(draw(net, 1), data) < 0.025
    assert float(shares(draw(net, 1)).min()) > 0.15
