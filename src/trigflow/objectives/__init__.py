"""Objectives: what a network is trained for, one class a file, and their losses as functions.

A loss is a function of (network, process, batch, noise, time) that returns a number to differentiate and figures to log.
"""

from trigflow.objectives.diffusion import Diffusion, diffusion_loss
from trigflow.objectives.discrete import Discrete, DiscreteConfig, discrete_loss, discrete_tangent
from trigflow.objectives.distribution import Distribution, fake_score_loss, rollout, rollout_times, vsd_direction, vsd_loss
from trigflow.objectives.flow_map import FlowMap, flow_map_loss
from trigflow.objectives.objective import (
    AdaptiveWeight,
    Given,
    Loss,
    Objective,
    StepDraws,
    StudentObjective,
    TangentConfig,
    evaluate,
)
from trigflow.objectives.table import OBJECTIVES, as_kind, known, objective_of, register
from trigflow.objectives.tangents import eulerian_tangent, lagrangian_tangent, semigroup_tangent, shape_tangent
from trigflow.runtime.errors import renamed
from trigflow.samplers.guidance import Network, VelocityFunction

RENAMED = {
    "MeanFlowConfig": "FlowMap, as objective_of('meanflow', ...)",
    "consistency_loss": "flow_map_loss(..., config=objective_of('sct' or 'scd', ...))",
    "consistency_tangent": "eulerian_tangent(network, process, x_t, dxdt, t, end, conditions)",
    "generate": "rollout(network, process, z, (process.t_max,))",
    "meanflow_loss": "flow_map_loss(..., config=objective_of('meanflow', ...))",
    "multistep_loss": "flow_map_loss(..., end, config=objective_of('scd', segments=...))",
}
"""Old names, and how they are spelled now."""


__getattr__ = renamed(__name__, RENAMED)


__all__ = [
    "OBJECTIVES",
    "AdaptiveWeight",
    "Diffusion",
    "Discrete",
    "DiscreteConfig",
    "Distribution",
    "FlowMap",
    "Given",
    "Loss",
    "Network",
    "Objective",
    "StepDraws",
    "StudentObjective",
    "TangentConfig",
    "VelocityFunction",
    "as_kind",
    "diffusion_loss",
    "discrete_loss",
    "discrete_tangent",
    "eulerian_tangent",
    "evaluate",
    "fake_score_loss",
    "flow_map_loss",
    "known",
    "lagrangian_tangent",
    "objective_of",
    "register",
    "rollout",
    "rollout_times",
    "semigroup_tangent",
    "shape_tangent",
    "vsd_direction",
    "vsd_loss",
]
