"""The door for values from Python, which says of the wrong ones what the command line says: what, expected, what to do."""

import dataclasses
import operator
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trigflow.runtime.errors import UserError


def whole(**values: Any) -> None:
    """Require whole numbers: of Python, numpy or a tensor of one integer, but no bool. Raises a UserError naming the first
    argument that is none."""
    _require(values, "a whole number", operator.index, bool)


def number(**values: Any) -> None:
    """Require numbers. Raises a UserError naming the first argument that is none."""
    _require(values, "a number", float, bool, str, bytes)


def row(name: str, value: Any, count: int | None = None) -> tuple[Any, ...]:
    """The numbers of a row, so many where `count` says it. Raises a UserError naming the argument that is no such row."""
    try:
        found = None if isinstance(value, str | bytes) else tuple(value)
    except TypeError:
        found = None
    if found is None or count not in (None, len(found)):
        raise _wrong(name, value, f"{count or 'a row of'} numbers", "argument")
    number(**{f"{name}[{i}]": one for i, one in enumerate(found)})
    return found


def kind_of(kind: type, **values: Any) -> None:
    """Require objects of a class; None passes. Raises a UserError naming the first argument that is something else."""
    for name, value in values.items():
        if value is not None and not isinstance(value, kind):
            raise _wrong(name, value, f"a {kind.__name__}", "argument")


def same_class(one: type, other: type) -> bool:
    """Whether two classes are one, perhaps from a file that was imported again."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def check_types(settings: Any, path: str = "") -> None:
    """Require the values of settings, a dataclass that may hold others, to be of the types that it declares. Raises a UserError
    naming the first setting, with the settings that it is in, and what it may be."""
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            check_types(value, f"{path}{field.name}.")
        elif not _fits(value, hint):
            raise _wrong(f"{path}{field.name}", value, _shown(hint), "setting")


def _require(values: dict[str, Any], expected: str, convert: Callable[[Any], object], *but: type) -> None:
    for name, value in values.items():
        try:
            convert(value)
            fine = not isinstance(value, but) and str(getattr(value, "dtype", "")) not in ("bool", "torch.bool")
        except (TypeError, ValueError, RuntimeError, OverflowError):
            fine = False
        if not fine:
            raise _wrong(name, value, expected, "argument")


def _wrong(name: str, value: Any, expected: str, what: str) -> UserError:
    shown = repr(value) if len(repr(value)) < 60 and "\n" not in repr(value) else f"a {type(value).__name__}"
    return UserError(f"{name} is {shown}; expected {expected}; correct the {what}")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in args)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in args)
    if origin in (tuple, list) or hint in (tuple, list):
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            return False
        if origin is tuple and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(map(_fits, value, args))
        return not args or all(_fits(one, args[0]) for one in value)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _shown(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "None"}
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_shown, get_args(hint)))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (tuple, list):
        inner = [_shown(one) for one in get_args(hint) if one is not Ellipsis]
        return "a row of " + " and ".join(dict.fromkeys(inner))
    return str(names.get(hint) or getattr(hint, "__name__", hint))
