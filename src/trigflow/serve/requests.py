"""What clients send: JSON, checked strictly, with the bounds of the server in the schema that it publishes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, create_model
from pydantic_core import from_json

from trigflow.runtime.errors import UserError
from trigflow.serve.limits import Limits
from trigflow.serve.offers import Offer

SAFE_INTEGER = 2**53 - 1
"""The largest integer that every JSON client can send."""

LAST_PICTURE = 2**31 - 1
"""The largest number of a picture."""

LabelName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Label = Annotated[int, Field(ge=0, le=SAFE_INTEGER)] | LabelName
Number = Annotated[float, Field(allow_inf_nan=False)]
Id = Annotated[int, Field(ge=0, le=SAFE_INTEGER)]


class Message(BaseModel):
    """No unknown fields, no conversion of types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class PictureRequest(Message):
    """What requests for images and for frames have in common."""

    seed: Annotated[int, Field(ge=0, le=SAFE_INTEGER)] = 0
    """Seed of all noise."""
    count: int = 1
    """Number of pictures."""
    first: Annotated[int, Field(ge=0, le=LAST_PICTURE)] = 0
    """Number of the first of them: `first` 3 and `count` 1 is the fourth picture of a seed."""
    labels: Label | list[Label] | dict[LabelName, Number] | None = None
    """One class by number or name; classes in turn; weights of a mix, such as {"3": 0.7, "5": 0.3}; or null for all classes in
    turn."""
    conditions: dict[LabelName, Number | list[Number] | LabelName] | None = None
    """What else is said to the model, by name; null for its defaults."""
    guidance: Number = 1.0
    """Guidance scale; 1 for none."""
    steps: int | None = None
    """Sampling steps; null for the model's default."""
    walk: Annotated[list[Number], Field(min_length=2, max_length=2)] = [0.0, 0.0]
    """Two angles on the torus of noise."""
    model: str | None = None
    """`student` or `teacher`; null for the model that is served."""

    def order(self) -> dict[str, Any]:
        """Arguments of `Offer.order`."""
        names = ("seed", "count", "first", "labels", "guidance", "steps", "conditions")
        chosen = {name: getattr(self, name) for name in names}
        return chosen | {"walk": (self.walk[0], self.walk[1])}


class ImagesRequest(PictureRequest):
    """Body of `POST /v1/images`."""

    format: Literal["png", "webp", "npy"] = "png"
    """One sheet of pictures side by side, or the pixels as a NumPy file, uint8 (count, c, h, w)."""


class FrameRequest(PictureRequest):
    """A request of `/v1/stream`."""

    id: Id
    """Comes back with the frame."""
    format: Literal["raw", "png", "webp"] = "raw"
    """Pixels as uint8 in the order of the shape, or one sheet of pictures side by side."""
    taken: Id | None = None
    """Id of the last frame that was taken."""


class Taken(Message):
    """Says that a frame was taken, without asking for another."""

    taken: Id


AnyMessage = TypeVar("AnyMessage", bound=Message)


def parse(kind: type[AnyMessage], raw: bytes | str) -> AnyMessage:
    """JSON as this kind of message.

    Raises:
        UserError: if it is no JSON, or not as the schema says.
    """
    return check(kind, parse_json(raw))


def parse_json(raw: bytes | str) -> Any:
    """Any JSON value; not NaN.

    Raises:
        UserError: if it is no JSON.
    """
    try:
        return _with_integers(from_json(raw, allow_inf_nan=False))
    except ValueError as error:
        raise UserError(f"no JSON ({error}); expected an object as in the documentation; correct the request") from None


def _with_integers(value: Any) -> Any:
    """The value with 2.0 as 2: in JSON they are the same number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_with_integers(item) for item in value]
    if isinstance(value, dict):
        return {name: _with_integers(item) for name, item in value.items()}
    return value


def check(kind: type[AnyMessage], value: Any) -> AnyMessage:
    """A JSON value as this kind of message.

    Raises:
        UserError: if it is not as the schema says.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = str(first["loc"][0])[:40] if first["loc"] else "the request"
        raise UserError(f"{where}: {first['msg'][:160]}; expected what the schema says; correct the request") from None


def bounded(kind: type[AnyMessage], limits: Limits, offers: Sequence[Offer]) -> type[AnyMessage]:
    """A kind of picture request with the bounds of these models, so that its JSON schema says them."""
    classes, told = offers[0].model.num_classes, offers[0].model.class_names
    number: Any = Annotated[int, Field(ge=0, lt=classes)]
    label: Any = number | Literal[told] if told else number
    turn = Annotated[list[label], Field(min_length=1, max_length=limits.images)]  # type: ignore[valid-type]
    name: Any = Literal[
        tuple(dict.fromkeys((*told, *([] if any(map(str.isdecimal, told)) else map(str, range(classes))))))
    ]
    weight = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    mix = Annotated[dict[name, weight], Field(min_length=1, max_length=limits.mixed_labels)]
    labels: Any = label | turn | mix | None
    most = limits.images if issubclass(kind, ImagesRequest) else limits.frame_images
    least_scale, most_scale = min(offer.guidance[0] for offer in offers), max(offer.guidance[1] for offer in offers)
    least_steps, most_steps = min(offer.steps[0] for offer in offers), max(offer.steps[1] for offer in offers)
    names: Any = Literal[tuple(offer.name for offer in offers)]
    fields: dict[str, Any] = {
        "count": (Annotated[int, Field(ge=1, le=most)], 1),
        "labels": (labels if classes else None, None),
        "conditions": (_conditions_of(offers[0]), None),
        "guidance": (Annotated[float, Field(ge=least_scale, le=most_scale, allow_inf_nan=False)], 1.0),
        "steps": (Annotated[int, Field(ge=least_steps, le=most_steps)] | None, None),
        "model": (names | None, None),
    }
    return create_model(kind.__name__, __base__=kind, **fields)


def _conditions_of(offer: Offer) -> Any:
    """What can be said to the model of an offer beside classes."""
    names = tuple(name for name in offer.model.conditioner.inputs if name != "label")
    return dict[Literal[names], Number | list[Number] | LabelName] | None if names else None  # type: ignore[valid-type]
