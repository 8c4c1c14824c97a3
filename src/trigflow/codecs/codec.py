"""What a codec is: the way from stored data to the x0 of the process, and from x0 to what a person gets.

=========  ==============================================  =====================================
codec      stored                                          drawn
=========  ==============================================  =====================================
`pixels`   bytes, uint8 `(b, c, h, w)`                     images, uint8 `(b, c, h, w)`
`latents`  latents of an autoencoder, float `(b, c, h, w)`  what the autoencoder makes of them
=========  ==============================================  =====================================

Networks and samplers see x0 `(b, *shape)` alone, and nothing else in the package asks what kind of data it is. Another kind is
another class with the members of `Codec`, entered into `CODECS` under its `kind`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import dacite
import torch
from PIL import Image
from torch import Tensor

from trigflow.runtime.errors import UserError
from trigflow.runtime.values import same_class

T = TypeVar("T")


class Codec(Protocol):
    """Stored data to x0 of standard deviation sigma_data, and x0 to what a person gets.

    A codec is immutable, and two that are equal turn the same data into the same x0.
    """

    kind: ClassVar[str]
    """Its name in `CODECS` and in `model.json`."""

    pictured: ClassVar[bool]
    """Whether stored data are what is drawn, so that samples and data can be compared as they are."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one x0."""

    @property
    def sigma_data(self) -> float:
        """Standard deviation that x0 is meant to have."""

    @property
    def drawn_shape(self) -> tuple[int, ...]:
        """Shape of one drawn item. What it needs is loaded, as by `prepare`."""

    def encode(self, stored: Tensor) -> Tensor:
        """Stored data `(b, ...)` to x0, float32 `(b, *shape)`, on the same device."""

    def stored(self, x0: Tensor) -> Tensor:
        """x0 to data as they are stored: the inverse of `encode`, up to rounding."""

    def decode(self, x0: Tensor) -> Tensor:
        """x0 to what a person gets, on the same device."""

    def seen(self, pictures: Tensor) -> Tensor:
        """Pictures, uint8 `(b, *drawn_shape)`, to the x0 that `decode` draws them from; a UserError where none are drawn."""

    def prepare(self, device: torch.device | str | None = None) -> None:
        """Load what `decode` needs, so that what is wrong with it is said before anything is drawn.

        Raises:
            MissingExtraError: without a package that it needs.
            UserError: for what cannot be read.
        """

    def component(self) -> Any:
        """The module that `decode` needs, loaded, as it lies beside the network in a pipeline of diffusers; None for none."""

    def with_autoencoder(self, name: str) -> Codec:
        """The same with the autoencoder of this name. Raises a UserError where none is needed."""

    def with_component(self, module: Any) -> Codec:
        """The same with this module as what `decode` needs; itself where there is no module, or none is needed."""

    def pictures(self, drawn: Tensor) -> Tensor:
        """What was drawn as images uint8 `(n, c, h, w)` with 1 or 3 channels, for metrics that look at images."""

    def preview(self, drawn: Tensor, columns: int | None = None) -> Image.Image:
        """What was drawn, on one sheet."""

    def check_save(self, path: str | Path, num: int) -> None:
        """Raise a UserError if `save` could not write so many items there; asked before they are drawn."""

    def save(self, drawn: Tensor, path: str | Path, columns: int | None = None) -> str:
        """Write what was drawn to a file, or item by item into a folder; returns a line that says what was written."""

    def normalized(self, mean: list[float], std: list[float]) -> list[tuple[str, float, float]]:
        """Mean and deviation of x0, by name, of data whose channels have these as they are stored; none where not known."""

    def describe(self) -> dict[str, Any]:
        """Facts about it, names to values, for people."""

    def state(self) -> dict[str, Any]:
        """A plain dict for JSON with its `kind`; `from_state` gives back an equal codec."""

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Codec:
        """The inverse of `state`. Raises a UserError if a key is missing or a value is not what it should be."""


CODECS: dict[str, type[Codec]] = {}
"""From the kind to the class. A codec of one's own is entered here before a model of it is loaded."""


def register(codec: type[Any]) -> type[Any]:
    """Enter a class into `CODECS`; to be used as a decorator. Raises a UserError for a kind that another class has."""
    if not same_class(found := CODECS.get(codec.kind, codec), codec):
        raise UserError(f"the kind '{codec.kind}' is taken by {found.__name__}; expected a new one; choose another")
    CODECS[codec.kind] = codec
    return codec


def codec_from_state(state: object) -> Codec:
    """The codec that `state()` was taken of. Raises a UserError if it is none, or its kind is not known."""
    kind = state.get("kind") if isinstance(state, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(kind, str):
        raise UserError(f"a codec saved as {state!r}; expected what trigflow wrote; take the file from a finished run")
    if kind not in CODECS:
        raise UserError(
            f"data of the kind '{kind}'; expected one of {', '.join(CODECS)}; import the module that defines it first "
            "(--plugin FILE on the command line)"
        )
    return CODECS[kind].from_state(state)


def from_saved(cls: type[T], what: str, state: object) -> T:
    """A dataclass from the values of its fields that are compared, as JSON has them. Raises a UserError if one is missing or of
    another type, or the `shape` not above 0; `what` names it."""
    given = state if isinstance(state, Mapping) else {}
    values = {field.name: given.get(field.name) for field in fields(cls) if field.compare}  # type: ignore[arg-type]
    try:
        found = dacite.from_dict(cls, values, dacite.Config(cast=[tuple]))
        if min(getattr(found, "shape", (1,)), default=0) > 0:
            return found
        fault = "a shape not above 0"
    except (dacite.DaciteError, TypeError) as error:
        name = str(getattr(error, "field_path", "")).split(".")[0]
        fault = f"{name} {given.get(name)!r}" if name else "a list is missing"
    raise UserError(
        f"{what} saved as {state!r} ({fault}); expected the numbers and names that trigflow wrote; "
        "take the file from a finished run, unedited"
    )
