"""What can be wrong with a training, how it shows, and what to do about it: one function for each.

Numbers that went wrong are told by what the run itself has counted. Every other check looks at the medians of the last quarter
of the log, so that neither the first steps nor a single line decides. The thresholds lie between what healthy runs show and
what runs broken on purpose show, with a wide margin to both sides.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from trigflow.lab.doctor.run_record import LogLine, RunRecord
from trigflow.objectives import StudentObjective
from trigflow.training.instruments import LONGER


@dataclass(frozen=True)
class Diagnosis:
    """Something is wrong."""

    name: str = field(default="", kw_only=True)
    """Of the check."""
    title: str
    """In plain words."""
    evidence: str
    """Numbers from the run."""
    remedy: str
    """Which setting to change."""


@dataclass(frozen=True)
class Sound:
    """Looked at, nothing found."""

    name: str = field(default="", kw_only=True)
    seen: str
    """What was looked at, with numbers."""


@dataclass(frozen=True)
class NotSeen:
    """Could not be looked at."""

    name: str = field(default="", kw_only=True)
    reason: str
    """Why, and what would help."""


Outcome = Diagnosis | Sound | NotSeen
Check = Callable[[RunRecord], Outcome]

CHECKS: dict[str, Check] = {}
"""By name, in the order in which they are reported, which is that of this file: causes before what they cause."""


def check(name: str) -> Callable[[Check], Check]:
    """Decorator that makes a function a check of this name."""

    def add(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return add


OFTEN = 0.05
"""Share of steps that overflow where the scale of the loss has found its size: one in thousands."""
SMALL = 16.0
"""Scale of the loss below which gradients of float16 are hardly better than unscaled ones."""
MANY = 0.01
"""Share of steps that are spikes from which on they are no chance."""


@check("non-finite")
def non_finite(record: RunRecord) -> Outcome:
    """Steps whose loss or gradient was infinite or no number; they change nothing and are counted in `skipped`."""
    skipped = _count(record, "skipped")
    if not skipped:
        return Sound(f"no step of {record.iteration} was left out")
    remedy = _lower(record)
    if record.config.loop.precision != "fp32":
        remedy += "; try loop.precision fp32 for some steps to see whether the precision is the cause"
    return Diagnosis(
        "Some steps had a loss or gradient that was not finite.",
        f"{skipped} of {record.iteration} steps were left out, the first by iteration {_first(record, 'skipped')}.",
        f"{remedy}.",
    )


@check("rollbacks")
def gone_back(record: RunRecord) -> Outcome:
    """Returns to a checkpoint, because steps failed one after the other or weights and moments were no numbers any more."""
    rollbacks = _count(record, "rollbacks")
    if not rollbacks:
        return Sound("the run never went back to a checkpoint")
    return Diagnosis(
        "The run went back to a checkpoint because its numbers went wrong.",
        f"It went back {rollbacks} times of at most {record.config.guard.rollbacks}, the first time to before iteration "
        f"{_first(record, 'rollbacks')}.",
        f"{_lower(record)}; where the run now goes on well, nothing has to be done.",
    )


@check("loss-scale")
def loss_scale(record: RunRecord) -> Outcome:
    """In float16 the scale of the loss settles where overflows are rare, far above 1."""
    scale = record.value("loss_scale")
    if record.config.loop.precision != "fp16" or scale is None:
        return Sound(f"{record.config.loop.precision} needs none")
    overflows = _count(record, "overflows")
    seen = f"{overflows} of {record.iteration} steps overflowed, and the loss is scaled by {scale:g}"
    if scale >= SMALL and overflows <= max(OFTEN * record.iteration, 20):
        return Sound(seen)
    return Diagnosis(
        "The gradient does not fit into float16.",
        _sentence([seen]),
        f"Set loop.precision bf16, which has the range of float32, or fp32; or {_lower(record).lower()}.",
    )


@check("spikes")
def spikes(record: RunRecord) -> Outcome:
    """Losses or gradient norms far above those of the steps before."""
    found = _count(record, "spikes")
    seen = f"{found} of {record.iteration} steps had a loss or gradient norm far above those before"
    if record.config.guard.spikes == "off":
        return NotSeen("guard.spikes is off")
    if found <= max(MANY * record.iteration, 3):
        return Sound(seen)
    return Diagnosis(
        "The loss or the gradient spikes.",
        f"{seen}, the first by iteration {_first(record, 'spikes')}.",
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


STEEP = 8.0
"""||de/dt|| / ||e|| of a time embedding: 0.2 to 2 for positional features, 30 or more for Fourier features of scale 16."""
DIVERGING = 5.0
"""The same at t_max over its median in the middle: about 1 for identity time, 25 for log(sd tan t)."""
MIDDLE = slice(2, 6)
"""Time bins from pi/8 to 3 pi/8."""
GROWN = 1.5
"""Growth of a tangent or error that is no noise of a median."""
HARM = 1.2
"""Inconsistency of a student over that of its start: training should lower it."""
OUTWEIGHED = 10.0
"""Factor between the largest and the smallest e(t) of normalized tangents, which is near 1 where c is small."""
FLAT = 0.1
"""Share of the range of -log e(t) that a working w(t) covers at least."""
UNEVEN = math.log(1.5)
"""Range of log e(t) from which the weighting has something to even out."""
EXPLODED = 20.0
"""exp(w(t)) e(t), which is 1 where the weighting has converged."""
EMA_HARM = 1.1
"""Error of the averaged weights over that of the weights: averaging should lower it."""
EMA_GAIN = 0.95
"""Error with a longer average over that with the run's own."""
SCALE = 1.2
"""Factor between measured and assumed standard deviation."""


