"""An objective of one's own: sCD with a Huber loss in place of the square, in one file.

    trigflow train --preset digits --out runs/teacher
    trigflow distill runs/teacher --plugin examples/own_objective.py --objective.kind huber --objective.bend 0.5 --out RUN
    trigflow sample RUN --plugin examples/own_objective.py

Its settings are its fields, so `trigflow distill --plugin examples/own_objective.py --objective.kind huber --help` shows them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from trigflow.objectives import Given, Loss, StudentObjective, eulerian_tangent, register, shape_tangent
from trigflow.process import TrigFlow


@dataclass(frozen=True)
class Huber(StudentObjective):
    """Consistency distillation whose error grows no faster than a straight line.

    With the tangent g of sCD: `L = mean huber(F - sg(F) - shape(g))`.
    """

    kind: str = "huber"
    bend: float = 1.0
    """Where the square becomes a straight line."""

    @property
    def has_tangent(self) -> bool:
        return True

    def checks(self, process: TrigFlow) -> list[tuple[bool, str, object, str]]:
        return [*super().checks(process), (self.bend > 0, "bend", self.bend, "a positive number")]

    def loss(self, given: Given) -> Loss:
        process, batch, t = given.process, given.batch, given.batch["t"]
        with torch.no_grad():
            x_t = process.interpolate(batch["x0"], batch["noise"], t)
            v = process.velocity(batch["x0"], batch["noise"], t) if given.teacher is None else given.teacher(x_t, t)
        r, end = self.tangent.warmup_factor(given.iteration), torch.zeros_like(t)
        prediction, g = eulerian_tangent(given.network, process, x_t, v, t, end, given.conditions, r=r)
        target = prediction.detach() + shape_tangent(g, self.tangent)
        error = F.huber_loss(prediction, target, reduction="none", delta=self.bend).flatten(1).mean(1)
        return Loss(error.mean(), {"t": t, "loss": error.detach(), "tangent_norm": g.square().flatten(1).mean(1).sqrt()})


register("huber", Huber, title="student (Huber)", summary="sCD with a Huber loss")
