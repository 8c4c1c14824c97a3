"""Where samplers put their steps: the grid of a solver of the probability-flow ODE, and the times of few-step sampling."""

import math

import torch
from torch import Tensor

from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.runtime.values import number, whole


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
    whole(steps=steps)
    number(rho=rho)
    if steps < 1:
        raise UserError(f"a grid of {steps} steps; expected at least 1; raise steps")
    if not (math.isfinite(rho) and rho > 0):
        raise UserError(f"rho={rho} for a sigma grid; expected a finite number > 0; use 7, the value of EDM")
    high, low = process.sigma_max ** (1 / rho), process.sigma_min ** (1 / rho)
    fraction = torch.linspace(0, 1, steps, dtype=torch.float64)
    times = process.time_from_sigma((high + fraction * (low - high)) ** rho)
    return torch.cat([times, times.new_zeros(1)])


def _check_steps(steps: int) -> None:
    whole(steps=steps)
    if steps < 1:
        raise UserError(f"{steps} sampling steps; expected at least 1; raise steps")


def consistency_times(process: TrigFlow, steps: int, t_mid: float = 1.1) -> tuple[float, ...]:
    """Default times for `steps` evaluations: `t_max`, then `t_mid` down towards 0 in equal distances.

    ::

        1 step    (t_max,)
        2 steps   (t_max, t_mid)                    t_mid = 1.1 in the paper
        n steps   (t_max, t_mid, t_mid (n-2)/(n-1), ..., t_mid / (n-1))

    From three steps on this is a starting point, not an optimum; `search_times` finds better ones for a given model.

    Raises:
        UserError: if steps < 1, or t_mid is not in (0, t_max) when it is used.

    Source: Lu and Song 2025 (two steps).
    """
    _check_steps(steps)
    number(t_mid=t_mid)
    if steps > 1 and not 0 < t_mid < process.t_max:
        raise UserError(f"t_mid={t_mid}; expected a time in (0, t_max={process.t_max:.4f}); use 1.1, the value of the paper")
    return (process.t_max, *(t_mid * (steps - k) / (steps - 1) for k in range(1, steps)))


def meanflow_times(process: TrigFlow, steps: int) -> tuple[float, ...]:
    """Default times for `steps` evaluations: even in the time `tau = sin t / (cos t + sin t)` of the straight path.

    `tau = 1, (n-1)/n, ..., 1/n` as `t = atan(tau / (1 - tau))`, where the first, pi/2, is `t_max` instead::

        1 step    (t_max,)
        2 steps   (t_max, pi/4)

    Raises:
        UserError: if steps < 1.
    """
    _check_steps(steps)
    return (process.t_max, *(math.atan2(steps - k, k) for k in range(1, steps)))