SPACING = {"bfloat16": "0.008", "float16": "0.001"}
"""Distance between neighbouring numbers in [1, 2)."""


@check("half-precision")
def half_precision(record: RunRecord) -> Outcome:
    """The time embedding and all that follows up to scales and shifts belong in float32, also under autocast."""
    operations, half = record.value("time_operations"), record.value("time_half")
    if operations is None or half is None:
        return NotSeen(f"the log does not say in which arithmetic the time embedding is computed; {_ask(record)}")
    dtype = next(line["time_dtype"] for line in reversed(record.lines) if line.get("time_dtype"))
    if not half:
        return Sound(f"all {operations:.0f} operations of the time embedding are in {dtype} or finer")
    return Diagnosis(
        "The time embedding is computed in half precision.",
        f"{half:.0f} of the {operations:.0f} operations between t and the image features are in {dtype}, in which a time near "
        f"pi/2 is known to {SPACING.get(dtype, 'few digits')} only; the tangent contains the derivative of that path.",
        "In the network's forward, compute the time embedding and the scales, shifts and gates made from it inside "
        "`with torch.autocast(device_type, enabled=False)` on float32 inputs and weights, or set loop.precision fp32.",
    )


@check("time-embedding")
def steep_embedding(record: RunRecord) -> Outcome:
    """A time embedding that oscillates in t makes the time derivative of the network large at all times.

    Source: Lu and Song 2025, section 4.1, on Fourier features.
    """
    if not record.student:
        return NotSeen("only sct, scd and scd-vsd differentiate the time embedding")
    embedding = record.by_time("embedding_derivative_by_time")
    if embedding is None:
        return NotSeen(f"no derivative of the time embedding in the log and none from the weights; {_ask(record)}")
    typical = _typical(embedding)
    if typical <= STEEP:
        return Sound(f"the time embedding changes by {typical:.3g} times its size in a unit of time")
    conditioning, clock = record.config.network.conditioning, record.value("probe_clock")
    space = record.value("probe_space")
    seen = [f"it changes by {typical:.3g} times its own size in a unit of time; below 1 is usual"]
    if clock is not None and space is not None:
        seen.append(f"the tangent's part through the time is {clock:.3g}, that through the image {space:.3g}")
    fourier = conditioning.time_embedding == "fourier"
    now = f"fourier of scale {conditioning.fourier_scale:g}" if fourier else conditioning.time_embedding
    return Diagnosis(
        "The time embedding is too steep for a consistency model.",
        _sentence(seen),
        f"Train with network.conditioning.time-embedding positional, or fourier with fourier-scale 0.02 (now {now}), the "
        "teacher too; `trigflow convert` gives a teacher that was trained otherwise the stable time embedding.",
    )


