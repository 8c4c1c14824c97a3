"""What a run folder says about its training: the settings, the log, and what the weights add to it."""

import dataclasses
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trigflow.models.weights import load_weights
from trigflow.networks import CustomConfig, build
from trigflow.objectives import AdaptiveWeight
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import read_tensors
from trigflow.training.checkpoint import list_checkpoints, open_checkpoint
from trigflow.training.config import RunConfig, read_config
from trigflow.training.instruments import bin_centres, embedding_of, relative_derivative
from trigflow.training.log import TIME_BINS, read_metrics

LATE = 0.25
"""Share of the log, at its end, whose medians stand for how a run is doing."""

LogLine = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """A run as it was found.

    Attributes:
        folder: the run folder.
        config: its settings.
        lines: its log, one or more lines, oldest first.
        finished: whether the model has been written.
        weights: figures under the names of the log that the weights gave where the log had none of them.
    """

    folder: Path
    config: RunConfig
    lines: list[LogLine]
    finished: bool
    weights: LogLine = field(default_factory=dict)

    @property
    def student(self) -> bool:
        """Whether it is trained on a consistency tangent."""
        return self.config.objective.has_tangent and self.config.objective.probe == "tangent"

    @property
    def iteration(self) -> int:
        """How far the log goes."""
        return int(self.lines[-1]["iteration"])

    @property
    def late(self) -> list[LogLine]:
        """The last quarter of the log, one line or more."""
        return self.lines[-max(1, math.ceil(LATE * len(self.lines))) :]

    def value(self, name: str, lines: list[LogLine] | None = None) -> float | None:
        """Median of a figure over these lines, or the late ones; None where it was not logged."""
        values = [line[name] for line in (self.late if lines is None else lines) if line.get(name) is not None]
        return statistics.median(values) if values else self.weights.get(name)

    def by_time(self, name: str) -> list[float | None] | None:
        """Late medians of a figure by time, one for each bin; None where it was not logged."""
        rows = [line[name] for line in self.late if line.get(name) is not None]
        if not rows:
            return self.weights.get(name)
        columns = [[row[i] for row in rows if row[i] is not None] for i in range(TIME_BINS)]
        return [statistics.median(column) if column else None for column in columns]


def read_record(folder: Path) -> RunRecord:
    """Read a run folder, of a finished run or one that is still going or stopped. Raises a UserError when it is no run folder,
    has no line of log yet, or a file cannot be used."""
    config = read_config(folder)
    lines = read_metrics(folder)
    if not all(isinstance(line, dict) and isinstance(line.get("iteration"), int) for line in lines):
        raise UserError(
            f"'{folder / 'metrics.jsonl'}' has a line without an iteration; expected the log of a run; restore the file"
        )
    if not lines:
        raise UserError(
            f"'{folder}' has no line of log yet; expected metrics.jsonl with at least one; let the run go on for "
            f"{config.loop.log_every} iterations"
        )
    record = RunRecord(folder, config, lines, (folder / "model.json").is_file())
    return dataclasses.replace(record, weights=_from_weights(record))


@torch.no_grad()
def _from_weights(record: RunRecord) -> LogLine:
    """Figures of the instruments that can be had from the saved weights, where the log has none."""
    found: LogLine = {}
    config, last, checkpoints = record.config, record.lines[-1], list_checkpoints(record.folder)
    embeds = record.student and "embedding_derivative_end" not in last and not isinstance(config.network, CustomConfig)
    weighting: dict[str, Tensor] = {}
    averaged: dict[str, Tensor] = {}
    if checkpoints:
        with open_checkpoint(checkpoints[-1]) as stored:
            weighting = {} if "weight_by_time" in last else stored.read_all("weight")
            averaged = stored.read_all("ema") if embeds and not record.finished else {}
    if "linear.weight" in weighting:
        weight = AdaptiveWeight(config.process)
        load_weights(weight, weighting, f"'{checkpoints[-1]}'")
        found["weight_by_time"] = weight(bin_centres()).tolist()
    if embeds and record.finished:
        averaged = read_tensors(record.folder / "network.safetensors", "weights")
    if not averaged:
        return found
    with torch.random.fork_rng(devices=[]):  # fresh weights, about to be replaced
        network = build(config.network, config.process.sigma_data).eval()
    load_weights(network, averaged, f"'{record.folder}'")
    embed = embedding_of(network)
    if embed is not None:
        t = torch.cat([bin_centres(), torch.tensor([config.process.t_max])])
        *derivatives, end = relative_derivative(embed, t).tolist()
        found |= {"embedding_derivative_by_time": derivatives, "embedding_derivative_end": end}
    return found
