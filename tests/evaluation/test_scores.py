"""The scores order what the eye orders."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trigflow.evaluation import (
    Reference,
    evaluate,
    extract,
    feature_extractor,
    frechet_distance,
    gaussian_statistics,
    precision_recall,
)
from trigflow.evaluation.scores import half_distance
from trigflow.runtime.errors import UserError

Labelled = tuple[Tensor, Tensor]
Corruption = Callable[[Tensor, float], Tensor]


@pytest.fixture(scope="module")
def reference(digits: Labelled) -> Reference:
    return Reference(digits[0], feature_extractor("digits"))


@pytest.fixture(scope="module")
def mnist_reference(mnist: Labelled) -> tuple[Tensor, Reference]:
    """Every fifth image, and how near others are to these."""
    images = mnist[0][::5]
    return images, Reference(images, feature_extractor("mnist"))


def to_bytes(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)


def noisy(images: Tensor, amount: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return to_bytes(images + 255 * amount * noise)


def blurred(images: Tensor, amount: float) -> Tensor:
    """Each pixel shares `amount` of itself with its neighbours along each axis."""
    line = torch.tensor([amount / 2, 1 - amount, amount / 2])
    return to_bytes(F.conv2d(F.pad(images.float(), (1, 1, 1, 1)), torch.outer(line, line)[None, None]))


def shifted(images: Tensor, amount: float) -> Tensor:
    return F.pad(images, (int(amount), 0))[..., : images.shape[-1]]


def faded(images: Tensor, amount: float) -> Tensor:
    return to_bytes(images * (1 - amount))


CORRUPTIONS = [
    (noisy, [0.0, 0.06, 0.12, 0.25, 0.5]),
    (blurred, [0.0, 0.1, 0.2, 0.35, 0.5]),
    (shifted, [0, 1, 2, 3]),
    (faded, [0.0, 0.1, 0.2, 0.4, 0.6]),
]


@pytest.mark.parametrize(("corrupt", "amounts"), CORRUPTIONS)
def test_distance_grows_with_corruption(
    reference: Reference, digits: Labelled, corrupt: Corruption, amounts: list[float]
) -> None:
    scores = [reference.score(corrupt(digits[0], amount)) for amount in amounts]
    distances = [score.fd for score in scores]
    assert distances[0] == pytest.approx(0, abs=1e-5)
    assert all(later > 1.2 * earlier for earlier, later in pairwise(distances))
    assert distances[-1] > 5 * reference.fd_real
    assert scores[-1].precision < 0.6


@pytest.mark.parametrize(("corrupt", "amounts"), CORRUPTIONS)
def test_mnist_distance_grows_with_corruption(
    mnist_reference: tuple[Tensor, Reference], corrupt: Corruption, amounts: list[float]
) -> None:
    images, reference = mnist_reference
    distances = [reference.score(corrupt(images, amount)).fd for amount in (*amounts[:2], amounts[-1])]
    assert all(later > earlier for earlier, later in pairwise(distances))
    assert distances[-1] > 4 * distances[1]


def test_dropped_classes_cost_distance_and_recall_but_not_precision(reference: Reference, digits: Labelled) -> None:
    images, labels = digits
    scores = [reference.score(images[labels < classes]) for classes in (10, 9, 7, 4, 1)]
    assert all(b.fd > 1.5 * a.fd for a, b in pairwise(scores))
    assert all(b.recall < a.recall for a, b in pairwise(scores))
    assert scores[-1].recall < 0.15
    assert all(score.precision == 1 for score in scores)


def test_pure_noise_is_far(reference: Reference) -> None:
    noise = torch.randint(0, 256, (500, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    score = reference.score(noise)
    assert score.fd > 30 * reference.fd_real
    assert score.recall < 0.5


def test_held_out_real_images_sit_at_the_noise_floor(reference: Reference, digits: Labelled) -> None:
    order = torch.randperm(len(digits[0]), generator=torch.Generator().manual_seed(7))
    first, second = digits[0][order].split([898, 899])
    score = evaluate(first, second, feature_extractor("digits"))
    floor = reference.fd_real
    assert 0.6 * floor < score.fd < 1.5 * floor
    assert score.precision > 0.8
    assert score.recall > 0.8


def test_scores_are_made_of_the_pieces(digits: Labelled) -> None:
    real, fake = digits[0][:300], blurred(digits[0][300:500], 0.2)
    network = feature_extractor("digits")
    score = evaluate(fake, real, network, seed=3, k=4)
    real_features, fake_features = extract(network, real), extract(network, fake)
    expected = frechet_distance(gaussian_statistics(fake_features), gaussian_statistics(real_features))
    assert score.fd == pytest.approx(expected, rel=1e-9)
    pair = precision_recall(real_features, fake_features, k=4)
    assert (score.precision, score.recall) == (pair.precision, pair.recall)
    assert score.fd_real == half_distance(real_features, seed=3)
    assert (score.n_fake, score.n_real) == (200, 300)


def test_reference_scores_like_evaluate(digits: Labelled) -> None:
    real, network = digits[0][:300], feature_extractor("digits")
    reference = Reference(real, network, seed=5)
    for fake in (digits[0][300:400], faded(digits[0][300:400], 0.3)):
        assert reference.score(fake) == evaluate(fake, real, network, seed=5)


def test_reference_looks_at_the_real_images_once(digits: Labelled) -> None:
    seen = []

    def count(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.float().flatten(1)

    reference = Reference(digits[0][:50], count)
    reference.score(digits[0][50:60])
    reference.score(digits[0][60:80])
    assert seen == [50, 10, 20]


def test_noise_floor_depends_on_the_seed_only(digits: Labelled) -> None:
    features = extract(feature_extractor("digits"), digits[0][:201])
    state = torch.random.get_rng_state()
    assert half_distance(features, seed=1) == half_distance(features, seed=1)
    assert half_distance(features, seed=1) != half_distance(features, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_noise_floor_is_the_distance_of_disjoint_halves() -> None:
    """Four samples at 0, 0, 6, 6: each halving gives 0 (mixed) or 36 (apart), so the mean tells how many were apart."""
    features = torch.tensor([[0.0], [0.0], [6.0], [6.0]])
    values = {round(half_distance(features, seed=seed, splits=1)) for seed in range(20)}
    assert values == {0, 36}
    assert half_distance(features, seed=0, splits=200) == pytest.approx(12, abs=4)  # apart in one of three halvings


def test_errors(digits: Labelled) -> None:
    network = feature_extractor("digits")
    real = digits[0][:20]
    with pytest.raises(UserError, match="1 fake images; expected at least 4"):
        evaluate(real[:1], real, network)
    with pytest.raises(UserError, match="1 real images; expected at least 4"):
        evaluate(real, real[:1], network)
    with pytest.raises(UserError, match="1 fake images; expected at least 2"):
        evaluate(real[:1], real, network, k=1)
    with pytest.raises(UserError, match="splits=0"):
        Reference(real, network, splits=0)
    with pytest.raises(UserError, match="expected uint8"):
        evaluate(real.float() / 255, real, network)
    with pytest.raises(UserError, match="features of 3 of 20 samples are not finite"):
        evaluate(real, real, lambda x: x.float().flatten(1) / (torch.arange(20) >= 3)[:, None])
