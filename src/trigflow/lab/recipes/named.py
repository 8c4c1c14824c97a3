"""What a recipe is."""

from dataclasses import dataclass
from typing import Literal

from trigflow.training.config import RunConfig


@dataclass(frozen=True)
class Recipe:
    """How to train a teacher, and how to distill it."""

    teacher: RunConfig
    student: RunConfig


@dataclass(frozen=True)
class NamedRun:
    """One training run under a name.

    Attributes:
        name: as in `trigflow train --preset NAME`.
        config: its settings; channels, classes and resolution of the network are taken from the data when it runs.
        shape: `(c, h, w)` of one sample as the network sees it, where the data are those it is meant for.
        classes: number of classes of these data; 0 for none.
        folder: run folder of the teacher, where it is one from diffusers.
    """

    name: str
    config: RunConfig
    shape: tuple[int, ...]
    classes: int
    folder: str | None = None

    @property
    def command(self) -> Literal["train", "distill"]:
        """The command that starts it. An sct run can also start from a teacher, with distill."""
        return "distill" if self.config.objective.distills else "train"
