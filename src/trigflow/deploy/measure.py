"""Measuring the variants of a model against each other: latency, throughput, difference."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trigflow.deploy.engine import Engine
from trigflow.deploy.variants import VARIANTS
from trigflow.models.model import Model
from trigflow.runtime.errors import UserError, first_line

LEAST = 5
"""Draws of each variant and batch, however long they take."""
TOLERANCE = 2
"""Levels of 255 by which the pixels of a variant that is picked may differ from plain float32."""


@dataclass(frozen=True)
class Measurement:
    """One variant at one batch size: noise to bytes on the CPU.

    Attributes:
        variant, batch: what was measured.
        draws: how often.
        p50, p95, p99: percentiles of the milliseconds of a draw.
        per_second: images a second at the median.
        difference: largest difference of a pixel from plain float32, in levels of 255.
        changed: share of pixels that differ at all.
    """

    variant: str
    batch: int
    draws: int
    p50: float
    p95: float
    p99: float
    per_second: float
    difference: int
    changed: float


@dataclass(frozen=True)
class Report:
    """What `measure` found.

    Attributes:
        steps: evaluations (or solver steps) of a draw.
        device: where.
        threads: of PyTorch on the CPU.
        rows: by batch, then by variant.
        skipped: from variants that do not work here to the reason.
        pick: the variant to use.
        tolerance: largest difference, in levels, that the pick was allowed.
    """

    steps: int
    device: str
    threads: int
    rows: tuple[Measurement, ...]
    skipped: dict[str, str]
    pick: str
    tolerance: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "torch": torch.__version__}


def measure(
    model: Model,
    *,
    steps: int | None = None,
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
    seconds: float = 1.0,
    variants: Sequence[str] = (),
    tolerance: int = TOLERANCE,
) -> Report:
    """Draw the same noise with every variant, in turn, so that whatever else the machine does hits all of them alike.

    The pick is the variant with the lowest geometric mean, over the batch sizes, of its median time over the shortest one,
    among those whose pixels differ from plain float32 by at most `tolerance` levels at every batch size.

    Args:
        model: to be measured; see `Engine`.
        steps: see `Engine`.
        batches: batch sizes.
        seconds: for each variant and batch size; at least 5 draws are made.
        variants: names; all but `compiled`, which takes minutes to build, by default. Plain is always among them.
        tolerance: see above.

    Raises:
        UserError: for an unknown variant, a batch size below 1, or seconds that are not positive.
    """
    if not batches or min(batches) < 1:
        raise UserError(f"batch sizes {list(batches)}; expected one or more of at least 1; correct --batches")
    if not (math.isfinite(seconds) and seconds > 0):
        raise UserError(f"{seconds} seconds for each measurement; expected a positive number; correct --seconds")
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        raise UserError(f"unknown variant '{unknown[0]}'; expected some of {', '.join(VARIANTS)}; correct --variants")
    names = variants or [name for name in VARIANTS if name != "compiled"]
    engines = {"plain": Engine(model, steps=steps, variant="plain")}
    skipped = {} if variants else {"compiled": "takes minutes to build; name it to measure it"}
    for name in dict.fromkeys(names):
        if name not in engines:
            try:
                engines[name] = Engine(model, steps=steps, variant=name)
            except UserError as error:
                skipped[name] = str(error)
    rows = []
    for batch in dict.fromkeys(batches):
        found, failed = _one_batch(engines, batch, seconds)
        rows += found
        skipped |= failed
        engines = {name: engine for name, engine in engines.items() if name not in failed}
    rows = [row for row in rows if row.variant in engines]
    plain = engines["plain"]
    return Report(
        plain.steps, str(model.device), torch.get_num_threads(), tuple(rows), skipped, pick(rows, tolerance), tolerance
    )


def pick(rows: Sequence[Measurement], tolerance: int = TOLERANCE) -> str:
    """The variant to use; see `measure`."""
    shortest = {batch: min(row.p50 for row in rows if row.batch == batch) for batch in {row.batch for row in rows}}
    slowness: dict[str, list[float]] = {}
    for row in rows:
        slowness.setdefault(row.variant, []).append(math.log(row.p50 / shortest[row.batch]))
    exact = {name for name in slowness if all(row.difference <= tolerance for row in rows if row.variant == name)}
    return min(exact, key=lambda name: (sum(slowness[name]) / len(slowness[name]), name))


def _one_batch(engines: dict[str, Engine], batch: int, seconds: float) -> tuple[list[Measurement], dict[str, str]]:
    """Rows of all variants at one batch size, and the variants that failed at it."""
    plain = engines["plain"].model
    noise = [plain.noise(0, k, 0, batch) for k in range(1 + engines["plain"].fresh_needed())]
    labels = torch.arange(batch) % plain.num_classes if plain.num_classes else None

    def draw(engine: Engine) -> Tensor:
        return engine.draw(noise[0], labels, fresh=noise[1:])

    images: dict[str, Tensor] = {}
    failed: dict[str, str] = {}
    for name, engine in engines.items():
        try:
            images[name] = draw(engine)
            draw(engine)
        except (UserError, RuntimeError) as error:
            if name == "plain":
                raise
            failed[name] = f"failed at batch {batch}: {first_line(error)}"
    working = [name for name in engines if name not in failed]
    times: dict[str, list[float]] = {name: [] for name in working}
    while left := [name for name in working if len(times[name]) < LEAST or sum(times[name]) < seconds]:
        for name in left:
            started = time.perf_counter()
            draw(engines[name])
            times[name].append(time.perf_counter() - started)
    rows = []
    for name in working:
        p50, p95, p99 = (float(p) * 1e3 for p in np.percentile(times[name], (50, 95, 99)))
        apart = (images[name].int() - images["plain"].int()).abs()
        changed = float((apart > 0).double().mean())
        rows.append(Measurement(name, batch, len(times[name]), p50, p95, p99, batch / p50 * 1e3, int(apart.max()), changed))
    return rows, failed


def describe(report: Report) -> str:
    """The report as a table of text, the pick last."""
    header = "batch  variant       p50 ms    p95 ms    p99 ms   images/s  levels  changed"
    lines = [f"{report.steps} steps on {report.device}, {report.threads} threads", "", header]
    for row in report.rows:
        lines.append(
            f"{row.batch:>5}  {row.variant:<10}  {row.p50:>8.2f}  {row.p95:>8.2f}  {row.p99:>8.2f}  {row.per_second:>9.0f}  "
            f"{row.difference:>6}  {row.changed:.2%}"
        )
    lines += [""] + [f"not measured: {name}: {reason}" for name, reason in report.skipped.items()]
    lines.append(f"pick: {report.pick} (fastest over these batches within {report.tolerance} levels of plain)")
    return "\n".join(lines)
