"""Networks in closed form, batches in float64, and flow maps of which most settings stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from oracles.gaussian import GaussianOracle
from trigflow.networks import MLP, ConditioningConfig, MLPConfig
from trigflow.objectives import (
    FlowMap,
    Loss,
    StepDraws,
    TangentConfig,
    VelocityFunction,
    eulerian_tangent,
    flow_map_loss,
    objective_of,
)
from trigflow.objectives.objective import Network, Weight
from trigflow.process import HALF_PI, TrigFlow
from trigflow.segments import segment_bounds

PROCESS = TrigFlow(sigma_data=0.5)
VARIANCES = torch.tensor([0.02, 0.25, 1.5], dtype=torch.float64)
GAUSSIAN = GaussianOracle(VARIANCES)

EDGES = torch.tensor(
    [1e-8, 1e-6, 1e-4, 0.01, 0.3, 0.785, 1.1, 1.5, HALF_PI - 1e-4, HALF_PI - 1e-6, HALF_PI - 1e-8], dtype=torch.float64
)
"""Times over the whole quarter circle and close to its ends."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian data, noise and times over most of the quarter circle."""
    g = generator(seed)
    x0 = GAUSSIAN.sample(n, g, dtype)
    return x0, PROCESS.sample_noise(x0, g), 0.02 + 1.53 * torch.rand(n, generator=g, dtype=dtype)


class ExactStudent(nn.Module):
    """`F` with `cos(t) x_t - sin(t) sd F(x_t / sd, t) = x_t sqrt(l / V(t))`, in operations that carry tangents."""

    def __init__(self, variances: Tensor = VARIANCES, sd: float = 0.5) -> None:
        super().__init__()
        self.variances, self.sd = variances, sd

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        var, cos, sin = self.variances, torch.cos(t)[:, None], torch.sin(t)[:, None]
        v = cos**2 * var + sin**2 * self.sd**2
        return x * sin * (cos**2 * self.sd**2 - (1 + cos**2) * var) / (v * (cos + torch.sqrt(var / v)))


def student(seed: int = 0, features: int = 3, width: int = 12, scale: float = 0.2, **settings: object) -> MLP:
    """A small MLP in float64 with every weight moved away from its start."""
    config = MLPConfig(features, width, depth=1, conditioning=ConditioningConfig(width=8, **settings))  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MLP(config).double()
        with torch.no_grad():
            for p in net.parameters():
                p += scale * torch.randn_like(p)
    return net


def draws(n: int, seed: int = 0, iteration: int = 0) -> StepDraws:
    """What is random in a step of one process, for batches as above in float32."""
    g = generator(seed)
    return StepDraws(n, PROCESS, g, iteration, lambda values: values, lambda: PROCESS.sample_noise(torch.empty(n, 3), g))


def tangent_of(
    network: Network, x: Tensor, v: Tensor, t: Tensor, end: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Tensor]:
    """F and the Eulerian tangent of jumps to the end, or to 0; settings of `eulerian_tangent` and conditions, mixed."""
    conditions = {name: settings.pop(name) for name in ("label", "guidance") if name in settings}
    return eulerian_tangent(network, PROCESS, x, v, t, torch.zeros_like(t) if end is None else end, conditions, **settings)


def consistency_loss(
    network: Network,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    segments: int = 1,
    teacher: VelocityFunction | None = None,
    tangent: TangentConfig | None = None,
    r: float = 1.0,
    weight: Weight | None = None,
    **conditions: Tensor,
) -> Loss:
    """The loss of sCT or, with a teacher, of sCD: jumps to 0, or to the ends of segments."""
    config = objective_of("sct" if teacher is None else "scd", segments=segments, tangent=tangent or TangentConfig())
    assert isinstance(config, FlowMap)
    end = None if segments == 1 else segment_bounds(t, segments)[0]
    return flow_map_loss(
        network, PROCESS, x0, noise, t, end,
        teacher=teacher, conditions=conditions, config=config, r=r, weight=weight,
    )  # fmt: skip
