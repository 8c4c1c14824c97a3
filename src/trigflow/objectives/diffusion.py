"""The diffusion (velocity prediction) objective: how a teacher is trained."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trigflow.objectives.common import Loss, Network, as_figures, per_sample_mean_square, weighted_mean
from trigflow.process import TrigFlow


def diffusion_loss(
    network: Network,
    process: TrigFlow,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    label: Tensor | None = None,
    guidance: Tensor | None = None,
    weight: Callable[[Tensor], Tensor] | None = None,
) -> Loss:
    """Velocity prediction with adaptive weighting::

        L = E[ exp(w(t)) / D || sd F(x_t / sd, t) - v ||^2 - w(t) ],    v = cos(t) z - sin(t) x0

    Args:
        network: called as `network(x_t / sd, t, label, guidance)`.
        process: the TrigFlow process.
        x0: data, `(b, ...)`, standard deviation sd.
        noise: `z ~ N(0, sd^2 I)`, like x0.
        t: times `(b,)` in (0, pi/2).
        label: int64 `(b,)`, label dropout already applied, or None.
        guidance: guidance scale `(b,)` of a network that takes it (the fake score of a guided student), or None.
        weight: `w(t)`, `(b,)` to `(b,)`; None for no weighting.

    Returns:
        Loss with figures `t`, `loss` of shape `(b,)`.

    Source: Lu and Song 2025, equations 5 and 8 (sections 3 and 4.2).
    """
    x_t = process.interpolate(x0, noise, t)
    target = process.velocity(x0, noise, t)
    prediction = network(x_t / process.sigma_data, t, label, guidance)
    error = per_sample_mean_square(process.sigma_data * prediction - target)
    return Loss(weighted_mean(error, t, weight), as_figures(t=t, loss=error))
