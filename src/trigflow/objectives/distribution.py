"""Variational score distillation: a one-step generator whose distribution is moved onto the teacher's.

The generator `G(z) = f(z, t_max)` is the student, evaluated once. Its samples are noised again, and two diffusion networks
look at them: the teacher, which knows the score of the data, and a *fake score* network, which starts as the teacher and is
trained all along on the generator's samples, so that it knows theirs. The difference of the two is the gradient of
`KL(generator || data)` at that noise level.

Sources: Wang et al. 2023 (ProlificDreamer, arXiv 2305.16213), where the gradient is from; Yin et al. 2024 (DMD, arXiv
2311.18828), from which the normalization is, equations 7 and 8; Lu and Song 2025, section 5, where it is added to sCD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
from trigflow.objectives.flow_map import jump
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError


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


def rollout_times(process: TrigFlow, iteration: int, longest: int, generator: torch.Generator) -> tuple[float, ...]:
    """Times of the rollout of an iteration: `t_max`, then n - 1 random ones downward, n cycling through 1 ... `longest`.

    The random ones are even in `(0, t_max)`. Source: Zheng et al. 2025 (rCM, arXiv 2510.08431), with `longest` 4.

    Raises:
        UserError: if longest < 1.
    """
    if longest < 1:
        raise UserError(f"rollouts of at most {longest} steps; expected at least 1; raise the number of steps")
    drawn = torch.rand(iteration % longest, generator=generator, dtype=torch.float64, device=generator.device)
    lowest = 1e-3  # of t_max, so that no jump has no length
    inner = ((lowest + (1 - 2 * lowest) * drawn) * process.t_max).sort(descending=True).values.tolist()
    return (process.t_max, *inner)


def rollout(
    network: Network,
    process: TrigFlow,
    z: Tensor,
    times: Sequence[float],
    fresh: Sequence[Tensor] = (),
    *,
    conditions: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Samples of consistency sampling at these times, on the autograd graph of the last evaluation only::

        x0 <- f(cos(t) sg(x0) + sin(t) z', t)

    for the joint loss `L_scm + lambda L_vsd`, in which they take the place of one-step samples, so that score distillation
    sharpens what is drawn in several steps too. With one time, `t_max`, this is `generate`.

    Args:
        network: the student, called as `network(x_t / sd, t, **conditions)`, with `end` 0 where it takes one.
        process: the TrigFlow process.
        z: noise `N(0, sd^2 I)`, `(b, ...)`.
        times: decreasing; see `rollout_times`.
        fresh: noise z' of each step after the first, like z.
        conditions: everything else that the network is told, by name.

    Returns:
        `x0`, like z.

    Raises:
        UserError: if there is not one fresh noise for each step after the first.

    Source: Zheng et al. 2025 (rCM, arXiv 2510.08431).
    """
    if not times or len(fresh) != len(times) - 1:
        raise UserError(
            f"{len(fresh)} fresh noises for a rollout at {len(times)} times; expected one for each time after the first; "
            "correct fresh"
        )
    last = len(times) - 1
    x_t = z
    for k, time in enumerate(times):
        t = torch.full((len(z),), time, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
        with torch.set_grad_enabled(k == last and torch.is_grad_enabled()):
            x0 = jump(network, process, x_t, t, torch.zeros_like(t), conditions or {})
        if k < last:
            x_t = process.interpolate(x0, fresh[k], times[k + 1])
    return x0


def fake_score_loss(
    fake: Network,
    process: TrigFlow,
    sample: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    conditions: Mapping[str, Tensor] | None = None,
) -> Loss:
    """Diffusion loss of the fake score network on samples of rollouts, weighted `1 / sin^2(t)`::

        L = E[ || sd F_phi - v ||^2 / (D sin^2(t)) ]

    which weighs errors of the denoised sample, `sin(t) (v - sd F)`, by `1 / sin^4(t)`.

    Args:
        fake: called as `fake(x_t / sd, t, **conditions)`.
        sample: of the student, `(b, ...)`; no gradient goes to it.
        noise: `N(0, sd^2 I)`, like sample.
        t: times `(b,)` in (0, pi/2).

    Returns:
        Loss with figures `t` and `loss` (without the weight), each `(b,)`.

    Source: Zheng et al. 2025 (rCM, arXiv 2510.08431).
    """
    x0 = sample.detach()
    x_t = process.interpolate(x0, noise, t)
    prediction = fake(x_t / process.sigma_data, t, **(conditions or {}))
    error = per_sample_mean_square(process.sigma_data * prediction - process.velocity(x0, noise, t))
    return Loss((error / torch.sin(t) ** 2).mean(), as_figures(t=t, loss=error))


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
