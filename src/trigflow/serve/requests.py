"""What clients send: JSON, checked strictly, with the bounds of the server in the schema that it publishes."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    create_model,
)
from pydantic_core import from_json

from trigflow.conditions import quoted
from trigflow.conditions.conditioner import MOST_WEIGHT
from trigflow.runtime.errors import UserError
from trigflow.serve.limits import Limits
from trigflow.serve.offers import Offer

SAFE_INTEGER = 2**53 - 1
"""The largest integer that every JSON client can send."""

LAST_PICTURE = 2**31 - 1
"""The largest number of a picture."""

PRINTED = "^[^\\x00-\\x08\\x0e-\\x1b\\x7f-\\x84\\x86-\\x9f]*$"
"""A text without control characters, but for those that are read as a space."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Id = Annotated[int, Field(ge=0, le=SAFE_INTEGER)]
Said = Number | list[Number] | Name


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
    labels: Any = None
    """One class by number or name; classes in turn; weights of a mix, such as {"3": 0.7, "5": 0.3}; or null for all classes in
    turn."""
    prompt: Any = None
    """What to draw: a text, several in turn, or weights of a mix, such as {"green heart": 0.7, "red heart": 0.3}; null, as the
    empty text, for anything."""
    conditions: dict[Name, Said] | None = None
    """What else is said to the model, by name; null for its defaults."""
    guidance: Number = 1.0
    """Guidance scale; 1 for none."""
    steps: int | None = None
    """Sampling steps; null for the model's default."""
    walk: Annotated[list[Number], Field(min_length=2, max_length=2, description="a list of 2 numbers")] = [0.0, 0.0]
    """Two angles on the torus of noise."""
    model: str | None = None
    """`student` or `teacher`; null for the model that is served."""

    def order(self) -> dict[str, Any]:
        """Arguments of `Offer.order`."""
        chosen = {name: getattr(self, name) for name in PictureRequest.model_fields if name != "model"}
        return {**chosen, "walk": tuple(self.walk)}


class ImagesRequest(PictureRequest):
    """Body of `POST /v1/images`."""

    format: Literal["png", "webp", "npy"] = "png"
    """One sheet of pictures side by side, or the pixels as a NumPy file, uint8 (count, c, h, w)."""


Photo = Annotated[
    str,
    StringConstraints(min_length=1, pattern="^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"),
    Field(description="a PNG, JPEG or WebP file in base64", json_schema_extra={"format": "byte"}),
]


class EditRequest(ImagesRequest):
    """Body of `POST /v1/edit`."""

    picture: Photo
    """Where to begin; cut to a square and scaled to the model's size. What is transparent is drawn anew."""
    mask: Annotated[Photo | None, Field(description="a file in base64, as the picture, of the same size, or null")] = None
    """White where to draw anew; the rest is kept, exactly."""
    strength: Annotated[float | None, Field(gt=0, le=1, description="a number above 0, at most 1, or null")] = None
    """How much noise the picture gets; at 1 nothing is left but what is kept. null for 0.5, or 1 where something is kept."""
    keep: Annotated[Literal["gray"] | int | None, Field(description="gray, a whole number, or null")] = None
    """`gray` keeps the luminance and draws colours; N keeps the means of N x N pixels and draws details."""


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


def parse_json(raw: bytes | str) -> Any:
    """Any JSON value; not NaN. Raises a UserError if it is no JSON."""
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
    """A JSON value as this kind of message. Raises a UserError if it is not as the schema says."""
    if not isinstance(value, dict):
        raise UserError(f"the request is {quoted(value)}; expected a JSON object; correct the request")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        name, fields = str(first["loc"][0]), kind.model_json_schema()["properties"]
        if name not in fields:
            raise UserError(f"{quoted(name)[1:-1]}: no such field; expected {', '.join(fields)}; leave it out") from None
        expected = in_words(fields[name])
        if name not in value:
            raise UserError(f"{name} is missing; expected {expected}; add it") from None
        raise UserError(f"{name} {quoted(value[name])}; expected {expected}; correct {name}") from None


