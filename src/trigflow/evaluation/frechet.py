"""Frechet distance between two sets of feature vectors, each seen as a Gaussian.

For Gaussians of means `mu1, mu2` and covariances `C1, C2` the squared 2-Wasserstein distance is::

    d^2 = |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^{1/2})

With features of an Inception network this number is the FID (Heusel et al., NeurIPS 2017, arXiv 1706.08500); with any other
features it is a different figure on a different scale.

Note on the number of samples. The estimate is biased upward, by an amount that falls as 1/n. For two sets of n and m
samples of one Gaussian whose covariance has eigenvalues `l_i`, to first order::

    E[d^2] = (1/n + 1/m) ( sum_i l_i  +  sum_ij (1 + [i = j]) l_i l_j / (2 (l_i + l_j)) )

which for unit covariance in d dimensions is `(1/n + 1/m) (d + d (d + 1) / 4)`. Compare distances only at equal n and m.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trigflow.runtime.errors import UserError


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """Mean and covariance of a set of features.

    Attributes:
        mean: `(d,)`, float64.
        covariance: `(d, d)`, float64, with the unbiased divisor n - 1. Singular when `n <= d`, which is allowed.
        n: number of samples behind the two.
    """

    mean: Tensor
    covariance: Tensor
    n: int


class RunningStatistics:
    """Mean and covariance of features that arrive in pieces; the pieces are not kept.

    Two sets of n and m samples, with means `a, b` and scatter matrices `A, B` (sums of outer products around the own mean),
    have together::

        mean    = a + (b - a) m / (n + m)
        scatter = A + B + (b - a)(b - a)^T n m / (n + m)

    Source: Chan, Golub and LeVeque, *Updating formulae and a pairwise algorithm for computing sample variances*, 1979.
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Add features of shape `(n, d)`; any floating dtype, accumulated in float64. Nothing changes on an error.

        Raises:
            UserError: if the shape is not `(n, d)`, d differs from earlier pieces, or a value is not finite.
        """
        check_features(features)
        if len(features) == 0:
            return
        values = features.detach().to(torch.float64)
        mean = values.mean(0)
        centred = values - mean
        self._add(len(values), mean, centred.T @ centred)

    def merge(self, other: RunningStatistics) -> None:
        """Add everything that `other` has seen, for instance in another process."""
        if other._mean is not None and other._scatter is not None:
            self._add(other.n, other._mean, other._scatter)

    def result(self) -> GaussianStatistics:
        """Statistics of all samples so far.

        Raises:
            UserError: with fewer than 2 samples, for which there is no covariance.
        """
        if self.n < 2 or self._mean is None or self._scatter is None:
            raise UserError(f"{self.n} samples have no covariance; expected at least 2; add more samples")
        return GaussianStatistics(self._mean.clone(), self._scatter / (self.n - 1), self.n)

    def _add(self, m: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None or self._scatter is None:
            self.n, self._mean, self._scatter = m, mean, scatter
            return
        check_same_dimension(self._mean, mean)
        total = self.n + m
        delta = mean.to(self._mean.device) - self._mean
        self._mean = self._mean + delta * (m / total)
        self._scatter = self._scatter + scatter.to(delta.device) + torch.outer(delta, delta) * (self.n * m / total)
        self.n = total


def gaussian_statistics(features: Tensor) -> GaussianStatistics:
    """Mean and covariance of features `(n, d)`, n >= 2, in float64 whatever their dtype.

    Raises:
        UserError: if the shape is not `(n, d)`, n < 2, or a value is not finite.
    """
    running = RunningStatistics()
    running.update(features)
    return running.result()


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """`|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^{1/2})`, a number >= 0 in squared units of the features.

    `C1 C2` has the eigenvalues of the symmetric matrix `C1^{1/2} C2 C1^{1/2}`, so the trace of its root is the sum of their
    roots: two symmetric eigenproblems in float64, with eigenvalues clamped at zero, never a complex number. Singular
    covariances are fine. Rounding leaves an error of about 1e-8 times the largest variance times d.

    Raises:
        UserError: if the two have different dimensions.
    """
    check_same_dimension(a.mean, b.mean)
    mean_a, mean_b = a.mean.to(torch.float64), b.mean.to(a.mean.device, torch.float64)
    cov_a, cov_b = a.covariance.to(torch.float64), b.covariance.to(a.mean.device, torch.float64)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root_a @ cov_b @ root_a
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_of_root
    return max(0.0, float(distance))


def check_features(features: Tensor) -> None:
    """Raise a UserError unless `features` is a floating tensor `(n, d)` of finite values."""
    if features.ndim != 2 or not features.is_floating_point():
        raise UserError(
            f"features of shape {tuple(features.shape)} and type {features.dtype}; "
            "expected a floating tensor of shape (n, d); give one feature vector for each sample"
        )
    bad = int((~torch.isfinite(features)).any(dim=1).sum())
    if bad:
        raise UserError(
            f"features of {bad} of {len(features)} samples are not finite; expected finite numbers; "
            "look for NaN or overflow in the samples or in the feature network"
        )


def check_same_dimension(a: Tensor, b: Tensor) -> None:
    """Raise a UserError unless the last axes of `a` and `b` are equally long."""
    if a.shape[-1] != b.shape[-1]:
        raise UserError(
            f"features of {a.shape[-1]} and {b.shape[-1]} dimensions; expected the same for both sets; "
            "compute both with one feature extractor"
        )
