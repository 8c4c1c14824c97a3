"""Precision, recall, density and coverage against counting by hand, brute force and expectations in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trigflow.evaluation import Overlap, overlap, precision_recall
from trigflow.evaluation.manifold import neighbour_radii
from trigflow.runtime.errors import UserError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(real: Tensor, fake: Tensor, k: int) -> Overlap:
    def reach(points: Tensor) -> list[float]:
        return [sorted((p - q).norm().item() for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]

    real, fake = real.double(), fake.double()
    real_reach, fake_reach = reach(real), reach(fake)
    inside = [[(f - r).norm().item() <= limit for r, limit in zip(real, real_reach, strict=True)] for f in fake]
    around = [[(f - r).norm().item() <= limit for r in real] for f, limit in zip(fake, fake_reach, strict=True)]
    return Overlap(
        precision=sum(any(row) for row in inside) / len(fake),
        recall=sum(any(column) for column in zip(*around, strict=True)) / len(real),
        density=sum(sum(row) for row in inside) / (k * len(fake)),
        coverage=sum(any(column) for column in zip(*inside, strict=True)) / len(real),
    )


@pytest.mark.parametrize(("k", "chunk"), [(1, 1), (3, 7), (5, 512)])
def test_matches_brute_force(k: int, chunk: int) -> None:
    real, fake = normal(30, 3), 0.7 * normal(20, 3, seed=1) + 0.4
    expected = brute_force(real, fake, k)
    assert overlap(real, fake, k, chunk) == expected
    assert 0 < expected.coverage <= 1


def test_on_a_line() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # k = 1: balls [-1, 1], [0, 2], [1, 5] and [3, 17]
    fake = torch.tensor([[0.5], [1.5], [4.0], [30.0]])  # k = 1: balls [-0.5, 1.5], [0.5, 2.5], [1.5, 6.5] and [4, 56]
    found = overlap(real, fake, k=1)
    assert found.precision == 3 / 4  # all but 30
    assert found.recall == 4 / 4  # 0 and 1 by the first, 3 by the third, 10 by the last
    assert found.density == (2 + 2 + 2 + 0) / 4
    assert found.coverage == 4 / 4


def test_one_real_outlier_raises_precision_more_than_density() -> None:
    real = torch.cat([normal(200, 2), torch.tensor([[40.0, 0.0]])])  # its ball holds everything around it
    fake = normal(200, 2, seed=1) + torch.tensor([30.0, 0.0])
    found = overlap(real, fake)
    assert found.precision == 1
    assert found.density < 0.4
    assert found.coverage < 0.01


def test_one_fake_outlier_raises_recall_but_not_coverage() -> None:
    real = normal(200, 2)
    fake = torch.cat([normal(200, 2, seed=1) + 40, torch.zeros(1, 2)])
    found = overlap(real, fake)
    assert found.recall == 1
    assert found.coverage < 0.05


@pytest.mark.parametrize("k", [1, 3, 5])
def test_two_sets_of_one_distribution(k: int) -> None:
    """Density is 1 on average, coverage 1 - prod (n - i) / (2n - i), in any dimension."""
    n, sets = 100, 30
    found = [overlap(normal(n, 5, seed=2 * i), normal(n, 5, seed=2 * i + 1), k) for i in range(sets)]
    expected = 1.0
    for i in range(1, k + 1):
        expected *= (n - i) / (2 * n - i)
    assert sum(one.coverage for one in found) / sets == pytest.approx(1 - expected, abs=0.02)
    assert sum(one.density for one in found) / sets == pytest.approx(1, abs=0.06)


def test_precision_and_recall_are_those_of_precision_recall() -> None:
    real, fake = normal(60, 4), 0.8 * normal(50, 4, seed=1)
    found, pair = overlap(real, fake), precision_recall(real, fake)
    assert (found.precision, found.recall) == (pair.precision, pair.recall)


def test_radii_at_hand_are_taken() -> None:
    real, fake = normal(40, 3), normal(30, 3, seed=1)
    assert overlap(real, fake, real_radii=neighbour_radii(real)) == overlap(real, fake)
    nothing = overlap(real, fake, real_radii=torch.full((40,), -1.0))
    assert (nothing.precision, nothing.density, nothing.coverage) == (0, 0, 0)


def test_errors() -> None:
    with pytest.raises(UserError, match="3 samples have no 3 nearest neighbours"):
        overlap(normal(10, 2), normal(3, 2))
    with pytest.raises(UserError, match="features of 2 and 3 dimensions"):
        overlap(normal(10, 2), normal(10, 3))
