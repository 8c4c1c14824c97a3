"""Discrete-time consistency: the student at one time agrees with itself at an earlier time of the same trajectory.

Kinds `ct` (consistency training: the trajectory is that of one data point and one noise) and `cd` (consistency distillation:
one step of a solver along the teacher's velocity). The earlier time s of a time t comes from a schedule:

=========  ==============================================================  ===============================================
schedule   s                                                               source
=========  ==============================================================  ===============================================
steps      the next lower of N + 1 fixed times, N constant or doubled      Song et al. 2023 (CD, arXiv 2303.01469); Song and
           again and again                                                 Dhariwal 2023 (iCT, arXiv 2310.14189)
ect        a share of t in noise level, which grows towards 1 in stages    Geng et al. 2024 (ECT, arXiv 2406.14548)
=========  ==============================================================  ===============================================

As everywhere in this package the student is `f(x, t) = cos(t) x - sin(t) sd F(x / sd, t)`, and the target is the student itself
with gradients stopped, not an average of its weights. As the step goes to zero the gradient becomes that of
sCT and sCD.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trigflow.objectives.objective import (
    NEAREST,
    Check,
    Given,
    Loss,
    StudentObjective,
    TangentConfig,
    Weight,
    as_figures,
    evaluate,
    per_sample_mean_square,
    weighted_mean,
)
from trigflow.objectives.tangents import shape_tangent
from trigflow.process import TrigFlow, trig
from trigflow.samplers.grid import sigma_grid
from trigflow.samplers.guidance import Network, VelocityFunction
from trigflow.tangent.dispatch import replayed_draws

SHORTEST = 1e-7
"""Shortest step in t that anything is divided by, about the distance of float32 numbers near pi/2."""


@dataclass(frozen=True)
class DiscreteConfig:
    """Pairs of times, and what is done with the difference between them, of discrete-time consistency.

    Published settings:

    ============================  =======================================================================================
    dsCD (Lu and Song 2025)       kind cd, N = 256 ... 4096; everything else as it is here and for sCD
    CD (Song et al. 2023)         kind cd, solver heun
    iCT (Song and Dhariwal 2023)  kind ct, initial_steps 10, steps 1280, distance huber, `Proposal(-1.1, 2.0)`
    ECT, CIFAR-10 (Geng et al.)   kind ct, schedule ect, `Proposal(-1.1, 2.0)`
    ECT, ImageNet 64              kind ct, schedule ect, q 4, stages 4, weighting snr
    ============================  =======================================================================================
    """

    schedule: Literal["steps", "ect"] = "steps"
    """Neighbours on a fixed grid of `steps` times, or the shrinking distance of Easy Consistency Tuning (ECT)."""
    steps: int = 64
    """steps: intervals N between 0 and the largest time; those of a sampler of N steps."""
    initial_steps: int | None = None
    """steps: intervals at first, doubled at equal distances of the run until there are `steps`; None for `steps` all along."""
    grid: Literal["sigma", "time"] = "sigma"
    """steps: EDM's grid in noise level (rho = 7), or equal distances in t."""
    q: float = 2.0
    """ect: factor by which the distance shrinks in every stage."""
    k: float = 8.0
    """ect: how much larger the distance is at low noise."""
    b: float = 1.0
    """ect: how fast that is lost with the noise level."""
    stages: int = 8
    """ect: equal parts of the run; the distance is t / q^stages in the last."""
    solver: Literal["ddim", "heun"] = "ddim"
    """cd: the step along the teacher, of first order with one evaluation or of second order with two."""
    distance: Literal["auto", "tangent", "huber", "squared"] = "auto"
    """tangent: the difference in place of the continuous-time tangent, shaped and warmed up as `objective.tangent` says. huber:
    pseudo-Huber distance. squared: mean square. auto: tangent for steps, huber for ect."""
    huber: float = 0.00054
    """Constant of the pseudo-Huber distance for one element, in data of deviation 0.5."""
    weighting: Literal["gap", "snr", "learned"] = "gap"
    """huber and squared: weight 1 / (sigma_t - sigma_s) or 1 / sigma_t^2 + 1 / sd^2 in place of the learned one; or that one,
    where adaptive_weight is on. tangent: always the learned one."""

    @property
    def metric(self) -> Literal["tangent", "huber", "squared"]:
        """The distance that is meant."""
        if self.distance != "auto":
            return self.distance
        return "tangent" if self.schedule == "steps" else "huber"

    @property
    def learns_weight(self) -> bool:
        """Whether there is room for a learned weighting w(t)."""
        return self.metric == "tangent" or self.weighting == "learned"

    def intervals(self, iteration: int, iterations: int) -> int:
        """steps: the intervals at an iteration, `min(initial_steps 2^j, steps)` in part j = 0, 1, ... of the run.

        Source: Song and Dhariwal 2023, section 3.4.
        """
        if self.initial_steps is None:
            return self.steps
        doublings = math.ceil(math.log2(self.steps / self.initial_steps))
        return min(self.initial_steps << _part(iteration, iterations, doublings + 1), self.steps)

    def pairs(self, process: TrigFlow, t: Tensor, iteration: int, iterations: int) -> tuple[Tensor, Tensor]:
        """The times that are compared: `(t, s)` with `0 <= s < t`, both like the given t.

        With steps, a t of the proposal is moved up to the end of the interval it lies in, and s is that interval's lower end:
        intervals then have the probability that the proposal gives them. With ect, t stays as it is, and with sigma = sd tan(t)
        and stage a = 1, 2, ... (below). Times above `t_max`, where no sample starts, count as `t_max`. ::

            sigma_s = sigma_t max(0, 1 - n(sigma_t) / q^a),      n(sigma) = 1 + k / (1 + exp(b sigma))

        Args:
            process: relates times and noise levels.
            t: drawn from the proposal, `(b,)`.
            iteration: 0, 1, ...
            iterations: length of the run.

        Source: Song and Dhariwal 2023, section 3.5; Lu and Song 2025, appendix E.2; Geng et al. 2024, section 3.
        """
        if self.schedule == "ect":
            t = t.clamp(NEAREST, process.t_max)
            sigma = process.sigma_from_time(t)
            stage = 1 + _part(iteration, iterations, self.stages)
            share = 1 - (1 + self.k * torch.sigmoid(-self.b * sigma)) / self.q**stage
            return t, process.time_from_sigma(sigma * share.clamp_min(0))
        n = self.intervals(iteration, iterations)
        even = torch.linspace(process.t_max, 0, n + 1, dtype=torch.float64)
        times = even if self.grid == "time" else sigma_grid(process, n)
        times = times.flip(0).to(t)
        upper = torch.searchsorted(times, t.contiguous()).clamp(1, n)
        return times[upper], times[upper - 1]

    def weight(self, process: TrigFlow, t: Tensor, s: Tensor) -> Tensor | float:
        """The fixed weight of pairs, 1 for `learned`; `sigma_t - sigma_s = sd sin(t - s) / (cos t cos s)`.

        Source: Song and Dhariwal 2023, section 3.1 (gap); the public code of ECT (snr).
        """
        if self.weighting == "gap":
            length = (t - s).clamp_min(SHORTEST)
            return torch.cos(t) * torch.cos(s) / (process.sigma_data * torch.sin(length))
        if self.weighting == "snr":
            return 1 / (process.sigma_data * torch.sin(t)).square()
        return 1.0