def in_words(schema: Mapping[str, Any]) -> str:
    """What the JSON schema of a field asks for."""
    if "description" in schema:
        return str(schema["description"])
    if "anyOf" in schema:
        return " or ".join(map(in_words, schema["anyOf"]))
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if choices:
        return " or ".join(choices)
    words = {"integer": "a whole number", "number": "a number"}
    bounds = f" from {schema['minimum']} to {schema['maximum']}" if "minimum" in schema else ""
    return words.get(schema["type"], schema["type"]) + bounds


def bounded(kind: type[AnyMessage], limits: Limits, offers: Sequence[Offer]) -> type[AnyMessage]:
    """A kind of picture request whose JSON schema says the bounds of these models.

    Guidance, steps and labels are checked by `Offer.order`, each model by its own bounds.
    """
    most = limits.images if issubclass(kind, ImagesRequest) else limits.frame_images
    scales, steps = ([bound for offer in offers for bound in getattr(offer, name)] for name in ("guidance", "steps"))
    scale = {"type": "number", "minimum": min(scales), "maximum": max(scales)}
    step = {"anyOf": [{"type": "integer", "minimum": min(steps), "maximum": max(steps)}, {"type": "null"}]}
    names: Any = Literal[tuple(offer.name for offer in offers)]

    def short(said: Any) -> Any:
        if isinstance(said, list) and len(said) > limits.images:
            raise ValueError
        return said

    fields: dict[str, Any] = {
        "count": (Annotated[int, Field(ge=1, le=most)], 1),
        "labels": (Annotated[Any, AfterValidator(short), WithJsonSchema(_labels_schema(offers[0], limits))], None),
        "prompt": (Annotated[Any, AfterValidator(short), WithJsonSchema(_prompt_schema(offers[0], limits))], None),
        "conditions": (_conditions_of(offers[0]), None),
        "guidance": (Annotated[Number, WithJsonSchema(scale)], 1.0),
        "steps": (Annotated[int | None, WithJsonSchema(step)], None),
        "model": (names | None, None),
    }
    return create_model(kind.__name__, __base__=kind, **fields)


def _labels_schema(offer: Offer, limits: Limits) -> dict[str, Any]:
    """The JSON schema of what `Offer.order` takes as labels."""
    classes = offer.model.conditioner.classes
    if classes is None:
        return {"type": "null"}
    name = {"enum": list(classes.words)}
    label = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": classes.num - 1}, name]}
    return _one_or_more("a class by number or name", label, name, offer, limits)


def _prompt_schema(offer: Offer, limits: Limits) -> dict[str, Any]:
    """The JSON schema of what `Offer.order` takes as a prompt. It counts characters, of which there are no more than bytes."""
    if not offer.prompt_bytes:
        return {"type": "null"}
    text = {"type": "string", "maxLength": offer.prompt_bytes, "pattern": PRINTED}
    return _one_or_more(f"a text of at most {offer.prompt_bytes} bytes in UTF-8", text, text, offer, limits)


def _one_or_more(what: str, one: dict[str, Any], name: dict[str, Any], offer: Offer, limits: Limits) -> dict[str, Any]:
    """The schema of one thing, of several in turn, of weights of a mix by name, and of nothing."""
    mix = {
        "type": "object",
        "propertyNames": name,
        "additionalProperties": {"type": "number", "minimum": 0, "maximum": MOST_WEIGHT},
        "minProperties": 1,
        "maxProperties": offer.mixed_labels,
        "not": {"additionalProperties": {"const": 0}},  # not all of them
    }
    turn = {"type": "array", "items": one, "minItems": 1, "maxItems": limits.images}
    expected = f"{what}, a list of at most {limits.images} of them, weights of a mix, or null"
    return {"anyOf": [one, turn, mix, {"type": "null"}], "description": expected}


def _conditions_of(offer: Offer) -> Any:
    """What can be said to the model of an offer beside classes and a prompt."""
    names = tuple(name for name in offer.model.conditioner.inputs if name not in ("label", "text"))
    key: Any = Literal[names] if names else str
    expected = f"numbers, lists of numbers or texts by name, for {', '.join(names)}, or null" if names else "null"
    said = Annotated[dict[key, Said], Field(max_length=len(names))]
    return Annotated[said | None, Field(description=expected)]
