"""Which diffusion models can be guided, and away from what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trigflow.conditions import Encoded, Input, Text, check_same_classes, quoted
from trigflow.runtime.errors import UserError

if TYPE_CHECKING:
    from trigflow.models.model import Model


def check_guidance(model: Model, negative: Model | None = None) -> None:
    """Check that a diffusion model can be guided, away from `negative` or from itself without the class. Raises a UserError for
    a negative of another kind, shape, scaling or set of classes; without one, for a class-conditional model whose unconditional
    branch was never trained."""
    if negative is None:
        if not model.sampling.guided:
            raise UserError(
                "guidance for a model trained with objective.label_dropout 0; expected one trained with label dropout, "
                "which is what teaches it to do without the class; train it so, or give a negative (--negative RUN)"
            )
        return
    if negative.kind != "diffusion":
        raise UserError("the negative is a consistency model; expected a diffusion model; use the run of its teacher")
    for what, mine, theirs in (
        ("draws images of shape", model.shape, negative.shape),
        ("has sigma_data", model.process.sigma_data, negative.process.sigma_data),
        ("scales data by", *({**m.codec.state(), "shape": None, "vae": None} for m in (model, negative))),
        ("has classes", model.num_classes, negative.num_classes or model.num_classes),
    ):
        if mine != theirs:
            raise UserError(
                f"the model {what} {mine} and its negative {theirs}; expected the same; "
                "use a negative that was trained on the same data"
            )
    mine, theirs = model.conditioner.inputs, negative.conditioner.inputs
    for name in sorted(mine.keys() & theirs.keys() - {"label"}):
        if _read(mine[name]) != _read(theirs[name]):
            raise UserError(
                f"the model is told {name} by {quoted(mine[name])} and its negative by {quoted(theirs[name])}; expected the "
                "same; use a negative that was trained on the same data"
            )
    check_same_classes(model.class_names, negative.class_names, "the model", "its negative")


def _read(told: Input) -> dict[str, Any]:
    """What rows of an input mean: all of its state but for how many tokens there are, and where a known encoder lies."""
    state = {"kind": told.kind, **told.state()}
    left = ("length",) if isinstance(told, Text) else ("length", "encoder") if isinstance(told, Encoded) and told.digest else ()
    return {name: value for name, value in state.items() if name not in (*left, "default")}