@check("tangent-end")
def tangent_at_the_end(record: RunRecord) -> Outcome:
    """The tangent has a factor cos(t), so towards pi/2 it falls, unless the derivative of the network grows as fast.

    Seen in the time embedding, whose derivative grows without bound with `c_noise = log(sd tan t)`, or in the tangent itself.
    Source: Lu and Song 2025, section 4.1.
    """
    if not record.student:
        return NotSeen("only sct, scd and scd-vsd have a tangent")
    embedding, end = record.by_time("embedding_derivative_by_time"), record.value("embedding_derivative_end")
    tangent = record.by_time("tangent_norm_by_time")
    evidence: list[str] = []
    sound: list[str] = []
    if embedding is not None and end is not None:
        middle = _typical(embedding[MIDDLE])
        said = (
            f"the time embedding changes by {end:.3g} times its size in a unit of time at t_max = "
            f"{record.config.process.t_max:.3f}, and by {middle:.3g} times from pi/8 to 3 pi/8"
        )
        (evidence if end > max(DIVERGING * middle, STEEP / 2) else sound).append(said)
    if tangent is not None and getattr(record.config.objective, "segments", 1) == 1:
        middle, last = _typical(tangent[MIDDLE]), tangent[-1]
        if last is not None and middle > 0:
            said = f"the tangent is {last:.3g} in the last time bin, {last / middle:.2g} times what it is from pi/8 to 3 pi/8"
            (evidence if last > middle else sound).append(said)
    if not evidence:
        return Sound("; ".join(sound)) if sound else NotSeen("the log has no tangent by time")
    clock = record.by_time("probe_clock_by_time")
    if clock is not None and clock[-1] is not None:
        sound.append(f"its part through the time is {clock[-1]:.3g} there and {_typical(clock[MIDDLE]):.3g} in the middle")
    conditioning = record.config.network.conditioning
    told = f"(now {conditioning.time_map}, {conditioning.time_embedding})"
    return Diagnosis(
        "The tangent diverges near t = pi/2.",
        _sentence([*evidence, *sound]),
        f"Train with network.conditioning.time-map identity and time-embedding positional {told}, the teacher too; "
        "`trigflow convert` gives a teacher that was trained otherwise the stable time embedding.",
    )