@dataclass(frozen=True)
class Discrete(StudentObjective):
    """Discrete-time consistency: training on data (ct), or distillation (cd)."""

    kind: str = "cd"
    discrete: DiscreteConfig = field(default_factory=DiscreteConfig)
    """The steps between which the student is made consistent."""

    compiles: ClassVar[bool] = False  # the pair of times branches on the number of the iteration

    @property
    def probe(self) -> Literal["error", "tangent"] | None:
        return "tangent"

    @property
    def learns_weight(self) -> bool:
        return self.adaptive_weight and self.discrete.learns_weight

    def checks(self, process: TrigFlow) -> list[Check]:
        d = self.discrete
        return [
            *super().checks(process),
            (self.velocity != "self", "velocity", self.velocity, "data or teacher"),
            (1 <= d.steps <= 10_000, "discrete.steps", d.steps, "from 1 to 10000"),
            (d.initial_steps is None or 1 <= d.initial_steps <= d.steps,
             "discrete.initial_steps", d.initial_steps, "from 1 to objective.discrete.steps, or None"),
            (1 < d.q < math.inf, "discrete.q", d.q, "above 1"),
            (0 <= d.k < math.inf, "discrete.k", d.k, "0 or more"),
            (0 <= d.b < math.inf, "discrete.b", d.b, "0 or more"),
            (d.stages >= 1 and d.stages * math.log10(max(d.q, 1)) <= 4, "discrete.stages",
             d.stages, "at least 1, and q^stages at most 10000"),
            (0 < d.huber < math.inf, "discrete.huber", d.huber, "a positive number"),
        ]  # fmt: skip

    def loss(self, given: Given) -> Loss:
        batch = given.batch
        iteration = int(given.iteration)
        t, s = self.discrete.pairs(given.process, batch["t"], iteration, given.iterations)
        return discrete_loss(
            given.network, given.process, batch["x0"], batch["noise"], t, s,
            teacher=given.teacher if self.distills else None, conditions=given.conditions, config=self.discrete,
            tangent=self.tangent, r=float(self.tangent.warmup_factor(iteration)), weight=given.weight,
        )  # fmt: skip


