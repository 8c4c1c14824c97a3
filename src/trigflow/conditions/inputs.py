"""What can be said to a model beside words: a class by number or name, a row of numbers."""

import math
import operator
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor

from trigflow.conditions.told import quoted
from trigflow.runtime.errors import UserError


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
        """Numbers of one class or several, int64 `(n,)`, n at least 1. Raises a UserError for an unknown name, a number out of
        range, another type or shape, or none at all."""
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
            if printable(said) in self.names:
                return self.names.index(printable(said))
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
        if given.shape[1] != self.num or not bool(((given == 0) | (given == 1)).all() and (given.sum(1) == 1).all()):
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

    Raises:
        UserError: for a shape not above 0, or a default that is not as many finite numbers.
    """

    name: str
    shape: tuple[int, ...]
    default: tuple[float, ...] = ()
    kind = "numbers"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "default", tuple(self.default))
        fits = len(self.default) in (0, math.prod(self.shape)) and all(map(math.isfinite, self.default))
        if not fits or min(self.shape, default=1) < 1:
            raise UserError(
                f"numbers {self.name} of shape {self.shape} with the default {quoted(self.default)}; expected a shape above 0 "
                "and as many finite numbers, or no default; correct them"
            )

    def rows(self, said: Any, num: int, first: int, what: str = "") -> dict[str, Tensor]:
        """One row for all samples, or several in turn; the default where nothing is said."""
        if said is None:
            default = self.default or (0.0,) * math.prod(self.shape)
            row = torch.tensor(default, dtype=torch.float32).reshape(self.shape)
            return {self.name: row.expand(num, *self.shape)}
        value = self.numbers(said, what or self.name)
        return {self.name: value[torch.arange(first, first + num) % len(value)]}

    def numbers(self, said: Any, what: str) -> Tensor:
        """The rows said, float32 `(n, *shape)`, n at least 1. Raises a UserError for no numbers, another shape, or numbers that
        are not finite."""
        try:
            value = torch.as_tensor(said, dtype=torch.float32).detach()
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise UserError(f"{what}: {quoted(said)} are no numbers; expected rows of shape {self.shape}; correct it") from None
        whole = tuple(value.shape) == self.shape or (not value.ndim and math.prod(self.shape) == 1)
        value = value.reshape(1, *self.shape) if whole else value
        if tuple(value.shape[1:]) != self.shape or not len(value) or not bool(value.isfinite().all()):
            raise UserError(
                f"{what} of shape {tuple(value.shape)}; expected finite numbers of shape {self.shape}, or several such rows; "
                "correct it"
            )
        return value

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "default": list(self.default)}


def printable(name: object) -> str:
    """Text in the one form that Unicode has for it (NFC), with a backslash and digits for bytes that are none."""
    return unicodedata.normalize("NFC", str(name)).encode("utf-8", "backslashreplace").decode()


def check_class_names(names: Sequence[str], whose: str) -> None:
    """Require names of classes that differ, however accents are written in them, and can be printed. Raises a UserError naming
    the first that is there twice, or is no text: bytes that are no UTF-8, or control characters."""
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
    """Require that classes of two things have the same names in the same order, as far as both have names. Raises a UserError
    naming the first class that differs; `whose` and `other` are the two."""
    if not (named(names) and named(others)):
        return
    for number, (one, two) in enumerate(zip_longest(names, others)):
        if one != two:
            raise UserError(
                f"class {number} is {one!r} in {whose} and {two!r} in {other}; expected the same classes in the same order; "
                "use data or models of the same classes"
            )


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
