"""Precision and recall of samples, from k-nearest-neighbour balls in feature space.

Around each point of a set, a ball reaches to its k-th nearest neighbour in that set (itself not counted). The union of the
balls stands for the region that the set occupies::

    precision = share of fake points inside the union of the real balls    (do samples look real?)
    recall    = share of real points inside the union of the fake balls    (is all of the data covered?)

Source: Kynkaanniemi et al., *Improved Precision and Recall Metric for Assessing Generative Models*, NeurIPS 2019,
arXiv 1904.06991, equations 1 and 2 and k = 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trigflow.errors import UserError
from trigflow.metrics.frechet import check_features, check_same_dimension

# Rounding of squared distances in float64, relative to the squared norms: a point on the edge of a ball is inside it.
TOLERANCE = 1e-12


@dataclass(frozen=True)
class PrecisionRecall:
    """Both in [0, 1], higher is better."""

    precision: float
    recall: float


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, chunk: int = 512) -> PrecisionRecall:
    """Precision and recall of `fake` against `real`.

    Both depend on the numbers of samples: the balls shrink as a set grows. Compare figures at equal n, m and k only.

    Args:
        real: features `(n, d)`, n > k.
        fake: features `(m, d)`, m > k.
        k: which neighbour a ball reaches to, at least 1.
        chunk: rows of the distance matrix held at a time (`chunk * max(n, m)` float64 numbers).

    Raises:
        UserError: for features that are not finite or not `(n, d)`, different dimensions, or too few samples for k.
    """
    check_features(real)
    check_features(fake)
    check_same_dimension(real, fake)
    return PrecisionRecall(
        precision=covered_share(fake, real, neighbour_radii(real, k, chunk), chunk),
        recall=covered_share(real, fake, neighbour_radii(fake, k, chunk), chunk),
    )


def neighbour_radii(features: Tensor, k: int = 3, chunk: int = 512) -> Tensor:
    """Squared distance from each point to its k-th nearest neighbour among the others: `(n, d)` to `(n,)`, float64."""
    check_features(features)
    if k < 1 or chunk < 1:
        raise UserError(f"k={k}, chunk={chunk}; expected both at least 1; correct the argument")
    if len(features) <= k:
        raise UserError(
            f"{len(features)} samples have no {k} nearest neighbours; expected more than k={k} samples; "
            "use more samples or a smaller k"
        )
    points = features.detach().to(torch.float64)
    points = points - points.mean(0)
    radii = []
    for start in range(0, len(points), chunk):
        squared = _squared_distances(points[start : start + chunk], points)
        rows = torch.arange(len(squared), device=squared.device)
        squared[rows, rows + start] = torch.inf
        radii.append(squared.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def covered_share(points: Tensor, centres: Tensor, squared_radii: Tensor, chunk: int = 512) -> float:
    """Share of `points` `(m, d)` that lie in at least one of the balls around `centres` `(n, d)`, edges included."""
    check_features(points)
    check_features(centres)
    check_same_dimension(points, centres)
    centres = centres.detach().to(torch.float64)
    middle = centres.mean(0)
    centres = centres - middle
    points = points.detach().to(centres) - middle
    reach = squared_radii.to(centres) + TOLERANCE * centres.square().sum(1)
    inside = 0
    for rows in points.split(chunk):
        slack = TOLERANCE * rows.square().sum(1, keepdim=True)
        inside += int((_squared_distances(rows, centres) <= reach + slack).any(dim=1).sum())
    return inside / max(1, len(points))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """`|a_i - b_j|^2` as `|a_i|^2 + |b_j|^2 - 2 a_i . b_j`, `(n, d), (m, d)` to `(n, m)`; inputs centred, float64."""
    squared = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
    return squared.clamp_(min=0)
