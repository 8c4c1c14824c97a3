"""Numbers that go wrong: what is noticed about a step, and what is done about it.

A run has a `Guard`. In every step it is told the losses and gradient norms, the same in all processes, and says whether the
update is to be made. What it counts and remembers is kept in checkpoints: a resumed run decides as one that never stopped.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trigflow.runtime.distributed import average
from trigflow.runtime.distributed.shards import piece
from trigflow.training.config import GuardConfig
from trigflow.training.scaling import LossScale

FIRST = 32
"""Values of a figure before any of it is judged, or the whole window where that is shorter."""
DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
LEAST = 0.05
"""Deviation below which none is believed: of a norm relative to itself, of a loss to its median size."""


@dataclass
class Spikes:
    """Compares each value with the window of those before it::

        z = (x - median) / (1.4826 median|x_i - median|)

    and calls it a spike where z is above the threshold. Median and median absolute deviation do not mind single spikes among
    the values; a lasting change becomes usual once it fills half of the window. Norms, which vary by factors, are compared by
    their logarithms; losses as they are, because with a learned weighting they can be negative.

    Attributes:
        window: how many values are looked back on.
        threshold: of z.
        values: those of each figure that are looked back on.
    """

    window: int
    threshold: float
    values: dict[str, deque[float]] = field(default_factory=dict)

    def add(self, scalars: Mapping[str, float]) -> list[str]:
        """Take in the finite figures of a step; returns the names of those that spike."""
        high = []
        for name, scalar in scalars.items():
            norm = name.endswith("norm")
            value = math.log(max(scalar, 1e-30)) if norm else scalar
            before = self.values.setdefault(name, deque(maxlen=self.window))
            if len(before) >= min(FIRST, self.window) and value > self._bound(before, norm):
                high.append(name)
            before.append(value)
        return high

    def _bound(self, values: Iterable[float], norm: bool) -> float:
        middle = statistics.median(values)
        deviation = DEVIATION * statistics.median(abs(value - middle) for value in values)
        least = LEAST if norm else LEAST * statistics.median(map(abs, values))
        return middle + self.threshold * max(deviation, least)

    def state(self) -> dict[str, list[float]]:
        """For a checkpoint."""
        return {name: list(values) for name, values in self.values.items()}

    def load(self, state: Mapping[str, Iterable[float]]) -> None:
        """Inverse of `state`; of a longer window the newest values are kept."""
        self.values = {name: deque(values, maxlen=self.window) for name, values in state.items()}


COUNTS = ("skipped", "overflows", "spikes", "rollbacks")
"""Counts of a whole run, which going back to a checkpoint does not take back."""


class Guard:
    """Watches the numbers of a run. Its `scale` is that of the loss, in float16.

    Attributes:
        updates: updates that the weights have had: steps less those that were left out.
        skipped: steps left out because a loss or a gradient was not finite.
        overflows: steps left out because the scaled gradient was too large for float16; the scale is lowered then.
        spikes: steps with a loss or gradient norm far above those before.
        rollbacks: how often the run went back to a checkpoint. Data order and noise after that depend on it.
        streak: skipped steps since the last one with finite numbers.
        trouble: why the run has to go back to a checkpoint, once there is a reason.
    """

    def __init__(self, config: GuardConfig, scale: LossScale | None = None) -> None:
        self.config = config
        self.scale = scale
        self.recent = Spikes(config.window, config.threshold)
        self.updates = self.streak = 0
        self.skipped = self.overflows = self.spikes = self.rollbacks = 0
        self.trouble: str | None = None

    def accepts(self, scalars: Mapping[str, float]) -> bool:
        """Whether the update of a step is to be made.

        Args:
            scalars: losses and gradient norms (before clipping, scaled back) of the step; the latter end in `norm`.
        """
        if not _are_finite(scalars):
            if not self._overflowed(scalars):
                self.skipped += 1
                self.streak += 1
            if self.trouble is None and 0 < self.config.patience <= self.streak:
                self.trouble = f"{self.streak} steps in a row had a loss or gradient that was not finite"
            return False
        self.streak = 0
        if self.scale is not None:
            self.scale.succeeded()
        if self.config.spikes != "off" and (high := self.recent.add(scalars)):
            self.spikes += 1
            if self.config.spikes == "rollback":
                self.trouble = f"{' and '.join(high)} rose far above what was usual"
            if self.config.spikes != "log":
                return False
        self.updates += 1
        return True

    def accepts_more(self, scalars: Mapping[str, float]) -> bool:
        """Whether a further update within a step is to be made, which is not counted; an overflow is."""
        finite = _are_finite(scalars)
        if not finite:
            self._overflowed(scalars)
        return finite

    def _overflowed(self, scalars: Mapping[str, float]) -> bool:
        """Whether numbers that are not finite are the fault of the scale, which is lowered then."""
        losses = {name: value for name, value in scalars.items() if not name.endswith("norm")}
        overflowed = self.scale is not None and _are_finite(losses) and self.scale.lower()
        self.overflows += overflowed
        return overflowed

    def figures(self) -> dict[str, Any]:
        """What a line of the log says: the counts, and in float16 the scale of the loss."""
        figures: dict[str, Any] = {"skipped": self.skipped, "spikes": self.spikes, "rollbacks": self.rollbacks}
        if self.scale is not None:
            figures |= {"overflows": self.overflows, "loss_scale": self.scale.value}
        return figures

    def told(self) -> dict[str, int]:
        """What the progress bar says: the counts that are not zero."""
        return {name: count for name, count in self.counts().items() if count}

    def state(self) -> dict[str, Any]:
        """For a checkpoint, plain JSON types."""
        return {
            **self.counts(),
            "updates": self.updates,
            "streak": self.streak,
            "recent": self.recent.state(),
            "scale": None if self.scale is None else self.scale.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`, for the whole state of a checkpoint, also of one from before there was more than `skipped`."""
        for name in COUNTS:
            setattr(self, name, state.get(name, 0))
        self.updates = state.get("updates", state["iteration"] - state["skipped"])
        self.streak = state.get("streak", 0)
        self.recent.load(state.get("recent", {}))
        if self.scale is not None and state.get("scale") is not None:
            self.scale.load(state["scale"])
        self.trouble = None

    def counts(self) -> dict[str, int]:
        """What has happened in the run so far."""
        return {name: getattr(self, name) for name in COUNTS}

    def go_on(self, before: Mapping[str, int]) -> None:
        """After the state of an earlier checkpoint has been loaded: what had happened `before` has, and this too."""
        for name, count in before.items():
            setattr(self, name, count)
        self.rollbacks += 1
        self.streak = 0


