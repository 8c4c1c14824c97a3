"""Numbers that went wrong, by what the run itself has counted."""

from __future__ import annotations

from trigflow.lab.doctor.outcome import Diagnosis, NotSeen, Outcome, Sound
from trigflow.lab.doctor.run_record import RunRecord

OFTEN = 0.05
"""Share of steps that overflow where the scale of the loss has found its size: one in thousands."""
SMALL = 16.0
"""Scale of the loss below which gradients of float16 are hardly better than unscaled ones."""
MANY = 0.01
"""Share of steps that are spikes from which on they are no chance."""


def non_finite(record: RunRecord) -> Outcome:
    """Steps whose loss or gradient was infinite or no number; they change nothing and are counted in `skipped`."""
    name, skipped = "non-finite", _count(record, "skipped")
    if not skipped:
        return Sound(name, f"no step of {record.iteration} was left out")
    half = record.config.loop.precision != "fp32"
    return Diagnosis(
        name,
        "Some steps had a loss or gradient that was not finite.",
        f"{skipped} of {record.iteration} steps were left out, the first by iteration {_first(record, 'skipped')}.",
        _lower(record)
        + ("; try loop.precision fp32 for some steps to see whether the precision is the cause." if half else "."),
    )


def gone_back(record: RunRecord) -> Outcome:
    """Returns to a checkpoint, because steps failed one after the other or weights and moments were no numbers any more."""
    name, rollbacks = "rollbacks", _count(record, "rollbacks")
    if not rollbacks:
        return Sound(name, "the run never went back to a checkpoint")
    return Diagnosis(
        name,
        "The run went back to a checkpoint because its numbers went wrong.",
        f"It went back {rollbacks} times of at most {record.config.guard.rollbacks}, the first time to before iteration "
        f"{_first(record, 'rollbacks')}.",
        f"{_lower(record)}; where the run now goes on well, nothing has to be done.",
    )


def loss_scale(record: RunRecord) -> Outcome:
    """In float16 the scale of the loss settles where overflows are rare, far above 1."""
    name, scale = "loss-scale", record.value("loss_scale")
    if record.config.loop.precision != "fp16" or scale is None:
        return Sound(name, f"{record.config.loop.precision} needs none")
    overflows = _count(record, "overflows")
    seen = f"{overflows} of {record.iteration} steps overflowed, and the loss is scaled by {scale:g}"
    if scale >= SMALL and overflows <= max(OFTEN * record.iteration, 20):
        return Sound(name, seen)
    return Diagnosis(
        name,
        "The gradient does not fit into float16.",
        f"{seen[0].upper()}{seen[1:]}.",
        f"Set loop.precision bf16, which has the range of float32, or fp32; or {_lower(record).lower()}.",
    )


def spikes(record: RunRecord) -> Outcome:
    """Losses or gradient norms far above those of the steps before."""
    name, found = "spikes", _count(record, "spikes")
    seen = f"{found} of {record.iteration} steps had a loss or gradient norm far above those before"
    if record.config.guard.spikes == "off":
        return NotSeen(name, "guard.spikes is off")
    if found <= max(MANY * record.iteration, 3):
        return Sound(name, seen)
    return Diagnosis(
        name,
        "The loss or the gradient spikes.",
        f"{seen[0].upper()}{seen[1:]}, the first by iteration {_first(record, 'spikes')}.",
        f"{_lower(record)}, or leave such steps out with guard.spikes skip.",
    )


def _count(record: RunRecord, name: str) -> int:
    """At the end of the log; 0 in the log of a version that did not count it."""
    return int(record.lines[-1].get(name) or 0)


def _first(record: RunRecord, name: str) -> int:
    """Iteration of the first line with a count that is not zero."""
    return next(int(line["iteration"]) for line in record.lines if line.get(name))


def _lower(record: RunRecord) -> str:
    return f"Lower optimizer.lr (now {record.config.optimizer.lr:g}) or set optimizer.clip to 1"
