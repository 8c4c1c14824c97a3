"""What a run shows while it trains: a progress bar, and now and then a line of metrics and a grid of samples."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trigflow.codecs import Codec
from trigflow.codecs.pictures import save_picture
from trigflow.models.model import Model
from trigflow.objectives import known
from trigflow.runtime.distributed import average, is_first
from trigflow.runtime.errors import UserError
from trigflow.training.config import RunConfig
from trigflow.training.guard import Guard
from trigflow.training.log import FigureWindow, MetricLog, warn

SAMPLES = 40
"""Samples on a grid."""


class Report:
    """Follows a run, in each of its processes; the first one writes.

    Attributes:
        log: the metrics of the run; None in the other processes.
    """

    def __init__(self, folder: Path, config: RunConfig, iteration: int, *, show: bool) -> None:
        self.folder = folder
        self.loop = config.loop
        self.log = self._open(iteration)
        title = known(config.objective.kind).title
        self.bar = tqdm(total=self.loop.iterations, initial=iteration, desc=title, unit="it", disable=not show)
        self._begin(iteration)

    def add(self, iteration: int, figures: dict[str, Tensor]) -> None:
        """Take in the figures of the samples of a step, the `iteration`-th."""
        self.window.add(figures)
        self.bar.update(iteration - self.bar.n)

    def due(self, iteration: int) -> bool:
        """Whether a line is to be written after this many steps."""
        return iteration % self.loop.log_every == 0 or iteration == self.loop.iterations

    def write(self, iteration: int, scalars: dict[str, Any], measured: dict[str, Any], guard: Guard, waited: float) -> None:
        """One line about the steps since the last one. All processes call this together. `waited` are the seconds spent waiting
        for data."""
        seconds = time.perf_counter() - self.began
        self.window.gather()
        metrics = {**scalars, **self.window.flush(), **measured, **guard.figures()}
        metrics["images_per_second"] = (iteration - self.since) * self.loop.batch_size / seconds
        metrics["data_wait"] = waited / seconds
        if self.log is not None:
            self.log.write(iteration, metrics)
        told = {"loss": f"{metrics['loss']:.4f}", **guard.told(), "data_wait": f"{metrics['data_wait']:.0%}"}
        self.bar.set_postfix(told, refresh=False)
        self._begin(iteration)

    def go_back(self, iteration: int) -> None:
        """The run has gone back to this many steps: later lines are dropped."""
        if self.log is not None:
            self.log.close()
            self.log = self._open(iteration)
        self._begin(iteration)

    def close(self) -> None:
        """End the progress bar and close the log."""
        self.bar.close()
        if self.log is not None:
            self.log.close()

    def _open(self, iteration: int) -> MetricLog | None:
        return MetricLog(self.folder, iteration) if is_first() else None

    def _begin(self, iteration: int) -> None:
        self.window, self.began, self.since = FigureWindow(), time.perf_counter(), iteration


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
