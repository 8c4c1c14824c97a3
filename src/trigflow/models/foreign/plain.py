"""A family for denoisers that none knows, guessed from the names of what they take."""

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from trigflow.models.foreign.family import Family, encoded

SAMPLE, TIME = ("hidden_states", "sample", "x"), ("timestep", "time", "t")
TEXT = {"encoder_hidden_states": "text", "encoder_attention_mask": "text_mask"}
"""From the name of an argument to that of the condition."""
FRAMES = 21
"""Of the latents of a video."""


class Plain(Family):
    """Called with sample, time and text by name; `assumed` names these. A flow model is told 1000 sigma, and says noise - data;
    a video has `FRAMES` of latents."""

    names: ClassVar[tuple[str, ...]] = ()

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        known = dict(zip(self.names, (x, time), strict=False)) | {name: told[TEXT[name]] for name in self.names[2:]}
        found = model(**known)
        return found[0] if isinstance(found, tuple | list) else getattr(found, "sample", found)

    def read(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        text, *rest = encoded(pipeline, texts)
        mask = next((row for row in rest if isinstance(row, Tensor) and row.shape == text.shape[:2]), None)
        return {"text": text} if mask is None else {"text": text, "text_mask": mask.bool()}


def of_names(names: Sequence[str], frames: int = 0) -> Family:
    """The family of denoisers whose arguments have these names: sample, time, and perhaps text and its mask; of a video for so
    many frames of latents."""
    said: dict[str, Any] = {
        "names": tuple(names),
        "name": f"plain({','.join(names)})",
        "assumed": ", ".join(names),
        "frames": frames,
    }
    made: Family = type("Plain", (Plain,), {**said, "conditions": tuple(TEXT[name] for name in names[2:])})()
    return made


def guess(denoiser: type) -> Family | None:
    """The family of a denoiser that is told a sample, a time and at most a text and the mask of it, by the names of the
    arguments of its `forward`; None for one that wants anything else. A mask is told to one that wants it, a text to one that
    takes it."""
    forward = getattr(denoiser, "forward", None)
    if forward is None:
        return None
    taken = inspect.signature(forward).parameters
    needed = [one for one in taken.values() if one.default is one.empty and one.kind == one.POSITIONAL_OR_KEYWORD]
    wanted = {one.name for one in needed[1:]}
    names = [next((name for name in known if name in taken), None) for known in (SAMPLE, TIME)]
    names += [name for name in TEXT if name in (taken if TEXT[name] == "text" else wanted)]
    if None in names or not wanted <= {*names}:
        return None
    return of_names([str(name) for name in names], FRAMES if "3D" in denoiser.__name__ else 0)
