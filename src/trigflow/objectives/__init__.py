"""Objectives: pure functions of (network, process, batch, noise, time) that return a loss and figures to log."""

from trigflow.objectives.common import AdaptiveWeight, Loss, Network, VelocityFunction
from trigflow.objectives.consistency import TangentConfig, consistency_loss, consistency_tangent, shape_tangent
from trigflow.objectives.diffusion import diffusion_loss
from trigflow.objectives.discrete import DiscreteConfig, discrete_loss, discrete_tangent
from trigflow.objectives.distribution import fake_score_loss, generate, rollout, rollout_times, vsd_direction, vsd_loss
from trigflow.objectives.flow_map import FlowMapConfig, flow_map_loss
from trigflow.objectives.meanflow import MeanFlowConfig, average_velocity, meanflow_error, meanflow_loss
from trigflow.objectives.multistep import multistep_loss

__all__ = [
    "AdaptiveWeight",
    "DiscreteConfig",
    "FlowMapConfig",
    "Loss",
    "MeanFlowConfig",
    "Network",
    "TangentConfig",
    "VelocityFunction",
    "average_velocity",
    "consistency_loss",
    "consistency_tangent",
    "diffusion_loss",
    "discrete_loss",
    "discrete_tangent",
    "fake_score_loss",
    "flow_map_loss",
    "generate",
    "meanflow_error",
    "meanflow_loss",
    "multistep_loss",
    "rollout",
    "rollout_times",
    "shape_tangent",
    "vsd_direction",
    "vsd_loss",
]