@check("learning-rate")
def learning_rate(record: RunRecord) -> Outcome:
    """Training should make a student more consistent and a teacher's error smaller.

    Of a student: the tangent grows after the warmup, when the loss no longer changes its meaning; or, in a distillation, at
    full strength it is larger than it was for the weights the student started from. (Consistency training follows noisy
    velocities, and the better its network, the more of that noise its derivative passes on.) Of a teacher: the error is
    above its lowest.
    """
    optimizer, objective = record.config.optimizer, record.config.objective
    remedy = f"Lower optimizer.lr (now {optimizer.lr:g}), by a factor of 4 to begin with"
    if not record.student or not isinstance(objective, StudentObjective):
        return _rising_error(record, f"{remedy}, or raise optimizer.warmup (now {optimizer.warmup}).")
    if isinstance(steep_embedding(record), Diagnosis):
        return NotSeen("the tangent of a steep time embedding says nothing of the learning rate; see time-embedding")
    tangent = objective.tangent
    remedy += f"; then raise objective.tangent.warmup (now {tangent.warmup})."
    evidence: list[str] = []
    sound: list[str] = []
    start, now = record.value("probe_start", record.lines), record.value("probe_error_ema")
    if record.config.objective.kind == "scd" and start is not None and now is not None:
        said = f"the tangent at full strength is {now:.3g}, and was {start:.3g} for the weights the student started from"
        (evidence if now > HARM * start else sound).append(said)
    after = [line for line in record.lines if line["iteration"] > tangent.warmup]
    early = after[: max(1, len(after) // 4)]
    before, late = record.value("tangent_norm", early), record.value("tangent_norm")
    if len(after) >= 4 and before is not None and late is not None:
        said = f"the tangent was {before:.3g} when the warmup had ended and is {late:.3g} now"
        (evidence if late > GROWN * before else sound).append(said)
    if evidence:
        return Diagnosis("The learning rate is too high for the tangent warmup.", _sentence([*evidence, *sound]), remedy)
    if sound:
        return Sound("; ".join(sound))
    return NotSeen(f"the tangent warmup of {tangent.warmup} iterations is not over; look again later, or {_ask(record)}")


def _rising_error(record: RunRecord, remedy: str) -> Outcome:
    lines = record.lines
    size = max(1, len(lines) // 8)
    means = [record.value("loss", lines[i : i + size]) for i in range(0, len(lines) - size + 1, size)]
    errors = [error for error in means if error is not None]
    late = record.value("loss")
    if len(errors) < 4 or late is None:
        return NotSeen("the log is too short; look again later")
    lowest = min(errors)
    said = f"the error is {late:.3g} and has been {lowest:.3g}"
    if late <= GROWN * lowest:
        return Sound(said)
    return Diagnosis("The learning rate is too high.", _sentence([said]), remedy)


@check("tangent-constant")
def constant_outweighs_tangent(record: RunRecord) -> Outcome:
    """`||g|| / (||g|| + c)` is near 1 at all times while c is small beside `||g||`, which grows with the root of the data's
    dimensions. Where c outweighs it, errors stay as different as they were, w(t) weighs those times most where they are
    smallest already, and the others drift: trainings in the plane end far away with the published c = 0.1
    (benchmarks/mixture.py)."""
    objective, error = record.config.objective, record.by_time("loss_by_time")
    if not record.student or not isinstance(objective, StudentObjective) or objective.tangent.mode != "normalize":
        return NotSeen("only sct, scd and scd-vsd have a tangent that is normalized, with objective.tangent.mode normalize")
    c, warmup = objective.tangent.c, objective.tangent.warmup
    errors = [value for value in error or [] if value]
    if not errors or record.late[0]["iteration"] < warmup:
        return NotSeen(
            f"no error by time in the log, or the tangent warmup of {warmup} iterations is not over; look again later"
        )
    spread = max(errors) / min(errors)
    seen = f"the squared length of normalized tangents varies over time by a factor of {spread:.3g}"
    if spread <= OUTWEIGHED or not objective.learns_weight:
        return Sound(seen)
    return Diagnosis(
        "The constant of normalized tangents is larger than they are, and misleads the adaptive weighting.",
        _sentence([seen, f"it would not if ||g|| were larger than c = {c:g} at all of them"]),
        f"Lower objective.tangent.c (now {c:g}): the published 0.1 is for images of thousands of numbers; for D numbers "
        "0.1 sqrt(D / 3072). Or switch objective.adaptive-weight off.",
    )


@check("adaptive-weight")
def adaptive_weight(record: RunRecord) -> Outcome:
    """Minimizing `exp(w) e - w` gives `w(t) = -log e(t)`, so that every time has a share of one in the gradient."""
    if not record.config.objective.learns_weight or record.config.objective.probe is None:
        return NotSeen("the run learns no weighting w(t)")
    weight, error = record.by_time("weight_by_time"), record.by_time("loss_by_time")
    if weight is None or error is None:
        return NotSeen(f"no weighting w(t) in the log and no checkpoint; {_ask(record)}")
    pairs = [(w, math.log(e)) for w, e in zip(weight, error, strict=True) if w is not None and e]
    if not pairs:
        return NotSeen("the log has no error by time")
    share = _largest_share(record, weight)
    weights, errors = [w for w, _ in pairs], [e for _, e in pairs]
    moved, needed = max(weights) - min(weights), max(errors) - min(errors)
    seen = (
        f"over time log e(t) spans {needed:.3g} and w(t) {moved:.3g}; exp(w) e is {share:.3g} at most, and 1 where the "
        "weighting has converged"
    )
    if share > EXPLODED:
        return Diagnosis(
            "The adaptive weighting has exploded.",
            f"exp(w) e reaches {share:.3g} at some time, and is 1 where the weighting has converged: few times decide every "
            "step.",
            f"Lower optimizer.lr (now {record.config.optimizer.lr:g}), which is that of the weighting too, or switch "
            "objective.adaptive-weight off.",
        )
    if needed < UNEVEN or moved >= FLAT * needed:
        return Sound(seen)
    if record.iteration < record.config.loop.iterations / 2:
        return NotSeen("the weighting w(t) has not moved yet; look again after half of the run")
    return Diagnosis(
        "The adaptive weighting is dead.",
        f"The error varies over time by a factor of {math.exp(needed):.3g} and w(t) by {math.exp(moved):.3g}.",
        f"Lower optimizer.eps (now {record.config.optimizer.eps:g}; the paper's large presets use 1e-11) or raise optimizer.lr "
        f"(now {record.config.optimizer.lr:g}); if that changes nothing, the weighting is not among the trained parameters.",
    )


@check("ema-short")
def average_too_short(record: RunRecord) -> Outcome:
    """An average that is too short leaves the noise of the last steps in the weights; a longer one has a smaller error."""
    lines = [line for line in record.late if line.get("probe_error_longer") is not None]
    ratio = _median_ratio(lines, "probe_error_longer", "probe_error_ema")
    newest = _median_ratio(lines, "probe_error_longer", "probe_error")
    if ratio is None or newest is None or len(lines) < 3:
        return NotSeen(f"no longer average in the log to compare with; {_ask(record)}")
    seen = (
        f"on the same samples an average of relative width {LONGER:g} over the lines of the log has {ratio:.3g} times the "
        f"error of the run's average, and {newest:.3g} times that of the newest weights"
    )
    if max(ratio, newest) >= EMA_GAIN or isinstance(average_too_long(record), Diagnosis):
        return Sound(seen)
    return Diagnosis("The average of the weights (EMA) is too short.", _sentence([seen]), _other_average(record, "raise"))


@check("ema-long")
def average_too_long(record: RunRecord) -> Outcome:
    """An average that reaches far back holds weights that are worse than the newest."""
    ratio = _median_ratio(record.late, "probe_error_ema", "probe_error")
    if ratio is None:
        return NotSeen(f"the log does not compare the averaged weights with the newest; {_ask(record)}")
    seen = f"on the same samples the averaged weights have {ratio:.3g} times the error of the newest"
    if ratio <= EMA_HARM:
        return Sound(seen)
    return Diagnosis(
        "The average of the weights (EMA) is too long for this run.",
        _sentence([seen, f"they differ by {100 * (record.value('ema_lag') or 0):.2g} % of their norm"]),
        _other_average(record, "lower"),
    )


@check("data-scale")
def data_scale(record: RunRecord) -> Outcome:
    """Everything assumes data of standard deviation sigma_data."""
    measured, assumed = record.value("data_std"), record.config.process.sigma_data
    if measured is None:
        return NotSeen(f"the log has no standard deviation of the data; {_ask(record)}")
    mean = record.value("data_mean") or 0.0
    seen = f"x0 has standard deviation {measured:.3g} and mean {mean:.2g}; sigma_data is {assumed:g}"
    if assumed / SCALE <= measured <= assumed * SCALE:
        return Sound(seen)
    return Diagnosis(
        "The data do not have the standard deviation that the process assumes.",
        _sentence([seen]),
        f"Set data.normalize to measured (now {record.config.data.normalize}), which scales the data to sigma_data, or "
        f"process.sigma-data to {measured:.2g}; train the teacher anew with it.",
    )


# Helpers -------------------------------------------------------------------------------------------------------------


def _ask(record: RunRecord) -> str:
    """What would show what the log does not."""
    if record.config.loop.instruments:
        return "it needs more lines of log, or a kind of run in which it can be measured"
    return "switch on loop.instruments (--loop.instruments)"


def _typical(values: list[float | None]) -> float:
    """The median of those that are known, 0 for none."""
    return statistics.median_high([value for value in values if value is not None] or [0.0])


def _median_ratio(lines: list[LogLine], above: str, below: str) -> float | None:
    """Median over the lines of the ratio of two figures of the same line."""
    ratios = [line[above] / line[below] for line in lines if line.get(above) is not None and line.get(below)]
    return statistics.median_high(ratios) if ratios else None


def _largest_share(record: RunRecord, saved: list[float | None]) -> float:
    """Median over the late lines of the largest exp(w(t)) e(t); `saved` is w(t) where a line has none."""
    largest: list[float | None] = []
    for line in record.late:
        pairs = zip(line.get("weight_by_time") or saved, line["loss_by_time"], strict=True)
        largest.append(max((w + math.log(e) for w, e in pairs if w is not None and e), default=None))
    return math.exp(min(_typical(largest), 700.0))


def _sentence(parts: list[str]) -> str:
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _other_average(record: RunRecord, change: Literal["raise", "lower"]) -> str:
    """How to average over a longer or shorter part of the run."""
    ema = record.config.ema
    if ema.kind == "power":
        wanted = " to 0.1." if change == "raise" else ", for example to 0.05, or train longer."
        return f"{change.capitalize()} ema.sigma-rel (now {ema.sigma_rel:g}){wanted}"
    if ema.kind == "none":
        return "Set ema.kind power with sigma-rel 0.1 (now none)."
    images = record.iteration * record.config.loop.batch_size / 1e6
    return (
        f"Set ema.kind power with sigma-rel 0.1, or {change} ema.halflife-mimg (now {ema.halflife_mimg:g}) or ema.rampup (now "
        f"{ema.rampup:g}{'' if change == 'raise' else '; 0 is none'}): the run has seen {images:.3g} million images."
    )
