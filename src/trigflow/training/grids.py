"""Grids of samples, drawn while a run trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trigflow.codecs import Codec
from trigflow.codecs.pictures import save_picture
from trigflow.models.model import Model
from trigflow.runtime.distributed import average, is_first
from trigflow.runtime.errors import UserError
from trigflow.training.log import MetricLog, warn

SAMPLES = 40
"""Samples on a grid."""


@dataclass
class Grids:
    """Draws grids into the folder `samples` of a run. A grid that cannot be had is said so, and training goes on.

    Attributes:
        folder: the run folder.
        codec: makes pictures of samples; what it needs for that is loaded when the first grid is drawn.
        seed: of the noise.
        device: where it is put.
        sharded: whether weights are, in which case all processes have to draw. Otherwise the first one does.
        said: captions to draw, as `Model.sample` takes conditions; nothing for the model's own default.
    """

    folder: Path
    codec: Codec
    seed: int
    device: torch.device
    sharded: bool
    said: Mapping[str, Any]
    _draws: bool = True

    def draw(self, model: Model, iteration: int, log: MetricLog | None) -> None:
        """Draw the grid of this iteration. Processes that write nothing have no log."""
        if not (is_first() or self.sharded) or not self._can_draw():
            return
        grid = self.codec.preview(model.sample(SAMPLES, seed=self.seed, conditions=self.said), columns=10)
        if log is None:
            return
        try:
            save_picture(grid, self.folder / "samples" / f"{iteration:08d}.png")
        except UserError as error:
            warn(f"no sample grid of iteration {iteration}: {error}")
        log.picture(iteration, "samples", np.asarray(grid.convert("RGB")))

    def _can_draw(self) -> bool:
        """Whether samples can be seen: latents need their autoencoder. Where what they need is missing, that is said once."""
        if self._draws:
            try:
                self.codec.prepare(self.device)
            except UserError as error:
                self._draws = False
                warn(f"no sample grids: {error}")
        if self.sharded:
            self._draws = average({"draws": float(self._draws)})["draws"] == 1
        return self._draws
