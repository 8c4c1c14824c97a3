"""Precision and recall against brute force and sets whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trigflow.evaluation import PrecisionRecall, precision_recall
from trigflow.runtime.errors import UserError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(real: Tensor, fake: Tensor, k: int) -> PrecisionRecall:
    def covered(points: Tensor, centres: Tensor) -> float:
        p, c = points.double().numpy(), centres.double().numpy()
        inside = 0
        for point in p:
            for i, centre in enumerate(c):
                others = np.sort(np.linalg.norm(np.delete(c, i, axis=0) - centre, axis=1))
                if np.linalg.norm(point - centre) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(p)

    return PrecisionRecall(covered(fake, real), covered(real, fake))


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_matches_brute_force(k: int, chunk: int) -> None:
    real, fake = normal(40, 6), 0.7 * normal(25, 6, seed=1) + 0.4
    expected = brute_force(real, fake, k)
    assert 0 < expected.precision <= 1
    assert 0 < expected.recall < 1
    assert precision_recall(real, fake, k, chunk) == expected


def test_on_a_line() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # k = 1: radii 1, 1, 2, 7 reach [-1, 2], [1, 5] and [3, 17]
    fake = torch.tensor([[-1.0], [-1.1], [17.0], [20.0]])  # k = 1: radii .1, .1, 3, 3 reach [-1.2, -0.9], [14, 23]
    result = precision_recall(real, fake, k=1)
    assert result == PrecisionRecall(precision=0.5, recall=0.0)
    assert precision_recall(fake, real, k=1) == PrecisionRecall(precision=0.0, recall=0.5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_identical_sets_cover_each_other(scale: float) -> None:
    real = normal(60, 4) * scale + 100 * scale
    fake = real[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
    assert precision_recall(real, fake) == PrecisionRecall(1.0, 1.0)


def test_a_repeated_image_lies_in_the_ball_of_its_copies() -> None:
    real = normal(1, 8).expand(20, 8) + 3
    assert precision_recall(real, real[:10]) == PrecisionRecall(1.0, 1.0)
    assert precision_recall(real, real[:10] + 0.1) == PrecisionRecall(0.0, 0.0)


def test_sets_far_apart_share_nothing() -> None:
    assert precision_recall(normal(30, 4), normal(30, 4, seed=1) + 100) == PrecisionRecall(0.0, 0.0)


def test_a_dropped_mode_costs_recall_not_precision() -> None:
    modes = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]]).repeat_interleave(50, 0)
    real = modes + normal(200, 2)
    fake = (modes + normal(200, 2, seed=1))[:150]
    result = precision_recall(real, fake)
    assert result.precision > 0.85
    assert 0.6 < result.recall <= 0.75


def test_outliers_cost_precision_not_recall() -> None:
    real, fake = normal(200, 2), normal(200, 2, seed=1)
    fake = torch.cat([fake, 200 * torch.rand(50, 2, generator=torch.Generator().manual_seed(2)) + 50])
    result = precision_recall(real, fake)
    assert result.precision < 0.8
    assert result.recall > 0.9


def test_small_distances_far_from_the_origin() -> None:
    real, fake = normal(40, 6).double(), 0.7 * normal(25, 6, seed=1).double() + 0.4
    assert precision_recall(real + 1e4, fake + 1e4) == precision_recall(real, fake)


def test_errors() -> None:
    with pytest.raises(UserError, match="3 samples have no 3 nearest neighbours"):
        precision_recall(normal(10, 2), normal(3, 2))
    with pytest.raises(UserError, match="features of 2 and 3 dimensions"):
        precision_recall(normal(10, 2), normal(10, 3))
    with pytest.raises(UserError, match="k=0"):
        precision_recall(normal(10, 2), normal(10, 2), k=0)
    with pytest.raises(UserError, match="features of 10 of 10 samples are not finite"):
        precision_recall(normal(10, 2), normal(10, 2) * torch.nan)
