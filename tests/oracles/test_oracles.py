import math

import pytest
import torch
from torch import Tensor

from oracles.gaussian import GaussianOracle
from oracles.mixture import MixtureOracle
from trigflow.process import HALF_PI

VARIANCES = torch.tensor([0.01, 0.25, 3.0], dtype=torch.float64)
TIMES = torch.tensor([0.0, 1e-6, 0.3, 1.1, 1.56, HALF_PI], dtype=torch.float64)


def gaussian() -> GaussianOracle:
    return GaussianOracle(VARIANCES, sd=0.5)


def mixture(d: int = 2) -> MixtureOracle:
    means = torch.tensor([[-0.6, 0.3], [0.1, -0.5], [0.8, 0.2]], dtype=torch.float64)[:, :d]
    variances = torch.tensor([0.02, 0.05, 0.1], dtype=torch.float64)
    return MixtureOracle(means, variances, torch.tensor([3.0, 2.0, 5.0], dtype=torch.float64))


def points(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def test_gaussian_consistency_function_is_constant_along_the_flow() -> None:
    oracle, x = gaussian(), points(6, 3)
    _, change = torch.func.jvp(oracle.consistency, (x, TIMES), (oracle.velocity(x, TIMES), torch.ones_like(TIMES)))
    close(change, torch.zeros_like(x))


def test_gaussian_consistency_network_gives_the_consistency_function_at_all_times() -> None:
    oracle, x = gaussian(), points(6, 3)
    network_output = oracle.student()(x / 0.5, TIMES)
    f = torch.cos(TIMES)[:, None] * x - torch.sin(TIMES)[:, None] * 0.5 * network_output
    close(f, oracle.consistency(x, TIMES))
    close(f[0], x[0])


def test_gaussian_maps_noise_to_data_of_the_right_variance() -> None:
    oracle = gaussian()
    unit = torch.full((1, 3), 0.5, dtype=torch.float64)  # one standard deviation of the noise
    close(oracle.consistency(unit, HALF_PI), VARIANCES.sqrt()[None])
    data = oracle.sample(100_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(data.var(0), VARIANCES.float(), rtol=0.02, atol=0)


def test_gaussian_teacher_takes_images() -> None:
    oracle = GaussianOracle(torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.1)
    x, t = points(3, 2, 4, 4).float(), torch.tensor([0.2, 0.9, 1.5])
    out = oracle.teacher()(x / 0.5, t)
    assert (out.shape, out.dtype) == (x.shape, torch.float32)
    torch.testing.assert_close(out[1:2], oracle.teacher()(x[1:2] / 0.5, t[1:2]))


def test_mixture_of_one_component_is_a_gaussian() -> None:
    one = MixtureOracle(torch.zeros(1, 3), torch.tensor([0.3]), torch.ones(1))
    oracle, x = GaussianOracle(torch.full((3,), 0.3, dtype=torch.float64)), points(6, 3)
    tolerance = 1e-6  # the variances above are float32 numbers
    for name in ("velocity", "denoise", "score"):
        close(getattr(one, name)(x, TIMES), getattr(oracle, name)(x, TIMES), tolerance)


def test_mixture_score_is_the_gradient_of_its_log_density() -> None:
    oracle, x = mixture(), points(6, 2)
    label = torch.tensor([0, 1, 2, 3, 3, 1])
    for chosen in (None, label):
        gradient = torch.func.grad(lambda y, chosen=chosen: oracle.log_density(y, TIMES, chosen).sum())(x)
        close(oracle.score(x, TIMES, chosen), gradient)


def test_mixture_posterior_mean_by_quadrature() -> None:
    """E[x0 | x_t] against Bayes' rule on a fine grid of x0, one dimension."""
    oracle, t = mixture(1), 0.8
    x0 = torch.linspace(-4, 4, 40_001, dtype=torch.float64)
    prior = oracle.log_density(x0[:, None], 0.0)
    for x_t in (-0.7, 0.0, 0.4):
        likelihood = -((x_t - math.cos(t) * x0) ** 2) / (2 * (math.sin(t) * 0.5) ** 2)
        posterior = torch.softmax(prior + likelihood, dim=0)
        exact = oracle.denoise(torch.tensor([[x_t]], dtype=torch.float64), t)
        assert exact.item() == pytest.approx((posterior * x0).sum().item(), abs=1e-8)


def test_mixture_density_is_transported_by_its_velocity() -> None:
    """Continuity equation: d/dt log p = -div v - v . score."""
    oracle, x, t = mixture(1), points(50, 1), torch.full((50,), 0.7, dtype=torch.float64)
    ones = torch.ones_like
    _, dlogp_dt = torch.func.jvp(lambda s: oracle.log_density(x, s), (t,), (ones(t),))
    v, divergence = torch.func.jvp(lambda y: oracle.velocity(y, t), (x,), (ones(x),))
    close(dlogp_dt, -(divergence + v * oracle.score(x, t))[:, 0])


def test_mixture_quantile_map_is_constant_along_the_flow() -> None:
    oracle, x, t, h = mixture(1), points(20, 1) * 0.5, 0.9, 1e-4
    v = oracle.velocity(x, t)
    _, acceleration = torch.func.jvp(
        oracle.velocity, (x, torch.full((20,), t).double()), (v, torch.ones(20, dtype=torch.float64))
    )
    ahead = x + h * v + h**2 / 2 * acceleration
    close(oracle.quantile_map(ahead, t + h), oracle.quantile_map(x, t), 1e-8)
    close(oracle.quantile_map(x, 0.0), x, 1e-8)


def test_mixture_labels_choose_components() -> None:
    oracle, x = mixture(), points(6, 2)
    teacher = oracle.teacher()
    assert (teacher.takes, teacher.null["label"].item()) == ({"label"}, 3)
    null, first = torch.full((6,), 3), torch.zeros(6, dtype=torch.int64)
    assert torch.equal(teacher(x, TIMES, label=null), teacher(x, TIMES))
    alone = MixtureOracle(oracle.means[:1], oracle.variances[:1], torch.ones(1, dtype=torch.float64))
    close(teacher(x, TIMES, label=first), alone.teacher()(x, TIMES))


def test_mixture_samples_have_its_moments() -> None:
    oracle, g = mixture(), torch.Generator().manual_seed(0)
    x, component = oracle.sample(50_000, g)
    shares = torch.bincount(component, minlength=3) / len(component)
    torch.testing.assert_close(shares.double(), oracle.weights, atol=0.01, rtol=0)
    torch.testing.assert_close(x.mean(0).double(), oracle.weights @ oracle.means, atol=0.01, rtol=0)
    third, labels = oracle.sample(20_000, g, label=torch.full((20_000,), 2))
    assert bool((labels == 2).all())
    torch.testing.assert_close(third.mean(0).double(), oracle.means[2], atol=0.01, rtol=0)
    torch.testing.assert_close(third.var(0).double(), oracle.variances[2].expand(2), atol=0.003, rtol=0)
