"""Grids of samples, drawn while a run trains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trigflow.codecs import Codec
from trigflow.codecs.pictures import save_picture
from trigflow.models.model import Model
from trigflow.runtime.distributed import average, is_first
from trigflow.runtime.errors import UserError
from trigflow.training.log import MetricLog, warn

SAMPLES = 40
"""Samples on a grid."""


class Grids:
    """Draws grids into the folder `samples` of a run. A grid that cannot be had is said so, and training goes on.

    Args:
        folder: the run folder.
        codec: makes pictures of samples; what it needs for that is loaded when the first grid is drawn.
        seed: of the noise.
        device: where it is put.
        sharded: whether weights are, in which case all processes have to draw. Otherwise the first one does.
        said: captions to draw, as `Model.sample` takes conditions; nothing for the model's own default.
    """

    def __init__(
        self, folder: Path, codec: Codec, seed: int, device: torch.device, sharded: bool, said: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder / "samples"
        self.codec = codec
        self.seed = seed
        self.device = device
        self.sharded = sharded
        self.said = said
        self._draws = True

    def draw(self, model: Model, iteration: int, log: MetricLog | None) -> None:
        """Draw the grid of this iteration. Processes that write nothing have no log."""
        if not (is_first() or self.sharded) or not self._can_draw():
            return
        grid = self.codec.preview(model.sample(SAMPLES, seed=self.seed, conditions=self.said), columns=10)
        if log is None:
            return
        try:
            save_picture(grid, self.folder / f"{iteration:08d}.png")
        except UserError as error:
            warn(f"no sample grid of iteration {iteration}: {error}")
        pixels = torch.frombuffer(bytearray(grid.convert("RGB").tobytes()), dtype=torch.uint8)
        log.picture(iteration, "samples", pixels.reshape(grid.height, grid.width, 3))

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
