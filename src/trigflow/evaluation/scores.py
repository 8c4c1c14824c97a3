"""Scores of a set of generated images against a set of real ones."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from trigflow.evaluation.features.extractors import FeatureExtractor, extract
from trigflow.evaluation.frechet import check_features, frechet_distance, gaussian_statistics
from trigflow.evaluation.manifold import neighbour_radii, overlap
from trigflow.runtime.errors import UserError


@dataclass(frozen=True)
class Scores:
    """What `evaluate` measures.

    Attributes:
        fd: Frechet distance from the fake images to all real images; lower is better.
        precision: share of fake images in the region of the real ones, in [0, 1].
        recall: share of real images in the region of the fake ones, in [0, 1].
        fd_real: noise floor: Frechet distance between two disjoint halves of the real images, a mean over random halvings.
            It is what `fd` shows for images as good as real ones when both sets have `n_real / 2` images; with more images
            than that `fd` can lie below it, with fewer it lies above.
        n_fake: number of fake images.
        n_real: number of real images.
        density: real balls that a fake image lies in, on average, divided by k; about 1 for images as good as real ones.
        coverage: share of real images with a fake one nearby, in [0, 1].
    """

    fd: float
    precision: float
    recall: float
    fd_real: float
    n_fake: int
    n_real: int
    density: float
    coverage: float


class Reference:
    """Real images, looked at once, so that many sets of fake images can be scored cheaply against them.

    Args:
        real_images: uint8 `(n, c, h, w)`, n >= 4 and n > k.
        extractor: uint8 images `(b, c, h, w)` to features `(b, d)`.
        seed: of the random halvings behind `fd_real`.
        k: neighbours behind precision and recall.
        splits: number of random halvings behind `fd_real`.
        batch_size: images given to the extractor at a time.

    Attributes:
        features: real features `(n, d)`.
        statistics: their mean and covariance.
        fd_real: the noise floor, see `Scores`.

    Raises:
        UserError: for too few images, images that are not uint8 `(n, c, h, w)`, or unusable features.
    """

    def __init__(
        self,
        real_images: Tensor,
        extractor: FeatureExtractor,
        *,
        seed: int = 0,
        k: int = 3,
        splits: int = 4,
        batch_size: int = 512,
    ) -> None:
        _check_count("real", len(real_images), max(4, k + 1))
        if splits < 1:
            raise UserError(f"splits={splits}; expected at least 1; correct the argument")
        self.extractor = extractor
        self.k = k
        self.batch_size = batch_size
        self.features = extract(extractor, real_images, batch_size)
        self.statistics = gaussian_statistics(self.features)
        self.radii = neighbour_radii(self.features, k)
        self.fd_real = half_distance(self.features, seed=seed, splits=splits)

    def score(self, fake: Tensor) -> Scores:
        """Scores of fake images, uint8 `(m, c, h, w)`, m > k and m >= 2.

        Raises:
            UserError: for too few images, images that are not uint8 `(m, c, h, w)`, or features that are not finite.
        """
        _check_count("fake", len(fake), max(2, self.k + 1))
        features = extract(self.extractor, fake, self.batch_size)
        found = overlap(self.features, features, self.k, real_radii=self.radii)
        return Scores(
            fd=frechet_distance(gaussian_statistics(features), self.statistics),
            fd_real=self.fd_real,
            n_fake=len(features),
            n_real=len(self.features),
            **dataclasses.asdict(found),
        )


def evaluate(fake: Tensor, real: Tensor, extractor: FeatureExtractor, *, seed: int = 0, k: int = 3) -> Scores:
    """Scores of one set of fake images; for several sets against the same real images keep a `Reference`.

    Args:
        fake: uint8 `(m, c, h, w)`.
        real: uint8 `(n, c, h, w)`.
        extractor: uint8 images to features `(b, d)`.
        seed: of the random halvings behind `fd_real`.
        k: neighbours behind precision and recall.

    Raises:
        UserError: for too few images, images that are not uint8, or unusable features.
    """
    return Reference(real, extractor, seed=seed, k=k).score(fake)


def half_distance(features: Tensor, *, seed: int = 0, splits: int = 4) -> float:
    """Mean Frechet distance between two disjoint random halves of features `(n, d)`, n >= 4, over `splits` halvings.

    An odd sample is left out of each halving. The same seed gives the same halves.
    """
    check_features(features)
    _check_count("real", len(features), 4)
    generator = torch.Generator().manual_seed(seed)
    half = len(features) // 2
    total = 0.0
    for _ in range(splits):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        first, second = features[order[:half]], features[order[half : 2 * half]]
        total += frechet_distance(gaussian_statistics(first), gaussian_statistics(second))
    return total / splits


def _check_count(kind: str, count: int, least: int) -> None:
    if count < least:
        raise UserError(f"{count} {kind} images; expected at least {least}; draw or load more images")
