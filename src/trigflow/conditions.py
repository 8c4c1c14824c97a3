"""Conditions: what a network is told beside the noisy sample and the time; and what makes them of what people say.

Networks are called `network(x, t, **conditions)`: every condition has a name and is a tensor `(b, ...)`, one row a sample. A
network says with two attributes what it can be told::

    takes    frozenset of names
    null     the row, without the batch axis, that means "none", for each condition that can be left out

`label` (int64), `guidance` (the scale that a student takes as an input) and `end` (where a jump ends) are names that this
package uses; a network of one's own may take any others.

A conditioner has an `Input` for each thing that can be said: a class by its number or name, a row of numbers. One of another
kind is a class with `rows` and `state`, under its name in `INPUTS`.
"""

from __future__ import annotations

import operator
import reprlib
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor

from trigflow.runtime.errors import UserError

Conditions = Mapping[str, Tensor]
"""By name, each `(b, ...)`."""

ORDER = ("label", "guidance", "end")
"""The order of conditions where one is needed, as in exported files; others come after them by name."""

OLD = {
    "null_label": 'takes = frozenset({"label"}) and null = {"label": torch.tensor(n)} for n classes',
    "takes_guidance": 'takes = frozenset({..., "guidance"})',
    "takes_end": 'takes = frozenset({..., "end"})',
}
"""Attributes that said this before, and what says it now."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def quoted(said: Any) -> str:
    """What somebody said, as it is quoted in an error: on one line, and cut where it is long."""
    return _SHORT.repr(said)


def takes(network: object) -> frozenset[str]:
    """Names of the conditions that a network can be told; none where it does not say."""
    return frozenset(getattr(network, "takes", ()))


def null(network: object) -> dict[str, Tensor]:
    """The rows that mean "none" to a network, by name; none where it does not say."""
    return dict(getattr(network, "null", {}))


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """The names in `ORDER`, others after them in that of the alphabet."""
    return tuple(sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name)))


def check_declared(network: object) -> None:
    """Check that `takes` and `null` of a network of somebody's own are as they should be.

    Raises:
        UserError: for the attributes of earlier versions in their place, or for a null that is not among what it takes.
    """
    if not hasattr(network, "takes"):
        for name, now in OLD.items():
            if (said := getattr(network, name, None)) is not None and said is not False:  # 0 is a label
                raise UserError(
                    f"the network has {name} = {said} and no takes; expected the names of its conditions, "
                    f"which it is called with as network(x, t, **conditions); set {now}"
                )
    foreign = sorted(null(network).keys() - takes(network))
    if foreign or not all(isinstance(row, Tensor) for row in null(network).values()):
        raise UserError(
            f"the network has null for {', '.join(foreign) or 'conditions that are no tensors'} and takes "
            f"{', '.join(in_order(takes(network))) or 'none'}; expected a tensor for names that it takes; correct takes or null"
        )


def check_told(network: object, names: Iterable[str], *, later: Iterable[str] = ()) -> None:
    """Check that these are conditions that a network takes, and all of those that it cannot do without.

    Args:
        network: has `takes` and `null`, or takes nothing.
        names: of the conditions.
        later: those that it will be told besides.

    Raises:
        UserError: naming the first too many or missing.
    """
    given, known = set(names), takes(network)
    for name in in_order(given - known):
        raise UserError(
            f"{name} for a network that takes {', '.join(in_order(known)) or 'no conditions'}; expected no other; drop {name}"
        )
    for name in in_order(known - null(network).keys() - given - set(later)):
        raise UserError(f"no {name} for a network that takes it; expected a tensor of shape (b, ...); pass {name}")


def rows_of(conditions: Mapping[str, Any], x: Tensor) -> dict[str, Tensor]:
    """Every condition with one row for each sample of the batch x, on its device, numbers with a point in its dtype.

    A number, or a tensor with one row or no axis, is for all of them.

    Raises:
        UserError: for a condition of another number of rows, or one of `ORDER` that is more than a number a row.
    """
    told = {}
    for name, given in conditions.items():
        value = torch.as_tensor(given, dtype=None if isinstance(given, Tensor | int) else torch.float64)
        value = value.to(x.device, x.dtype if value.is_floating_point() or name == "guidance" else value.dtype)
        if value.ndim == 0:
            value = value[None]
        numbers = name in ORDER  # one each; with more axes they would broadcast
        if len(value) not in (1, len(x)) or (numbers and value.ndim > 1):
            raise UserError(
                f"{name} of shape {tuple(value.shape)} for a batch of {len(x)}; expected one "
                f"{'number' if numbers else 'row'}, or one a sample; correct it"
            )
        told[name] = value.expand(len(x), *value.shape[1:])
    return told


def null_rows(network: object, x: Tensor) -> dict[str, Tensor]:
    """What means "none" to a network, for each sample of the batch x."""
    return rows_of({name: row[None] for name, row in null(network).items()}, x)


def pick(conditions: Conditions, chosen: Tensor) -> dict[str, Tensor]:
    """The chosen rows."""
    return {name: value[chosen] for name, value in conditions.items()}


def joined(first: Conditions, second: Conditions) -> dict[str, Tensor]:
    """The rows of two batches of the same conditions, one after the other."""
    return {name: torch.cat([value, second[name].to(value.dtype)]) for name, value in first.items()}


def dropped(conditions: Conditions, network: object, mask: Tensor) -> dict[str, Tensor]:
    """The conditions with "none" in the rows of the mask `(b,)`, in all that the network can do without at once."""
    none = null(network)
    result = dict(conditions)
    for name in none.keys() & result.keys():
        value = result[name]
        where = mask.to(value.device).reshape(-1, *[1] * (value.ndim - 1))
        result[name] = torch.where(where, none[name].to(value.device, value.dtype), value)
    return result


# What people say -----------------------------------------------------------------------------------------------------


class Input(Protocol):
    """Makes rows of one thing that people say."""

    kind: str
    """Its name in `INPUTS`."""

    def rows(self, said: Any, num: int, first: int, what: str) -> dict[str, Tensor]:
        """Conditions of samples first ... first + num - 1, on the CPU, by name.

        Args:
            said: what was said; None for nothing, which stands for a default.
            what: name it was said under, for messages.

        Raises:
            UserError: for what means nothing here.
        """

    def state(self) -> dict[str, Any]:
        """Plain JSON types, without the kind; `INPUTS[kind](**state)` gives back an equal one."""


@dataclass(frozen=True)
class Classes:
    """One of several classes, said by number or name: `label`, int64 `(b,)`.

    Attributes:
        num: how many there are.
        names: theirs, in order; empty where they have none.

    Raises:
        UserError: for names that are not one for each.
    """

    num: int
    names: tuple[str, ...] = ()
    kind = "classes"

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(map(printable, self.names)))
        if self.num < 1 or len(self.names) not in (0, self.num):
            raise UserError(
                f"{self.num} classes with {len(self.names)} names; expected at least one class, each with a name or none; "
                "correct the names"
            )

    @property
    def words(self) -> tuple[str, ...]:
        """Every text that means a class: the names, and the numbers in digits, unless a name is one of those itself."""
        numbered = any(name.isdecimal() for name in self.names)
        return self.names if numbered else (*self.names, *map(str, range(self.num)))

    def rows(self, said: Any, num: int, first: int, what: str = "labels") -> dict[str, Tensor]:
        """The classes said, in turn: one, several, or a one-hot row a sample `(n, num)`; without any, all of them in turn."""
        chosen = torch.arange(self.num) if said is None else self.numbers(said, what)
        return {"label": chosen[torch.arange(first, first + num) % len(chosen)]}

    def numbers(self, said: Any, what: str = "labels") -> Tensor:
        """Numbers of one class or several, int64 `(n,)`, n at least 1.

        Raises:
            UserError: for an unknown name, a number out of range, another type or shape, or none at all.
        """
        if type(said).__module__ == "numpy" and said.dtype.kind not in "biufc":
            said = said.tolist()  # names
        if isinstance(said, Tensor) or type(said).__module__ == "numpy":
            chosen = torch.as_tensor(said)
            if chosen.ndim == 2:
                chosen = self._of_one_hot(chosen, what)
        elif isinstance(said, Sequence) and not isinstance(said, str | bytes):
            chosen = torch.tensor([self._number(one, what) for one in said], dtype=torch.int64)
        else:
            chosen = torch.tensor([self._number(said, what)])
        if chosen.ndim > 1:
            raise UserError(
                f"{what} of shape {tuple(chosen.shape)}; expected one class, (n,), or one-hot (n, {self.num}); reshape them"
            )
        if not chosen.numel():
            raise UserError(f"an empty list of {what}; expected at least one class; name a class or leave {what} out")
        check_labels(chosen, self.num)
        return chosen.reshape(-1).to(torch.int64)

    def _number(self, said: Any, what: str) -> int:
        if isinstance(said, str):
            if said in self.names:
                return self.names.index(said)
            numbered = any(name.isdecimal() for name in self.names)  # a number among names that are numbers is a name
            if not numbered and said.isdecimal() and len(said) < 10:
                said = int(said)
            else:
                few = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
                known = few or f"numbers from 0 to {self.num - 1}"
                raise UserError(f"{what}: there is no class {quoted(said)}; expected one of {known}; correct {what}")
        elif isinstance(said, Tensor) and not said.ndim and not said.is_floating_point() and said.dtype != torch.bool:
            said = int(said)
        try:
            number = None if isinstance(said, bool | Tensor) else operator.index(said)  # numpy's integers have an index
        except TypeError:
            number = None
        if number is None:
            raise UserError(f"{what}: {quoted(said)} is no class; expected a whole number or a name; correct {what}")
        if not -(2**63) <= number < 2**63:
            raise UserError(f"label {quoted(number)} is out of range; expected 0 to {self.num - 1}; correct {what}")
        return number

    def _of_one_hot(self, given: Tensor, what: str) -> Tensor:
        fine = given.shape[1] == self.num and bool(((given == 0) | (given == 1)).all() and (given.sum(1) == 1).all())
        if not fine:
            raise UserError(
                f"{what} of shape {tuple(given.shape)} that are not one-hot; expected rows of {self.num} numbers, one of "
                f"them 1 and the rest 0; correct {what}"
            )
        return given.to(torch.int64).argmax(1)

    def state(self) -> dict[str, Any]:
        return {"num": self.num, "names": list(self.names)}


@dataclass(frozen=True)
class Numbers:
    """A row of numbers, said as numbers: the condition called `name`, float32 `(b, *shape)`.

    Attributes:
        name: of the condition.
        shape: of one row.
        default: of what is not said; zeros where there is none.
    """

    name: str
    shape: tuple[int, ...]
    default: tuple[float, ...] = ()
    kind = "numbers"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "default", tuple(self.default))

    def rows(self, said: Any, num: int, first: int, what: str = "") -> dict[str, Tensor]:
        """One row for all samples, or several in turn; the default where nothing is said."""
        if said is None:
            row = (
                torch.tensor(self.default, dtype=torch.float32).reshape(self.shape)
                if self.default
                else torch.zeros(self.shape, dtype=torch.float32)
            )
            return {self.name: row.expand(num, *self.shape)}
        value = self.numbers(said, what or self.name)
        return {self.name: value[torch.arange(first, first + num) % len(value)]}

    def numbers(self, said: Any, what: str) -> Tensor:
        """The rows said, float32 `(n, *shape)`, n at least 1.

        Raises:
            UserError: for no numbers, another shape, or numbers that are not finite.
        """
        try:
            value = torch.as_tensor(said, dtype=torch.float32).detach()
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise UserError(f"{what}: {quoted(said)} are no numbers; expected rows of shape {self.shape}; correct it") from None
        value = value[None] if tuple(value.shape) == self.shape else value
        if tuple(value.shape[1:]) != self.shape or not len(value) or not bool(value.isfinite().all()):
            raise UserError(
                f"{what} of shape {tuple(value.shape)}; expected finite numbers of shape {self.shape}, or several such rows; "
                "correct it"
            )
        return value

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "default": list(self.default)}


INPUTS: dict[str, Callable[..., Input]] = {"classes": Classes, "numbers": Numbers}
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
        for name in said.keys() - self.inputs.keys():
            what = _called(name)
            raise UserError(f"{what} for {self._what()}; expected {self._known()}; leave {what} out")
        told: dict[str, Tensor] = {}
        for name, maker in self.inputs.items():
            told |= maker.rows(said.get(name), num, first, _called(name))
        return told

    def counts(self, said: Mapping[str, Any]) -> dict[str, int]:
        """How many rows were said of each thing, by name; without those whose input has no `numbers` to count.

        Raises:
            UserError: as `conditions`, for what is no such thing.
        """
        counted = {name: getattr(maker, "numbers", None) for name, maker in self.inputs.items() if name in said}
        return {name: len(numbers(said[name], _called(name))) for name, numbers in counted.items() if numbers}

    def _what(self) -> str:
        return "a model that takes no such condition" if self.inputs else "an unconditional model"

    def _known(self) -> str:
        return ", ".join(map(_called, self.inputs)) or "none"

    def state(self) -> dict[str, Any]:
        """Plain JSON types; `from_state` gives back an equal one."""
        return {name: {"kind": maker.kind, **maker.state()} for name, maker in self.inputs.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Conditioner:
        """The inverse of `state`; KeyError, TypeError or ValueError for what is none.

        Raises:
            UserError: for a kind that nobody has registered.
        """
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


def printable(name: object) -> str:
    """Text in the one form that Unicode has for it (NFC), with a backslash and digits for bytes that are none."""
    return unicodedata.normalize("NFC", str(name)).encode("utf-8", "backslashreplace").decode()


def check_class_names(names: Sequence[str], whose: str) -> None:
    """Require names of classes that differ, however accents are written in them, and can be printed.

    Raises:
        UserError: naming the first that is there twice, or is no text: bytes that are no UTF-8, or control characters.
    """
    names = [unicodedata.normalize("NFC", name) for name in names]
    for name in names:
        if any(unicodedata.category(letter) in ("Cs", "Cc") for letter in name):
            raise UserError(f"{whose} has a class named {name!r}; expected a name that can be printed; rename it")
    if len({*names}) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise UserError(f"{whose} has two classes named '{twice}'; expected names that differ; rename one")


def named(names: Sequence[str]) -> bool:
    """Whether classes have names that say more than their numbers, "0", "1", ..."""
    return list(names) != [str(number) for number in range(len(names))]


def check_same_classes(names: Sequence[str], others: Sequence[str], whose: str, other: str) -> None:
    """Require that classes of two things have the same names in the same order, as far as both have names.

    Raises:
        UserError: naming the first class that differs; `whose` and `other` are the two.
    """
    if not (named(names) and named(others)):
        return
    for number, (one, two) in enumerate(zip_longest(names, others)):
        if one != two:
            raise UserError(
                f"class {number} is {one!r} in {whose} and {two!r} in {other}; expected the same classes in the same order; "
                "use data or models of the same classes"
            )


def _called(name: str) -> str:
    """What a condition is called by those who say it."""
    return "labels" if name == "label" else name


def said_of(labels: Any, conditions: Mapping[str, Any] | None) -> dict[str, Any]:
    """Everything that is said, by name: labels as `label`, and conditions; without what is None.

    Raises:
        UserError: for conditions that are no mapping, or classes that are said in both.
    """
    if conditions is not None and not isinstance(conditions, Mapping):
        raise UserError(f"conditions {quoted(conditions)}; expected values by name; correct conditions")
    said = {name: value for name, value in (conditions or {}).items() if value is not None}
    if labels is None:
        return said
    if "label" in said:
        raise UserError("labels, and a label among the conditions; expected one of them; drop the other")
    return {"label": labels, **said}


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Require every label to be an integer in `0 ... num_classes - 1`.

    Args:
        labels: class numbers of any shape.
        num_classes: of the data set or the network; 0 means that there are none.

    Raises:
        UserError: naming the first label out of range, and the range.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UserError(f"labels of type {labels.dtype}; expected integers; convert them with labels.long()")
    labels = labels.to(torch.int64)
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.numel() == 0:
        return
    if num_classes < 1:
        raise UserError(f"label {int(outside[0])} where there are no classes; expected no labels; leave the labels out")
    raise UserError(
        f"label {int(outside[0])} is out of range; expected 0 to {num_classes - 1} for {num_classes} classes; "
        "correct the labels or the number of classes"
    )
