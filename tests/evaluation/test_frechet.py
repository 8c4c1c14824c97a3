"""Frechet distance against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trigflow.evaluation import GaussianStatistics, RunningStatistics, frechet_distance, gaussian_statistics
from trigflow.runtime.errors import UserError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d: int, seed: int) -> Tensor:
    """Well conditioned: eigenvalues between about 0.5 and 3."""
    a = normal(d, d, seed=seed)
    return a @ a.T / d + 0.5 * torch.eye(d, dtype=torch.float64)


def gaussian(mean: Tensor, cov: Tensor) -> GaussianStatistics:
    return GaussianStatistics(mean, cov, n=1000)


def orthogonal(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def test_statistics_match_numpy() -> None:
    features = normal(50, 6).float()
    result = gaussian_statistics(features)
    assert result.n == 50
    assert result.mean.dtype == result.covariance.dtype == torch.float64
    np.testing.assert_allclose(result.mean, features.double().numpy().mean(0), atol=1e-14)
    np.testing.assert_allclose(result.covariance, np.cov(features.double().numpy(), rowvar=False), atol=1e-14)


def test_commuting_covariances_have_a_closed_form() -> None:
    q = orthogonal(5, seed=1)
    a, b = torch.tensor([[0.1, 1, 2, 3, 9], [4, 0.2, 2, 5, 1]], dtype=torch.float64)
    mean_a, mean_b = normal(2, 5, seed=2)
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    distance = frechet_distance(gaussian(mean_a, q * a @ q.T), gaussian(mean_b, q * b @ q.T))
    assert distance == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("d", [1, 2, 7, 40])
def test_general_covariances_match_the_eigenvalues_of_the_product(d: int) -> None:
    a, b = covariance(d, seed=3), covariance(d, seed=4)
    assert d == 1 or (a @ b - b @ a).abs().max() > 1e-2
    mean_a, mean_b = normal(2, d, seed=5)
    roots = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    expected = (mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * roots
    assert frechet_distance(gaussian(mean_a, a), gaussian(mean_b, b)) == pytest.approx(expected.item(), rel=1e-11)


def test_two_dimensions_by_hand() -> None:
    """For 2x2 matrices, tr (AB)^{1/2} = sqrt(tr AB + 2 sqrt(det AB))."""
    a = torch.tensor([[2.0, 0.6], [0.6, 1.0]])
    b = torch.tensor([[1.0, -0.3], [-0.3, 3.0]])
    product = a @ b
    root = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
    distance = frechet_distance(gaussian(torch.zeros(2), a), gaussian(torch.tensor([3.0, 4.0]), b))
    assert distance == pytest.approx(25 + 3 + 4 - 2 * root, rel=1e-6)


def test_equal_sets_are_at_zero_and_order_does_not_matter() -> None:
    a, b = gaussian_statistics(normal(200, 8)), gaussian_statistics(normal(300, 8, seed=1) * 2 + 1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, b) > 8


def test_rotating_and_moving_both_sets_changes_nothing() -> None:
    a, b = normal(100, 6), normal(100, 6, seed=1) @ covariance(6, seed=2)
    q, shift = orthogonal(6, seed=3), normal(6, seed=4)
    before = frechet_distance(gaussian_statistics(a), gaussian_statistics(b))
    after = frechet_distance(gaussian_statistics(a @ q + shift), gaussian_statistics(b @ q + shift))
    assert after == pytest.approx(before, rel=1e-10)


def test_shift_costs_its_squared_length() -> None:
    a, delta = normal(100, 6), normal(6, seed=1)
    distance = frechet_distance(gaussian_statistics(a), gaussian_statistics(a + delta))
    assert distance == pytest.approx(delta.square().sum().item(), rel=1e-9)


def test_scaling_costs_the_squared_difference_of_standard_deviations() -> None:
    a = normal(100, 6)
    a = a - a.mean(0)
    expected = 4 * gaussian_statistics(a).covariance.trace().item()  # (3 - 1)^2 tr C
    assert frechet_distance(gaussian_statistics(a), gaussian_statistics(3 * a)) == pytest.approx(expected, rel=1e-10)


def test_fewer_samples_than_dimensions() -> None:
    a, b = normal(5, 40), normal(7, 40, seed=1)
    a_stats, b_stats = gaussian_statistics(a), gaussian_statistics(b)
    assert torch.linalg.matrix_rank(a_stats.covariance) == 4
    # With X and Y the centred sets scaled by 1/sqrt(n-1), tr (C1 C2)^{1/2} is the sum of singular values of X Y^T.
    x, y = (a - a.mean(0)) / 2, (b - b.mean(0)) / math.sqrt(6)
    expected = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum()
    expected -= 2 * torch.linalg.svdvals(x @ y.T).sum()
    assert frechet_distance(a_stats, b_stats) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(a_stats, a_stats) == pytest.approx(0, abs=1e-5)


def test_point_masses() -> None:
    zero = torch.zeros(3, 3, dtype=torch.float64)
    a, b = gaussian(torch.zeros(3), zero), gaussian(torch.full((3,), 2.0), zero)
    assert frechet_distance(a, b) == 12.0
    c = gaussian(torch.zeros(3), covariance(3, seed=1))
    assert frechet_distance(a, c) == pytest.approx(c.covariance.trace().item(), rel=1e-12)


def test_large_offsets_keep_their_precision() -> None:
    a = normal(100, 4).float()
    expected = gaussian_statistics(a)
    moved = gaussian_statistics(a.double() + 1e6)
    torch.testing.assert_close(moved.covariance, expected.covariance, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("sizes", [[90], [1, 89], [30, 0, 60], [1] * 90])
def test_streaming_equals_batch(sizes: list[int]) -> None:
    features = normal(90, 5) * 3 + 10
    running = RunningStatistics()
    for part in features.split(sizes):
        running.update(part)
    batch, streamed = gaussian_statistics(features), running.result()
    assert streamed.n == 90
    torch.testing.assert_close(streamed.mean, batch.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(streamed.covariance, batch.covariance, rtol=1e-11, atol=1e-12)


def test_merging_equals_batch_and_leaves_the_other_alone() -> None:
    features = normal(90, 5) + 2
    first, second, empty = RunningStatistics(), RunningStatistics(), RunningStatistics()
    first.update(features[:20])
    second.update(features[20:])
    before = second.result().covariance
    empty.merge(first)
    empty.merge(second)
    empty.merge(RunningStatistics())
    batch, merged = gaussian_statistics(features), empty.result()
    assert merged.n == 90
    torch.testing.assert_close(merged.covariance, batch.covariance, rtol=1e-11, atol=1e-12)
    assert torch.equal(second.result().covariance, before)
    assert first.n == 20


def test_documented_bias_is_what_finite_samples_show() -> None:
    variances = torch.tensor([0.2, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    n, m, repeats = 400, 800, 60
    pairs = variances[:, None] * variances / (2 * (variances[:, None] + variances))
    expected = (1 / n + 1 / m) * (variances.sum() + pairs.sum() + pairs.diagonal().sum())
    total = 0.0
    for seed in range(repeats):
        a, b = normal(n + m, 5, seed=seed).mul(variances.sqrt()).split([n, m])
        total += frechet_distance(gaussian_statistics(a), gaussian_statistics(b))
    assert total / repeats == pytest.approx(expected.item(), rel=0.12)


def test_bad_features_say_how_many() -> None:
    features = normal(10, 3)
    features[2, 1] = torch.nan
    features[7] = torch.inf
    with pytest.raises(UserError, match="features of 2 of 10 samples are not finite"):
        gaussian_statistics(features)
    running = RunningStatistics()
    with pytest.raises(UserError, match="not finite"):
        running.update(features)
    assert running.n == 0


@pytest.mark.parametrize("features", [torch.zeros(4), torch.zeros(4, 2, 2), torch.zeros(4, 2, dtype=torch.int64)])
def test_features_of_another_kind_are_refused(features: Tensor) -> None:
    with pytest.raises(UserError, match=r"expected a floating tensor of shape \(n, d\)"):
        gaussian_statistics(features)


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(UserError, match="1 samples have no covariance"):
        gaussian_statistics(torch.zeros(1, 3))
    with pytest.raises(UserError, match="0 samples have no covariance"):
        RunningStatistics().result()


def test_different_dimensions_are_refused() -> None:
    with pytest.raises(UserError, match="features of 3 and 4 dimensions"):
        frechet_distance(gaussian_statistics(normal(5, 3)), gaussian_statistics(normal(5, 4)))
    running = RunningStatistics()
    running.update(normal(5, 3))
    with pytest.raises(UserError, match="features of 3 and 4 dimensions"):
        running.update(normal(5, 4))
    assert running.n == 5
