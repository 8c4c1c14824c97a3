"""Conditions as a network is told them: tensors `(b, ...)` by name, and the rows that mean "none"."""

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from trigflow.runtime.errors import UserError

Conditions = Mapping[str, Tensor]
"""By name, each `(b, ...)`."""

ORDER = ("label", "guidance", "end")
"""The order of conditions where one is needed, as in exported files: numbers, one a sample. Others come after them by name."""

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
    """Check that `takes` and `null` of a network of somebody's own are as they should be. Raises a UserError for the attributes
    of earlier versions in their place, or for a null that is not among what it takes."""
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

    A number, or a tensor with one row or no axis, is for all of them. Raises a UserError for a condition of another number of
    rows, or one of `ORDER` that is more than a number a row.
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
