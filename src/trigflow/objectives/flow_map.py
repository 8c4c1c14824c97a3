"""Flow maps: sCT, sCD, multistep consistency, MeanFlow and any-step students are one objective with choices.

What a flow map is, and the three conditions that its tangents come from: `trigflow.objectives.tangents`.

    =======================  =========  =========  =========================  ==================================
    known as                 residual   velocity   jumps                      remarks
    =======================  =========  =========  =========================  ==================================
    sCT, sCD                 eulerian   data,      to 0                       normalized tangents
                                        teacher
    multistep sCM            eulerian   teacher    to the ends of segments
    AYF-EMD, AYF-LMD         eulerian,  teacher    any                        quality does not fall with steps
                             lagrangian
    MeanFlow                 eulerian   data,      any, anchor 0.75           weighted by the error
                                        teacher
    FACM                     eulerian   data,      to 0, anchor               clipped tangents
                                        teacher
    self-distilled           any        self       any, anchor                no teacher
    shortcut                 semigroup  self       any, anchor
    =======================  =========  =========  =========================  ==================================

Sources: Lu and Song 2025 (arXiv 2410.11081); Heek et al. 2024 (multistep, arXiv 2403.06807); Sabour et al. 2025 (AYF, arXiv
2506.14603); Geng et al. 2025 (MeanFlow, arXiv 2505.13447); Boffi et al. 2025 (self-distilled, arXiv 2505.18825); Frans et al.
2024 (shortcut, arXiv 2410.12557). A jump of MeanFlow, which lives on the straight path, is a jump of this circle:
`z_tau = x_t / m(t)` with `m = cos + sin`, `tan(t) = tau / (1 - tau)`, and its average velocity is
`u = (sin(t) - cos(t)) x_t + m(t) sd F(x_t / sd, t, s)`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trigflow.conditions import takes
from trigflow.objectives.objective import (
    Check,
    Given,
    Loss,
    StepDraws,
    StudentObjective,
    Weight,
    as_figures,
    per_sample_mean_square,
    weighted_mean,
)
from trigflow.objectives.tangents import eulerian_tangent, lagrangian_tangent, own_velocity, semigroup_tangent, shape_tangent
from trigflow.process import TrigFlow, trig
from trigflow.runtime.errors import UserError
from trigflow.samplers.guidance import Network, VelocityFunction
from trigflow.samplers.sampling import Jumps, Sampling
from trigflow.segments import segment_bounds, segment_times


@dataclass(frozen=True)
class FlowMap(StudentObjective):
    """Residual, velocity, jumps and weighting of a flow map. The defaults are those of an any-step student as published
    (AYF-EMD); the kind flow-map has others, see `trigflow.objectives.table`."""

    kind: str = "flow-map"
    residual: Literal["eulerian", "lagrangian", "semigroup"] = "eulerian"
    """Which of the three conditions is asked for."""
    jumps: Literal["segments", "any"] = "any"
    """Where jumps end: at the lower end of one of the `segments`, or anywhere below t."""
    segments: int = 1
    """Segments M of [0, pi/2], for jumps to their ends; 1 for jumps to 0. The student draws in M evaluations."""
    ends: Literal["uniform", "pair"] = "uniform"
    """jumps any: s even in [0, t], or s and t two times of the proposal in order (MeanFlow)."""
    to_zero: float = 0.0
    """jumps any: share of the jumps that end at 0. Where no end is drawn more often than others, the long jump of a single step
    is learned late."""
    anchor: float = 0.0
    """Share of samples with s = t: diffusion, on the data's velocity or the teacher's."""
    direction: Literal["velocity", "self"] = "velocity"
    """Along what dF/dt is taken: the velocity of the residual, or the network's own, which varies less than the data's."""
    semi_step: float = 0.0
    """h of the semi-continuous derivative, exact in x and a difference over h in t; 0 for one that is exact in both."""
    weighting: Literal["learned", "average", "error"] = "learned"
    """learned: shaped tangents and w(t). error: MeanFlow's, raw errors of the average velocity weighted by
    1 / (||error||^2 + c)^power. average: these errors and w(t)."""
    power: float = 1.0
    """Power p of the weighting by the error."""
    c: float = 1e-3
    """Its constant c."""

    @property
    def needs_end(self) -> bool:
        return self.jumps == "any" or self.anchor > 0

    @property
    def told(self) -> tuple[str, ...]:
        return (*super().told, *["end"] * (self.needs_end or self.segments > 1))

    @property
    def has_tangent(self) -> bool:
        return self.residual != "semigroup"

    @property
    def probe(self) -> Literal["error", "tangent"] | None:
        return "tangent" if self.jumps == "segments" and self.weighting == "learned" else None

    @property
    def learns_weight(self) -> bool:
        return self.adaptive_weight and self.weighting != "error"

    @property
    def sampling(self) -> Sampling:
        jumps: Jumps = "zero" if self.jumps == "segments" and self.segments == 1 else self.jumps
        return Sampling("flow_map", jumps, self.segments, super().sampling.guidance_max)

    def checks(self, process: TrigFlow) -> list[Check]:
        segmented = self.jumps == "segments"
        checks = [
            *super().checks(process),
            (self.segments >= 1, "segments", self.segments, "at least 1"),
            (segmented or self.segments == 1, "segments", self.segments, "1 with jumps any, which end anywhere"),
            (0 <= self.to_zero <= 1, "to_zero", self.to_zero, "a share in [0, 1]"),
            (0 <= self.anchor <= 1, "anchor", self.anchor, "a share in [0, 1]"),
            (0 <= self.semi_step < 1, "semi_step", self.semi_step, "in [0, 1)"),
            (0 < self.c < math.inf, "c", self.c, "a positive number"),
            (0 <= self.power < math.inf, "power", self.power, "0 or more"),
            (self.residual == "eulerian" or not segmented, "jumps", self.jumps,
             f"any for the {self.residual} residual, which is about the ends of jumps"),
            (self.residual != "lagrangian" or self.velocity != "data", "velocity", self.velocity,
             "teacher or self for the Lagrangian residual, which asks it where there are no data"),
            (self.residual != "semigroup" or self.anchor > 0, "anchor", self.anchor, "above 0 for the semigroup residual"),
            (self.velocity != "self" or self.anchor > 0, "anchor", self.anchor, "above 0 for velocity self"),
        ]  # fmt: skip
        if self.segments > 1 and segmented:
            segment_times(process, self.segments)
        return checks

    def draw(self, draws: StepDraws) -> dict[str, Tensor]:
        """Times `t` and, where they are not all 0, ends `end` of the jumps, `(b,)`."""
        if self.jumps == "any" and self.ends == "pair":
            process = draws.process
            deviates = torch.randn(2, draws.n, generator=draws.generator, dtype=torch.float32)
            sigma = torch.exp(self.proposal.mean + self.proposal.std * deviates)
            end, t = draws.known(process.time_from_sigma(sigma)).sort(dim=0).values
        else:
            t = draws.known(self.proposal.sample(draws.process, draws.n, draws.generator))
            end = t * draws.uniform() if self.jumps == "any" else segment_bounds(t, self.segments)[0]
        if self.jumps == "any" and self.to_zero > 0:
            end = torch.where(draws.uniform() < self.to_zero, 0.0, end)
        if self.anchor > 0:
            end = torch.where(draws.uniform() < self.anchor, t, end)
        jumps = {"t": draws.share(t)}
        return {**jumps, "end": draws.share(end)} if "end" in self.told else jumps

    def loss(self, given: Given) -> Loss:
        batch = given.batch
        return flow_map_loss(
            given.network, given.process, batch["x0"], batch["noise"], batch["t"], batch.get("end"),
            teacher=given.teacher if self.distills else None, conditions=given.conditions, config=self,
            r=self.tangent.warmup_factor(given.iteration), weight=given.weight,
        )  # fmt: skip


def flow_map_loss(
    network: Network,
    process: TrigFlow,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    end: Tensor | None = None,
    *,
    middle: Tensor | None = None,
    teacher: VelocityFunction | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    config: FlowMap | None = None,
    r: float | Tensor = 1.0,
    weight: Weight | None = None,
) -> Loss:
    """The loss of a flow map, whatever its residual::

        L = E[ cos(t - s)^p ( exp(w(t)) / D || F - sg(F) - shape(g) ||^2 - w(t) ) ]

    Samples with s = t are those of diffusion: their g is `-(sd F - v)`, of which no shape is changed, with the velocity of
    the teacher, or of the data where there is none. With the weighting by the error (MeanFlow), Eulerian errors are those of
    the average velocity in units of sd, `-m(t)^2 / m(s) df/dt / sd` with `m = cos + sin`, others are `g / sd` (and so with the
    weighting `average`, which has w(t) in place of omega)::

        L = E[ omega || error ||^2 ],    omega = 1 / sg(|| error ||^2 + c)^p

    Args:
        network: is told the end, unless every jump ends at 0 or at its segment's end.
        process: the TrigFlow process.
        x0: data `(b, ...)`, standard deviation sd.
        noise: `z ~ N(0, sd^2 I)`, like x0.
        t: times `(b,)` in (0, pi/2).
        end: s, `(b,)`, at most t; None for 0.
        middle: times `(b,)` of the semigroup residual; None for half way.
        teacher: velocity function of the teacher, guidance included; needed for velocity teacher.
        conditions: everything else that the network is told, by name.
        config: the choices.
        r: tangent warmup factor in [0, 1].
        weight: `w(t)`, `(b,)` to `(b,)`, of the learned weighting; None for none.

    Returns:
        Loss with figures `t`, `loss` and `tangent_norm` (root mean square of g before shaping), each `(b,)`.

    Raises:
        UserError: for a missing teacher, or a network that has to be told the end.

    Source: Lu and Song 2025, section 4.2, algorithm 1; see the module docstring for the rest.
    """
    config, told = config or FlowMap(), conditions or {}
    if config.velocity == "teacher" and teacher is None:
        raise UserError("objective.velocity is teacher without a teacher; expected a velocity function; pass teacher")
    if config.needs_end and "end" not in takes(network):
        raise UserError(
            "a network that is not told the end of its jumps; expected one that takes end; build it with "
            "ConditioningConfig(takes=('end',))"
        )
    end = torch.zeros_like(t) if end is None else end
    shape, own = config.tangent, own_velocity(network, process, told)
    eulerian, average = config.residual == "eulerian", config.weighting != "learned"
    anchored = (t == end).reshape(-1, *[1] * (x0.ndim - 1)) if config.anchor > 0 else None
    scale: Tensor | None = None
    factor: Tensor | float = 1.0  # of F, where average velocities are compared
    with torch.no_grad():
        x_t = process.interpolate(x0, noise, t)
        v = x_t
        if eulerian or anchored is not None:
            v = process.velocity(x0, noise, t)
            if config.velocity == "teacher" and teacher is not None:
                v = teacher(x_t, t).to(x_t.dtype)
        anchor_v = v
        if eulerian and config.velocity == "self" and anchored is not None:
            v = torch.where(anchored, v, own(x_t, t))
        if eulerian and average:
            (cos, sin), (cos_end, sin_end) = trig(t, x_t), trig(end, x_t)
            factor = cos + sin
            scale = factor**2 / (cos_end + sin_end)
    if eulerian:
        direction = own(x_t, t) if config.direction == "self" else None
        prediction, g = eulerian_tangent(
            network, process, x_t, v, t, end, told,
            direction=direction, r=r, derivative=shape.derivative, semi_step=config.semi_step, scale=scale,
        )  # fmt: skip
    elif config.residual == "lagrangian":
        asked = own if config.velocity == "self" or teacher is None else teacher
        prediction, g = lagrangian_tangent(network, process, x_t, asked, t, end, told, r=r, derivative=shape.derivative)
    else:
        middle = (t + end) / 2 if middle is None else middle
        prediction, g = semigroup_tangent(network, process, x_t, t, middle, end, told)
    with torch.no_grad():
        fixed = prediction.detach().to(x_t.dtype)
        if not eulerian and anchored is not None:
            g = torch.where(anchored, anchor_v - process.sigma_data * fixed, g)
        if average:
            shaped = g / process.sigma_data
        else:
            shaped = shape_tangent(g, shape)
            if anchored is not None:
                shaped = torch.where(anchored, g, shaped)
        target = factor * fixed + shaped
    error = per_sample_mean_square(factor * prediction - target)
    figures = as_figures(t=t, loss=error, tangent_norm=per_sample_mean_square(g).sqrt())
    if config.weighting == "error":
        square = error * x_t[0].numel()
        omega = (square.detach() + config.c) ** -config.power
        return Loss((omega * square).mean(), figures)
    prior = None if average else shape.prior_weight(t - end)
    return Loss(weighted_mean(error, t, weight, prior), figures)
