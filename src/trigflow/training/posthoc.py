"""Power-function averages of any length, after training, from snapshots of a few lengths.

After n updates the power-function average of exponent gamma weighs the weights of step k by exactly
`P(k) - P(k - 1)`, where P is the cumulative profile::

    P(k) = (k / n)^a,   a = gamma + 1,   k <= n;      P(k) = 1 afterwards

Averages are linear in the weights, so a combination `sum_i c_i average_i` of snapshots is the average whose cumulative
profile is `sum_i c_i P_i`. Post-hoc reconstruction chooses the c_i that bring it closest to the profile P wanted::

    minimize  int_0^n (P - sum_i c_i P_i)^2 dk + noise |c|^2     subject to  sum_i c_i = 1

The source fits the densities `dP/dk` instead. The distance of the cumulative profiles is, up to a factor, the expected error
when the weights move like a random walk, neighbouring steps being almost alike; the densities' is that of weights that are
independent at every step. It gives errors a few times smaller at long lengths and equal ones elsewhere. All products of
profiles have a closed form; P being the same function for whole k and between, there is nothing to discretize.

How many snapshots, of lengths 0.05 and 0.10 at equal distances from the start, bring the expected error below 1e-4 of the
distance that the weights have moved:

    ==================  ======================
    length              snapshots of each
    ==================  ======================
    0.07 to 0.13        16
    0.04 to 0.20        32
    0.025 to 0.25       64
    0.015 to 0.25       128
    ==================  ======================

Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), section 3.2 and appendix C.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from trigflow.models.model import Model, unloaded
from trigflow.models.weights import load_weights
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import read_tensors, write_folder, write_json
from trigflow.runtime.places import check_place
from trigflow.runtime.values import number, whole
from trigflow.training.config import read_config
from trigflow.training.ema import power_exponent
from trigflow.training.snapshots import Snapshot, list_snapshots

Array = npt.NDArray[np.float64]

NOISE = {"fp32": 1e-7, "fp16": 2e-4}
"""Relative error of one weight in a snapshot: of its number format, and in fp32 of the average's own rounding."""
LARGE_ERROR = 1e-3
"""Expected error from which `trigflow ema` warns."""


@dataclass(frozen=True)
class Fit:
    """How snapshots are combined.

    Attributes:
        coefficients: c_i, one for each snapshot; their sum is 1.
        error: expected error, relative to the distance that the weights have moved since the start (root mean square).
    """

    coefficients: tuple[float, ...]
    error: float


@dataclass(frozen=True)
class Reconstruction:
    """An average that was not tracked.

    Attributes:
        model: the run's model with these weights, on the CPU; its configuration names the new length.
        sigma_rel: relative length of the average.
        iteration: the iteration it ends at.
        snapshots: what it was made from.
        fit: how.
    """

    model: Model
    sigma_rel: float
    iteration: int
    snapshots: tuple[Snapshot, ...]
    fit: Fit

    def save(self, folder: str | Path) -> Path:
        """Write a model folder that `trigflow.load` takes, with the coefficients in `reconstruction.json`; all or nothing.
        Raises a UserError when the folder exists and is not empty, or cannot be written."""
        folder = check_place(folder, "new folder")
        facts: dict[str, Any] = {
            "sigma_rel": self.sigma_rel,
            "iteration": self.iteration,
            "expected_error": self.fit.error,
            "coefficients": {s.path.name: c for s, c in zip(self.snapshots, self.fit.coefficients, strict=True)},
        }

        def fill(target: Path) -> None:
            self.model.save(target)
            write_json(target / "reconstruction.json", facts)

        write_folder(folder, fill)
        return folder


def profile_product(a: Array | float, n: Array | float, b: Array | float, m: Array | float) -> Array:
    """`int (1 - P_a)(1 - P_b) dk` of the cumulative profiles `P_a = (k/n)^a` and `P_b = (k/m)^b`, elementwise.

    With `l = min(n, m)`, `u = (l/n)^a` and `v = (l/m)^b`, one of which is 1, and neither of which can overflow::

        l (1 - u / (a + 1) - v / (b + 1) + u v / (a + b + 1))

    1 - P is what reaches beyond k: it ends at n, so the integral is finite. With coefficients of sum 1 it has the same
    distances as P.
    """
    end = np.minimum(n, m)
    u = np.exp(a * np.log(end / n))
    v = np.exp(b * np.log(end / m))
    return np.asarray(end * (1 - u / (a + 1) - v / (b + 1) + u * v / (a + b + 1)))


