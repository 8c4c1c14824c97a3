"""What a run folder has to offer: its model and, where it holds one, its teacher."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trigflow.conditions import Classes, Text, named, said_of
from trigflow.conditions.conditioner import parts_of, shares
from trigflow.conditions.text import LENGTHS
from trigflow.deploy import Engine
from trigflow.models.model import Model, load
from trigflow.runtime.errors import UserError
from trigflow.serve.drawing import Drawer, Mix, ModelDrawer, Order, draw_together
from trigflow.serve.limits import Limits
from trigflow.serve.noise import NoiseSource, Walk

Labels = int | str | Sequence[int | str] | Mapping[Any, float] | None
"""One class, classes in turn, a mix of classes with their weights, or all classes in turn; by number or name."""


@dataclass(frozen=True)
class Offer:
    """A model with the numbers that it takes.

    Attributes:
        name: `student` or `teacher`.
        model: gives noise, classes and times.
        drawers: draw with it, each in a thread of its own.
        shape: `(c, h, w)` of a picture.
        guidance: lowest and highest scale; both 1 without guidance.
        steps: fewest and most steps.
        mixed_labels: most classes of a mix.
        prompt_bytes: of the longest prompt; 0 for a model of no words.
    """

    name: str
    model: Model
    drawers: tuple[Drawer, ...]
    shape: tuple[int, ...]
    guidance: tuple[float, float]
    steps: tuple[int, int]
    mixed_labels: int
    prompt_bytes: int = 0

    def order(
        self,
        *,
        seed: int = 0,
        count: int = 1,
        first: int = 0,
        labels: Labels = None,
        prompt: str | Sequence[str] | Mapping[str, float] | None = None,
        guidance: float = 1.0,
        steps: int | None = None,
        walk: Walk = (0.0, 0.0),
        conditions: Mapping[str, Any] | None = None,
    ) -> Order:
        """An order for pictures first ... first + count - 1 of a seed. Raises a UserError for labels, prompts, conditions,
        guidance or steps that this model does not take."""
        steps = self.model.default_steps() if steps is None else steps
        _check_range("steps", steps, self.steps, self.name)
        _check_range("guidance", guidance, self.guidance, self.name)
        if count < 1 or first < 0:
            raise UserError(f"{count} pictures from number {first}; expected 1 or more, from 0 on; correct count or first")
        if "label" in (conditions or {}):
            raise UserError("a label among the conditions; expected classes as labels; move it there")
        classes, mix = self.model.conditioner.classes, None
        if classes is not None and isinstance(labels, Mapping):
            mix, labels = self._mix(classes, labels), None
        parts = parts_of(said_of(labels, conditions, prompt), self.model.conditioner.inputs)
        if len(parts) > self.mixed_labels:
            raise UserError(f"a mix of {len(parts)} texts; expected at most {self.mixed_labels}; mix fewer")
        for _, said in parts:
            if said.get("text") is not None and self.prompt_bytes:
                Text(self.prompt_bytes + 1).numbers(said["text"])
        rows = [self.model.conditioner.conditions(said, count, first) for _, said in parts]
        numbers = [row.pop("label") for row in rows if classes is not None]
        mixes = tuple(mix or ((label, 1.0),) for label in numbers[0].tolist()) if numbers else None
        told = rows[0] if len(parts) == 1 else {name: torch.stack([row[name] for row in rows], 1) for name in rows[0]}
        return Order(seed, first, first + count, mixes, guidance, steps, walk, told, tuple(weight for weight, _ in parts))

    def try_out(self, batch: int) -> None:
        """Draw one picture as a request without fields gets it, and a batch of those that cost most a step: this shows what is
        wrong with a model, and takes the memory that is going to be needed."""
        classes = min(self.mixed_labels, self.model.num_classes)
        mix = dict.fromkeys(range(classes), 1.0) if classes else None
        costly = self.order(count=batch, labels=mix, guidance=self.guidance[1], steps=self.steps[0])
        for drawer in self.drawers:
            for order in (self.order(), costly):
                draw_together(drawer, NoiseSource(self.model), [order])

    def _mix(self, classes: Classes, weights: Mapping[Any, float]) -> Mix:
        mixed = shares(weights)
        if len(mixed) > self.mixed_labels:
            raise UserError(f"a mix of {len(mixed)} labels; expected at most {self.mixed_labels}; mix fewer")
        numbers = dict(zip(weights, classes.numbers(list(weights)).tolist(), strict=True))
        return tuple(sorted((numbers[label], share) for label, share in mixed))


def offer_of(model: Model, limits: Limits, *drawers: Drawer) -> Offer:
    """The offer of a model: `student` for a consistency model, `teacher` for a diffusion model.

    Args:
        model: read-only from here on.
        limits: bounds of steps, guidance and mixes.
        drawers: draw with the model, each in a thread of its own; one `ModelDrawer` by default.

    Raises:
        UserError, MissingExtraError: for a model of latents whose autoencoder cannot be loaded.
    """
    model.codec.prepare(model.device)
    segments = model.sampling.segments
    return Offer(
        name="student" if model.kind == "consistency" else "teacher",
        model=model,
        drawers=drawers or (ModelDrawer(model),),
        shape=model.codec.drawn_shape,
        guidance=_guidance(model, limits),
        steps=(segments, segments) if segments > 1 else (1, limits.steps),
        mixed_labels=limits.mixed_labels,
        prompt_bytes=_prompt_bytes(model, limits),
    )


def offers_of(run: Path, limits: Limits, device: str = "auto", variant: str = "auto", workers: int = 1) -> list[Offer]:
    """The model of a run folder first, and its teacher where that is still there and has the same classes; both ready to draw,
    so that no request has to wait for what a variant does once, and memory does not grow by it later.

    Args:
        run: folder of a student or a teacher.
        limits: see `offer_of`; `batch` is the size up to which the variant is made ready, see `Engine.settle`.
        device: cpu, cuda or auto.
        variant: how their networks are computed, see `trigflow.deploy.VARIANTS`.
        workers: threads that draw with each, every one with buffers of its own.

    Raises:
        UserError: when a folder or a file is damaged, or the variant does not work here.
    """

    def offer(folder: Path) -> Offer:
        loaded = load(folder, device)
        steps = 1 if loaded.kind == "diffusion" else None
        engines = [Engine(loaded, steps=steps, variant=variant) for _ in range(workers)]
        largest = min([engine.settle(limits.batch) for engine in engines])
        made = offer_of(loaded, limits, *[ModelDrawer(engine.model) for engine in engines])
        made.try_out(largest)
        return made

    offers = [offer(run)]
    model = offers[0].model
    found = model.origin.get("teacher") if model.kind == "consistency" else None
    for folder in () if found is None else (run / found, Path(found)):
        if (folder / "model.json").is_file():
            teacher = offer(folder)
            if teacher.name == "teacher" and teacher.shape == offers[0].shape and _told_the_same(teacher, offers[0]):
                return [*offers, teacher]
            print(
                f"'{folder}' is not served: it draws other shapes or classes than its student, or reads other texts",
                file=sys.stderr,
                flush=True,
            )
    return offers


def _told_the_same(one: Offer, other: Offer) -> bool:
    """Whether both read the same texts, and class k of the one is class k of the other; names that are but numbers, "0", "1",
    ..., say nothing."""
    names, others = one.model.class_names, other.model.class_names
    same = names == others or not (named(names) and named(others))
    same_text = one.model.conditioner.inputs.get("text") == other.model.conditioner.inputs.get("text")
    return same and same_text and one.model.num_classes == other.model.num_classes


def _guidance(model: Model, limits: Limits) -> tuple[float, float]:
    """The scales that a model takes."""
    if "guidance" in model.takes:
        return 1.0, model.sampling.guidance_max
    try:
        model.velocity(model.conditioner.conditions(), 2.0)
    except UserError:
        return 1.0, 1.0
    return 1.0, max(1.0, limits.guidance)


def _prompt_bytes(model: Model, limits: Limits) -> int:
    """Bytes of the longest prompt that may be sent for a model; an encoder of another kind may read less of it."""
    text = model.conditioner.inputs.get("text")
    length = text.length if isinstance(text, Text) else LENGTHS[1]
    return 0 if text is None else min(limits.prompt_bytes, length - 1)


def _check_range(what: str, value: float, bounds: tuple[float, float], name: str) -> None:
    low, high = bounds
    if not low <= value <= high:
        expected = f"{low:g}" if low == high else f"a number from {low:g} to {high:g}"
        raise UserError(f"{what} {value:g} for the {name}; expected {expected}; correct {what}")
