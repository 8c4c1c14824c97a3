"""Spikes: losses and gradient norms far above those of the steps before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping

FIRST = 32
"""Values of a figure before any of it is judged, or the whole window where that is shorter."""
DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
LEAST = 0.05
"""Deviation below which none is believed: of a norm relative to itself, of a loss to its median size."""


class Spikes:
    """Compares each value with the window of those before it::

        z = (x - median) / (1.4826 median|x_i - median|)

    and calls it a spike where z is above the threshold. Median and median absolute deviation do not mind single spikes among
    the values; a lasting change becomes usual once it fills half of the window. Norms, which vary by factors, are compared by
    their logarithms; losses as they are, because with a learned weighting they can be negative.

    Args:
        window: how many values are looked back on.
        threshold: of z.
    """

    def __init__(self, window: int, threshold: float) -> None:
        self.window = window
        self.threshold = threshold
        self.values: dict[str, deque[float]] = {}

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