def fit_profiles(
    updates: Sequence[int], sigma_rels: Sequence[float], end: float, sigma_rel: float, noise: float = NOISE["fp32"]
) -> Fit:
    """The combination of snapshots that comes closest to a power-function average; see the head of this module.

    Args:
        updates: updates of each snapshot's average, at least 1.
        sigma_rels: relative length of each.
        end: updates after which the wanted average ends.
        sigma_rel: its relative length.
        noise: relative error of a weight in a snapshot, taken to be independent in each of them. It keeps the coefficients
            from growing where profiles are nearly dependent.

    Raises:
        UserError: for a length outside (0, 0.28).
    """
    n = np.asarray(updates, dtype=np.float64)
    a = np.asarray([power_exponent(s) + 1 for s in sigma_rels])
    wanted = power_exponent(sigma_rel) + 1
    size = float(profile_product(wanted, end, wanted, end))
    gram = profile_product(a[:, None], n[:, None], a[None, :], n[None, :]) / size
    right = profile_product(a, n, wanted, end) / size
    ridged = gram + noise**2 * np.eye(len(n))
    free, ones = np.linalg.solve(ridged, np.stack([right, np.ones(len(n))], axis=1)).T
    c = free + (1 - free.sum()) / ones.sum() * ones  # the multiplier of the constraint
    square = 1 - 2 * c @ right + c @ ridged @ c
    return Fit(tuple(c.tolist()), math.sqrt(max(float(square), 0.0)))


def reconstruct(
    run: str | Path, sigma_rel: float, *, iteration: int | None = None, network: nn.Module | None = None, progress: bool = False
) -> Reconstruction:
    """The power-function average of this length at the end of an iteration, from the snapshots of a run.

    One snapshot is in memory at a time, beside the result and its sum in float64: about four copies of the weights.
    Buffers are those of the newest snapshot used.

    Args:
        run: a run folder, finished or not, trained with `ema.snapshot_every`.
        sigma_rel: relative length of the average, in (0, 0.28).
        iteration: where it ends, from the first snapshot to the last; by default at the last. Best is one of a snapshot.
        network: the module that the run trained, where it was one of your own; the weights are put into it.
        progress: draw a progress bar on stderr.

    Raises:
        UserError: for a run without snapshots, a length or iteration out of range, a damaged snapshot or one of another
            network.
    """
    number(sigma_rel=sigma_rel)
    if iteration is not None:
        whole(iteration=iteration)
    run = Path(run)
    used, updates, iteration = choose_snapshots(run, sigma_rel, iteration)
    noise = max(NOISE[snapshot.dtype] for snapshot in used)
    fit = fit_profiles([s.updates for s in used], [s.sigma_rel for s in used], updates, sigma_rel, noise)
    description = run / "model.json"
    model = unloaded(description if description.is_file() else run / "ema" / "model.json", network)
    weights = list(model.network.parameters())
    sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    pairs = list(zip(used, fit.coefficients, strict=True))
    for snapshot, c in tqdm(pairs, desc="reconstructing", unit="snapshot", disable=not progress):
        load_weights(model.network, read_tensors(snapshot.path, "snapshot"), f"snapshot '{snapshot.path}'")
        for total, weight in zip(sums, weights, strict=True):
            total.add_(weight.double(), alpha=c)
    for total, weight in zip(sums, weights, strict=True):
        weight.copy_(total)
    model.origin["ema_sigma_rel"] = sigma_rel
    return Reconstruction(model, sigma_rel, iteration, tuple(used), fit)


def choose_snapshots(run: Path, sigma_rel: float, iteration: int | None) -> tuple[list[Snapshot], float, int]:
    """The snapshots to combine, and the updates and iteration at which the average ends.

    Those up to the iteration; when it has none of its own, also those of the next one that has. Raises a UserError as
    `reconstruct`.
    """
    if not 0 < sigma_rel < 0.28:
        raise UserError(f"relative EMA width {sigma_rel}; expected a number in (0, 0.28); change --sigma-rel")
    read_config(run)  # or it is no run folder
    snapshots = list_snapshots(run)
    if not snapshots:
        raise UserError(
            f"'{run}' holds no snapshots of averaged weights; expected files in '{run / 'ema'}'; "
            "train with --ema.snapshot-every N"
        )
    points = sorted({(snapshot.iteration, snapshot.updates) for snapshot in snapshots})
    first, last = points[0][0], points[-1][0]
    iteration = last if iteration is None else iteration
    if not first <= iteration <= last:
        raise UserError(
            f"iteration {iteration} has no snapshots around it; expected one from {first} to {last}, the first and last "
            "snapshot; change --iteration"
        )
    updates = float(np.interp(iteration, [at for at, _ in points], [count for _, count in points]))
    until = min(at for at, _ in points if at >= iteration)
    return [snapshot for snapshot in snapshots if snapshot.iteration <= until], updates, iteration
