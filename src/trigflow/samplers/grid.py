"""Where a solver of the probability-flow ODE puts its steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError


def sigma_grid(process: TrigFlow, steps: int, rho: float = 7.0) -> Tensor:
    """EDM's noise levels as times, then 0: `steps + 1` decreasing times from `t_max` to 0, float64, on the CPU.

    With N = steps and i = 0 ... N-1::

        sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
        t_i     = atan(sigma_i / sd),      t_N = 0

    Larger rho puts more of the steps at low noise; rho = 1 is uniform in sigma. One step is `(t_max, 0)`.

    Raises:
        UserError: if steps < 1, or rho is not finite and positive.

    Source: Karras et al. 2022 (arXiv 2206.00364), equation 5.
    """
    if steps < 1:
        raise UserError(f"a grid of {steps} steps; expected at least 1; raise steps")
    if not (math.isfinite(rho) and rho > 0):
        raise UserError(f"rho={rho} for a sigma grid; expected a finite number > 0; use 7, the value of EDM")
    high, low = process.sigma_max ** (1 / rho), process.sigma_min ** (1 / rho)
    fraction = torch.linspace(0, 1, steps, dtype=torch.float64)
    times = process.time_from_sigma((high + fraction * (low - high)) ** rho)
    return torch.cat([times, times.new_zeros(1)])
