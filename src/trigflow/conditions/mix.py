"""Mixes: several things said at once, each with a weight."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from trigflow.conditions.conditioner import called
from trigflow.conditions.told import quoted
from trigflow.runtime.errors import UserError

MOST_WEIGHT = 1_000_000
"""Of one thing in a mix."""


def shares(weights: Mapping[Any, Any], what: str = "labels") -> list[tuple[Any, float]]:
    """What is mixed, with its share: weights scaled to add up to 1; without those of weight 0. Raises a UserError for weights
    that are no numbers of at least 0, one of them above 0."""
    fine = [isinstance(w, int | float) and not isinstance(w, bool) and 0 <= w <= MOST_WEIGHT for w in weights.values()]
    if not all(fine) or not any(weights.values()):
        raise UserError(
            f"a mix of {what} with the weights {quoted([*weights.values()])}; expected numbers of at least 0 and at most "
            f"{MOST_WEIGHT}, one of them above 0; correct {what}"
        )
    total = sum(weights.values())
    return [(said, weight / total) for said, weight in weights.items() if weight > 0]


def parts_of(said: Mapping[str, Any], known: Iterable[str]) -> list[tuple[float, dict[str, Any]]]:
    """Everything that is said, by name, with its share; several where something known is given as the weights of a mix."""
    parts = [(1.0, dict(said))]
    for name in known:
        given = said.get(name)
        rows = isinstance(given, Mapping) and any(isinstance(value, Tensor) for value in given.values())
        if isinstance(given, Mapping) and not rows:
            mixed = shares(given, called(name))
            parts = [(weight * share, {**part, name: one}) for weight, part in parts for one, share in mixed]
    return parts
