"""How far two sets of features overlap, seen through k-nearest-neighbour balls.

Around each point of a set, a ball reaches to its k-th nearest neighbour in that set (itself not counted). The union of the
balls stands for the region that the set occupies::

    precision = share of fake points inside the union of the real balls    (do samples look real?)
    recall    = share of real points inside the union of the fake balls    (is all of the data covered?)
    density   = real balls that a fake point lies in, on average, divided by k
    coverage  = share of real balls with a fake point inside

Source of precision and recall: Kynkaanniemi et al., *Improved Precision and Recall Metric for Assessing Generative Models*,
NeurIPS 2019, arXiv 1904.06991, equations 1 and 2 and k = 3. Of density and coverage: Naeem et al., *Reliable Fidelity and
Diversity Metrics for Generative Models*, ICML 2020, arXiv 2002.09797. A single real outlier, whose ball is large, raises
precision more than density; a single fake outlier raises recall but not coverage.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trigflow.evaluation.frechet import check_features, check_same_dimension
from trigflow.evaluation.shared_work import ALONE, Processes
from trigflow.runtime.errors import UserError

NEIGHBOURS = 3
"""Which neighbour the balls reach to."""
# Rounding of squared distances in float64, relative to the squared norms: a point on the edge of a ball is inside it.
TOLERANCE = 1e-12


@dataclass(frozen=True)
class PrecisionRecall:
    """Both in [0, 1], higher is better."""

    precision: float
    recall: float


@dataclass(frozen=True)
class Overlap:
    """Precision, recall and coverage in [0, 1], density >= 0; higher is better.

    Two sets of n samples of one distribution have, on average, density 1 and coverage
    `1 - prod_{i=1..k} (n - i) / (2n - i)`, which is nearly `1 - 2^-k`.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, chunk: int = 512) -> PrecisionRecall:
    """Precision and recall of `fake` against `real`; arguments and errors as those of `overlap`."""
    found = overlap(real, fake, k, chunk)
    return PrecisionRecall(found.precision, found.recall)


def overlap(
    real: Tensor, fake: Tensor, k: int = 3, chunk: int = 512, *, real_radii: Tensor | None = None, processes: Processes = ALONE
) -> Overlap:
    """Precision, recall, density and coverage of `fake` against `real`.

    All four depend on the numbers of samples: the balls shrink as a set grows. Compare figures at equal n, m and k only.

    Args:
        real: features `(n, d)`, n > k.
        fake: features `(m, d)`, m > k.
        k: which neighbour a ball reaches to, at least 1.
        chunk: rows of the distance matrix held at a time (`chunk * max(n, m)` float64 numbers).
        real_radii: `neighbour_radii(real, k)`, where it is at hand.
        processes: those that share the rows; each has all features, and each gets the result, the same for any number of them.

    Raises:
        UserError: for features that are not finite or not `(n, d)`, different dimensions, or too few samples for k.
    """
    check_features(real)
    check_features(fake)
    check_same_dimension(real, fake)
    if real_radii is None:
        real_radii = neighbour_radii(real, k, chunk, processes)
    fake_radii = neighbour_radii(fake, k, chunk, processes)
    centres = real.detach().to(torch.float64)
    middle = centres.mean(0)
    centres = centres - middle
    points = fake.detach().to(centres) - middle
    slack = TOLERANCE * centres.square().sum(1)
    reach = real_radii.to(centres) + slack

    def count_share() -> tuple[int, Tensor, Tensor]:
        """Fake points in some real ball; and for each real point the fake ones in its ball, and fake balls it lies in."""
        covered = 0
        within, around = torch.zeros(2, len(centres), dtype=torch.int64)
        for start in range(0, len(points), chunk)[processes.rank :: processes.count]:
            rows = points[start : start + chunk]
            row_slack = TOLERANCE * rows.square().sum(1, keepdim=True)
            squared = _squared_distances(rows, centres)
            in_real = squared <= reach + row_slack
            in_fake = squared <= fake_radii[start : start + chunk, None].to(centres) + row_slack + slack
            covered += int(in_real.any(1).sum())
            within += in_real.sum(0).cpu()
            around += in_fake.sum(0).cpu()
        return covered, within, around

    shares = processes.together(count_share)
    covered = sum(share[0] for share in shares)
    within = torch.stack([share[1] for share in shares]).sum(0)
    around = torch.stack([share[2] for share in shares]).sum(0)
    return Overlap(
        precision=covered / len(points),
        recall=int((around > 0).sum()) / len(centres),
        density=int(within.sum()) / (k * len(points)),
        coverage=int((within > 0).sum()) / len(centres),
    )


def neighbour_radii(features: Tensor, k: int = 3, chunk: int = 512, processes: Processes = ALONE) -> Tensor:
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

    def radii_of(start: int) -> Tensor:
        squared = _squared_distances(points[start : start + chunk], points)
        rows = torch.arange(len(squared), device=squared.device)
        squared[rows, rows + start] = torch.inf
        return squared.kthvalue(k, dim=1).values

    starts = range(0, len(points), chunk)
    shares = processes.together(lambda: [radii_of(start).cpu() for start in starts[processes.rank :: processes.count]])
    parts = [shares[number % processes.count][number // processes.count] for number in range(len(starts))]
    return torch.cat(parts).to(points.device)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """`|a_i - b_j|^2` as `|a_i|^2 + |b_j|^2 - 2 a_i . b_j`, `(n, d), (m, d)` to `(n, m)`; inputs centred, float64."""
    squared = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
    return squared.clamp_(min=0)
