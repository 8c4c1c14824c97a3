"""The diffusion (velocity prediction) objective: how a teacher is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trigflow.objectives.objective import (
    Check,
    Given,
    Loss,
    Objective,
    Weight,
    as_figures,
    evaluate,
    per_sample_mean_square,
    weighted_mean,
)
from trigflow.process import TrigFlow
from trigflow.samplers.guidance import Network


@dataclass(frozen=True)
class Diffusion(Objective):
    """Velocity prediction."""

    label_dropout: float = 0.1
    """Share of samples whose class, and whatever else can be left out, is left out, for classifier-free guidance."""

    @property
    def probe(self) -> Literal["error", "tangent"] | None:
        return "error"

    def checks(self, process: TrigFlow) -> list[Check]:
        return [(0 <= self.label_dropout < 1, "label_dropout", self.label_dropout, "in [0, 1)")]

    def loss(self, given: Given) -> Loss:
        batch = given.batch
        return diffusion_loss(
            given.network, given.process, batch["x0"], batch["noise"], batch["t"],
            conditions=given.conditions, weight=given.weight,
        )  # fmt: skip


def diffusion_loss(
    network: Network,
    process: TrigFlow,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    conditions: Mapping[str, Tensor] | None = None,
    weight: Weight | None = None,
) -> Loss:
    """Velocity prediction with adaptive weighting::

        L = E[ exp(w(t)) / D || sd F(x_t / sd, t) - v ||^2 - w(t) ],    v = cos(t) z - sin(t) x0

    Args:
        network: called as `network(x_t / sd, t, **conditions)`, with t as the end where it is told one.
        process: the TrigFlow process.
        x0: data, `(b, ...)`, standard deviation sd.
        noise: `z ~ N(0, sd^2 I)`, like x0.
        t: times `(b,)` in (0, pi/2).
        conditions: by name, what is to be left out already left out.
        weight: `w(t)`, `(b,)` to `(b,)`; None for no weighting.

    Returns:
        Loss with figures `t`, `loss` of shape `(b,)`.

    Source: Lu and Song 2025, equations 5 and 8 (sections 3 and 4.2).
    """
    x_t = process.interpolate(x0, noise, t)
    target = process.velocity(x0, noise, t)
    prediction = evaluate(network, x_t / process.sigma_data, t, t, conditions or {})
    error = per_sample_mean_square(process.sigma_data * prediction - target)
    return Loss(weighted_mean(error, t, weight), as_figures(t=t, loss=error))
