"""What a run tells while it trains: a progress bar, and now and then a line of metrics."""

import time
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from trigflow.objectives import known
from trigflow.runtime.distributed import is_first
from trigflow.training.config import RunConfig
from trigflow.training.guard import Guard
from trigflow.training.log import FigureWindow, MetricLog


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
