"""Objectives: pure functions of (network, process, batch, noise, time) that return a loss and figures to log."""

from trigflow.objectives.common import AdaptiveWeight, Loss, Network, VelocityFunction
from trigflow.objectives.consistency import TangentConfig, consistency_loss, consistency_tangent, shape_tangent
from trigflow.objectives.diffusion import diffusion_loss
from trigflow.objectives.distribution import generate, vsd_direction, vsd_loss

__all__ = [
    "AdaptiveWeight",
    "Loss",
    "Network",
    "TangentConfig",
    "VelocityFunction",
    "consistency_loss",
    "consistency_tangent",
    "diffusion_loss",
    "generate",
    "shape_tangent",
    "vsd_direction",
    "vsd_loss",
]
