"""Variational score distillation: a one-step generator whose distribution is moved onto the teacher's.

The generator `G(z) = f(z, t_max)` is the student, evaluated once. Its samples are noised again, and two diffusion networks
look at them: the teacher, which knows the score of the data, and a *fake score* network, which starts as the teacher and is
trained all along on the generator's samples, so that it knows theirs. The difference of the two is the gradient of
`KL(generator || data)` at that noise level.

Sources: Wang et al. 2023 (ProlificDreamer, arXiv 2305.16213), where the gradient is from; Yin et al. 2024 (DMD, arXiv
2311.18828), from which the normalization is, equations 7 and 8; Lu and Song 2025, section 5, where it is added to sCD.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trigflow.objectives.common import (
    Loss,
    Network,
    VelocityFunction,
    as_figures,
    per_sample_mean_square,
    weighted_mean,
)
from trigflow.process import TrigFlow


def generate(
    network: Network,
    process: TrigFlow,
    z: Tensor,
    *,
    label: Tensor | None = None,
    guidance: Tensor | None = None,
) -> Tensor:
    """One-step samples `G(z) = cos(t_max) z - sin(t_max) sd F(z / sd, t_max)`, on the autograd graph.

    Args:
        network: the student, called as `network(z / sd, t_max, label, guidance)`.
        process: gives `sd` and `t_max`.
        z: noise `N(0, sd^2 I)`, `(b, ...)`.
        label: int64 `(b,)` or None.
        guidance: guidance scale `(b,)`, an input of the student, or None.

    Returns:
        `x0`, like z.
    """
    t = torch.full((len(z),), process.t_max, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    velocity = process.sigma_data * network(z / process.sigma_data, t, label, guidance).to(z.dtype)
    return process.denoise(z, velocity, t)


def vsd_direction(velocity: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
    """What a sample moves against, `delta = (x0_fake(x_t) - x0_teacher(x_t)) / mean|G - x0_teacher(x_t)|`.

    All three points are `cos(t) x_t - sin(t) v` of the same x_t, each with a velocity v of its own (G with the one it was
    noised with), so `sin(t)` cancels and the difference of small numbers near t = 0 is never taken::

        delta = (v_teacher - v_fake) / mean|v_teacher - v|

    Args:
        velocity: `v = cos(t) n - sin(t) G`, of G noised with n; `(b, ...)`.
        teacher: the teacher's velocity at `(x_t, t)`, likewise.
        fake: that of the fake score network, likewise.

    Returns:
        `delta`, like velocity, in float32 or higher. The mean is over the elements of each sample. A single element has no
        finite expectation, because its error can be anything down to zero.
    """
    precision = torch.promote_types(velocity.dtype, torch.float32)
    velocity, teacher, fake = (v.to(precision) for v in (velocity, teacher, fake))
    scale = (teacher - velocity).abs().flatten(1).mean(1).clamp_min(torch.finfo(precision).eps)
    return (teacher - fake) / scale.reshape(-1, *[1] * (velocity.ndim - 1))


def vsd_loss(
    sample: Tensor,
    process: TrigFlow,
    noise: Tensor,
    t: Tensor,
    *,
    teacher: VelocityFunction,
    fake: VelocityFunction,
    weight: Callable[[Tensor], Tensor] | None = None,
) -> Loss:
    """Variational score distillation of samples G(z) with adaptive weighting::

        L = E[ exp(w(t)) / D || G - sg(G) + delta ||^2 - w(t) ]

    with delta from `vsd_direction` at `x_t = cos(t) G + sin(t) n`, and `sg` stopping gradients. The value is the size of
    delta, the gradient `2 exp(w(t)) / D  delta dG`. The weighting thus scales each time by a positive number and turns no
    direction. It is a `w` of this loss alone: the one of a consistency loss belongs to errors of another size.

    Args:
        sample: G(z), see `generate`; `(b, ...)`, on the autograd graph of the student.
        process: the TrigFlow process.
        noise: `n ~ N(0, sd^2 I)`, independent of z; like sample.
        t: times `(b,)` in (0, pi/2). The paper draws them with `Proposal(0.4, 2.0)`.
        teacher: velocity function of the teacher, guidance included; evaluated without gradients.
        fake: velocity function of the fake score network for the same labels and guidance scales; likewise.
        weight: `w(t)`, `(b,)` to `(b,)`; None for no weighting.

    Returns:
        Loss with figures `t` and `loss` (mean square of delta), each `(b,)`.

    Source: Lu and Song 2025, section 5; Yin et al. 2024, equations 7 and 8.
    """
    with torch.no_grad():
        x0 = sample.detach()
        x_t = process.interpolate(x0, noise, t)
        delta = vsd_direction(process.velocity(x0, noise, t), teacher(x_t, t), fake(x_t, t))
    error = per_sample_mean_square(sample - sample.detach() + delta)
    return Loss(weighted_mean(error, t, weight), as_figures(t=t, loss=error))