def discrete_loss(
    network: Network,
    process: TrigFlow,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    s: Tensor,
    *,
    teacher: VelocityFunction | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    config: DiscreteConfig | None = None,
    tangent: TangentConfig | None = None,
    r: float = 1.0,
    weight: Weight | None = None,
) -> Loss:
    """Discrete-time consistency training (`teacher=None`) or distillation::

        L = E[ lambda(t, s) m ]   or   E[ exp(w(t)) m - w(t) ]   (for `tangent` times cos(t)^p with its `prior` p)

        tangent   m = || F - F- - g ||^2 / D,                        g = cos(t) Delta, shaped by `tangent`
        squared   m = || f(x_t, t) - f-(x_s, s) ||^2 / D
        huber     m = sqrt(|| f(x_t, t) - f-(x_s, s) ||^2 / D + c^2) - c

    with the fixed weight lambda of `DiscreteConfig.weight` or a learned one, Delta from `discrete_tangent`, and `x_s` on the
    trajectory through `x_t = cos(t) x0 + sin(t) z`: for training the same x0 and z at time s, for distillation one step of
    `config.solver` along the teacher. f- and F- are the student with gradients stopped. Per sample, c = 0.00054 is the
    published `0.00054 sqrt(D)` of a distance that is not divided by sqrt(D).

    The two evaluations of the network draw the same dropout masks, so that a difference is one of the times and points only.

    Args:
        network: the student, called as `network(x_t / sd, t, **conditions)`, twice.
        process: the TrigFlow process.
        x0: data `(b, ...)`, standard deviation sd.
        noise: `z ~ N(0, sd^2 I)`, like x0.
        t: times `(b,)` in (0, pi/2).
        s: earlier times `(b,)`, `0 <= s < t`; see `DiscreteConfig.pairs`. At s = 0 the target is x_s itself.
        teacher: velocity function of the teacher, guidance included; evaluated without gradients. None for training on data.
        conditions: what the student is told, by name.
        config: solver, distance and weighting.
        tangent: how g is shaped, for the distance `tangent`; normalized with c = 0.1 by default.
        r: tangent warmup factor in [0, 1], likewise.
        weight: `w(t)`, `(b,)` to `(b,)`; None for no learned weighting. Where the weight is fixed it comes on top.

    Returns:
        Loss with figures `t`, `loss` (mean square of what is minimized, unweighted) and `tangent_norm` (root mean square of
        `cos(t) Delta`, before shaping), each `(b,)`.

    Source: Song et al. 2023, algorithms 2 and 3; Song and Dhariwal 2023; Geng et al. 2024; for the distance `tangent` Lu and
    Song 2025, appendix E, algorithm 2.
    """
    config, told = config or DiscreteConfig(), conditions or {}
    sd, zero = process.sigma_data, torch.zeros_like(t)
    with torch.no_grad():
        x_t = process.interpolate(x0, noise, t)
        velocity = process.velocity(x0, noise, t) if teacher is None else _mean_velocity(teacher, x_t, t, s, config.solver)
        x_s = process.ddim_step(x_t, velocity, t, s)
    with replayed_draws(x_t.device, []) as draws:
        prediction = evaluate(network, x_t / sd, t, zero, told)
        draws.rewind()
        with torch.no_grad():
            # At s = 0 the output is multiplied by 0. Evaluated elsewhere, it is finite also where log(t) is an input.
            earlier = evaluate(network, x_s / sd, torch.where(s > 0, s, t), zero, told).to(x_t.dtype)
    with torch.no_grad():
        fixed = prediction.detach().to(x_t.dtype)
        cos, _ = trig(t, x_t)
        g = cos * discrete_tangent(process, x_t, velocity, fixed, earlier, t, s, r)

    if config.metric == "tangent":
        tangent = tangent or TangentConfig()
        target = prediction.detach() + shape_tangent(g, tangent)
        error = per_sample_mean_square(prediction - target)
        value = weighted_mean(error, t, weight, tangent.prior_weight(t))
    else:
        target = process.denoise(x_s, sd * earlier, s)
        error = per_sample_mean_square(process.denoise(x_t, sd * prediction.to(x_t.dtype), t) - target)
        m = torch.sqrt(error + config.huber**2) - config.huber if config.metric == "huber" else error
        value = weighted_mean(config.weight(process, t, s) * m, t, weight)
    return Loss(value, as_figures(t=t, loss=error, tangent_norm=per_sample_mean_square(g).sqrt()))