def _are_finite(scalars: Mapping[str, float]) -> bool:
    return all(map(math.isfinite, scalars.values()))


def not_finite(modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> list[str]:
    """Names of the modules and optimizers of which a weight or moment is infinite or no number, or a buffer no number (a mask
    may be infinite), in any process.

    All processes call this together. It reads every one of them once and waits for the device once.
    """
    groups: dict[str, Iterable[Any]] = {}
    for name, module in modules.items():
        buffers = [buffer.isnan().any() for buffer in module.buffers() if buffer.is_floating_point()]
        groups[name] = [*module.parameters(), *(torch.where(missing, math.nan, 0.0) for missing in buffers)]
    for name, optimizer in optimizers.items():
        groups[name] = [value for state in optimizer.state.values() for value in state.values()]
    sizes = {name: _largest(values) for name, values in groups.items()}
    device = next((size.device for size in sizes.values()), None)
    if device is None:
        return []
    finite = torch.stack([size.to(device) for size in sizes.values()]).isfinite().tolist()
    means = average({name: float(fine) for name, fine in zip(sizes, finite, strict=True)})
    return [name for name, mean in means.items() if mean < 1]


def _largest(values: Iterable[Any]) -> Tensor:
    """The largest absolute value, where it is finite; the tensors are of floating point, or not looked at."""
    parts = [piece(value) for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    return nn.utils.get_total_norm([part for part in parts if part.numel()], math.inf)
