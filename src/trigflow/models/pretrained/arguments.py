"""The constructor arguments that a snapshot records, taken one at a time, with nothing left over."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from trigflow.models.pretrained.unpickle import Source, shown

MAX_LEVELS = 16


class Arguments:
    """Keyword arguments of a class in a snapshot. What is taken is checked; what is not is refused by `finish`.

    Args:
        source: for the messages.
        owner: the class, for the messages.
        values: as recorded.
    """

    def __init__(self, source: Source, owner: str, values: dict[str, Any]) -> None:
        self.source = source
        self.owner = owner
        self.values = dict(values)

    def whole(self, name: str, default: int | None, low: int, high: int) -> int:
        """A whole number from low to high."""
        value = self.values.pop(name, default)
        if type(value) is not int or not low <= value <= high:
            self._refuse(name, value, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self.values.pop(name, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            self._refuse(name, value, "a number")
        return float(value)

    def wholes(self, name: str, default: tuple[int, ...], high: int) -> tuple[int, ...]:
        """A few whole numbers from 1 to high."""
        value = self.values.pop(name, default)
        good = isinstance(value, list | tuple) and len(value) <= MAX_LEVELS
        if not good or not all(type(n) is int and 1 <= n <= high for n in value):
            self._refuse(name, value, f"at most {MAX_LEVELS} whole numbers from 1 to {high}")
        return tuple(value)

    def fixed(self, **only: Any) -> None:
        """Arguments of which one value is supported, the one given here."""
        for name, expected in only.items():
            value = self.values.pop(name, expected)
            if (list(value) if isinstance(value, tuple) else value) != expected:
                self._refuse(name, value, repr(expected))

    def ignore(self, *names: str) -> None:
        """Arguments that make no difference to what the network computes."""
        for name in names:
            self.values.pop(name, None)

    def finish(self) -> None:
        """Refuse what was not taken."""
        for name in self.values:
            self._refuse(str(name), self.values[name], "no such argument")

    def _refuse(self, name: str, value: Any, expected: str) -> NoReturn:
        given = shown(value) if isinstance(value, int | float | str) or value is None else f"a {type(value).__name__}"
        if isinstance(value, list | tuple) and all(type(n) is int for n in value[: MAX_LEVELS + 1]):
            given = str(list(value[: MAX_LEVELS + 1]))
        self.source.refuse(
            f"holds {self.owner} with {shown(name)} = {given}, where {expected} is supported", "use another snapshot"
        )