def discrete_tangent(
    process: TrigFlow, x_t: Tensor, velocity: Tensor, later: Tensor, earlier: Tensor, t: Tensor, s: Tensor, r: float = 1.0
) -> Tensor:
    """The difference that takes the place of `df/dt`, in two terms of which the second is warmed up::

        Delta = (f(x_t, t) - f(x_s, s)) / sin(t - s)
              = -cos(s) (sd F_t - u) - r sin(s) (x_t + sd (cos(t - s) F_t - F_s) / sin(t - s))     at r = 1

    where `x_s = cos(t - s) x_t - sin(t - s) u`. As s goes to t, it tends to `df/dt` along the velocity u.

    Args:
        process: gives sd.
        x_t: the later point, `(b, ...)`.
        velocity: u, like x_t.
        later: `F_t = F(x_t / sd, t)`, like x_t.
        earlier: `F_s = F(x_s / sd, s)`, like x_t.
        t, s: their times, `(b,)`.
        r: tangent warmup factor in [0, 1].

    Source: Lu and Song 2025, appendix E.1, equation 37.
    """
    sd = process.sigma_data
    cos_s, sin_s = trig(s, x_t)
    cos_h, sin_h = trig((t - s).clamp_min(SHORTEST), x_t)
    return -cos_s * (sd * later - velocity) - r * sin_s * (x_t + sd * (cos_h * later - earlier) / sin_h)


def _mean_velocity(teacher: VelocityFunction, x_t: Tensor, t: Tensor, s: Tensor, solver: str) -> Tensor:
    """The u with `x_s = cos(h) x_t - sin(h) u`, h = t - s, for one step of a solver from t to s.

    DDIM is that rotation with the teacher's velocity v, and Euler's method in noise level. Heun's method in t,
    `x_s = x_t - h (v + v') / 2` with v' at the point that Euler's method leads to, has
    `u = h / sin(h) (v + v') / 2 - tan(h / 2) x_t`; to s = 0 it is a rotation, as in `samplers.heun`.
    """
    v = teacher(x_t, t).to(x_t.dtype)
    if solver == "ddim":
        return v
    axes = (-1, *[1] * (x_t.ndim - 1))
    h = (t - s).clamp_min(SHORTEST).reshape(axes)
    end = teacher((x_t - h * v).to(x_t.dtype), torch.where(s > 0, s, t)).to(x_t.dtype)
    u = h / torch.sin(h) * (v + end) / 2 - torch.tan(h / 2) * x_t
    return torch.where(s.reshape(axes) > 0, u, v).to(x_t.dtype)


def _part(iteration: int, iterations: int, parts: int) -> int:
    """Which of `parts` equal parts of a run an iteration is in, counted from 0."""
    return min(iteration * parts // iterations, parts - 1)
