"""Everything that can be said to a model, by the name it is said under; and mixes, several things at once with weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trigflow.conditions.encoded import Encoded
from trigflow.conditions.inputs import Classes, Input, Numbers
from trigflow.conditions.text import Text
from trigflow.conditions.told import quoted
from trigflow.runtime.errors import UserError

INPUTS: dict[str, Callable[..., Input]] = {"classes": Classes, "text": Text, "encoded": Encoded, "numbers": Numbers}
"""From the kind to the class; one from outside is added here under its kind."""


@dataclass(frozen=True)
class Conditioner:
    """Everything that can be said to a model, by the name it is said under: `label`, or whatever else.

    Attributes:
        inputs: each makes conditions of one of these; without any, the model is unconditional.
    """

    inputs: Mapping[str, Input] = field(default_factory=dict)

    @classmethod
    def of_classes(cls, num: int, names: Sequence[str] = ()) -> Conditioner:
        """One for so many classes; for 0 of them, one that takes nothing."""
        return cls({"label": Classes(num, tuple(names))} if num else {})

    @property
    def classes(self) -> Classes | None:
        """The classes, where there are any."""
        found = self.inputs.get("label")
        return found if isinstance(found, Classes) else None

    def conditions(self, said: Mapping[str, Any] | None = None, num: int = 1, first: int = 0) -> dict[str, Tensor]:
        """Conditions of samples first ... first + num - 1, each `(num, ...)`, on the CPU.

        Args:
            said: by name; what is not said, or None, is by default.

        Raises:
            UserError: for something that nobody here understands.
        """
        said = {name: value for name, value in (said or {}).items() if value is not None}
        for name in sorted(said.keys() - self.inputs.keys()):
            what, known = called(name), ", ".join(map(called, self.inputs)) or "none"
            whose = "a model that takes no such condition" if self.inputs else "an unconditional model"
            raise UserError(f"{what} for {whose}; expected {known}; leave {what} out")
        told: dict[str, Tensor] = {}
        for name, maker in self.inputs.items():
            told |= maker.rows(said.get(name), num, first, called(name))
        return told

    def counts(self, said: Mapping[str, Any]) -> dict[str, int]:
        """How many rows were said of each thing, by name; without those whose input has no `numbers` to count. Raises a
        UserError as `conditions`, for what is no such thing."""
        counted = {name: getattr(maker, "numbers", None) for name, maker in self.inputs.items() if name in said}
        return {name: len(numbers(said[name], called(name))) for name, numbers in counted.items() if numbers}

    def state(self) -> dict[str, Any]:
        """Plain JSON types; `from_state` gives back an equal one."""
        return {name: {"kind": maker.kind, **maker.state()} for name, maker in self.inputs.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Conditioner:
        """The inverse of `state`; KeyError, TypeError or ValueError for what is none. Raises a UserError for a kind that nobody
        has registered."""
        inputs = {}
        for name, found in state.items():
            settings = dict(found)
            kind = settings.pop("kind")
            if kind not in INPUTS:
                raise UserError(
                    f"the model is told {name} by a '{kind}'; expected one of {', '.join(INPUTS)}; "
                    "name the file that registers it with --plugin"
                )
            inputs[name] = INPUTS[kind](**settings)
        return cls(inputs)


def called(name: str) -> str:
    """What a condition is called by those who say it."""
    return {"label": "labels", "text": "prompt"}.get(name, name)


def said_of(labels: Any, conditions: Mapping[str, Any] | None, prompt: Any = None) -> dict[str, Any]:
    """Everything that is said, by name: labels as `label`, a prompt as `text`, and conditions; without what is None. Raises a
    UserError for conditions that are no mapping, or what is said in both."""
    if conditions is not None and not isinstance(conditions, Mapping):
        raise UserError(f"conditions {quoted(conditions)}; expected values by name; correct conditions")
    said = {name: value for name, value in (conditions or {}).items() if value is not None}
    for name, value in (("text", prompt), ("label", labels)):
        if value is not None and name in said:
            raise UserError(f"{called(name)}, and a {name} among the conditions; expected one of them; drop the other")
        said = said if value is None else {name: value, **said}
    return said


# Mixes ---------------------------------------------------------------------------------------------------------------

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
