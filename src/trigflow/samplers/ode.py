"""Solvers of the probability-flow ODE `dx/dt = v(x, t)`, from noise at `times[0]` to data at `times[-1]`.

Each one is a function of (velocity, x, times). In TrigFlow all solvers are linear in x and v with coefficients that are
sines and cosines of the times; these are computed as Python floats, so the state (float32 or higher) sees no rounding of t.

The number of evaluations (NFE) is given for N steps of which the last goes to t = 0, as on `sigma_grid`. There a solver of
second order takes one first-order step, a rotation, because the slope at t = 0 would cost an evaluation and add nothing:
the denoiser at the last positive time is already the answer. On a grid that ends above 0 that step is of second order too.

Common arguments:
    velocity: `velocity(x_t, t) -> v`, x_t `(b, ...)`, t `(b,)`; t has the dtype of the state.
    x: the state at `times[0]`, `(b, ...)`; noise of `TrigFlow.sample_noise` when `times[0]` is `t_max`.
    times: N + 1 decreasing times in [0, pi/2], a tensor or a sequence of numbers.
    callback: called after every step as `callback(i, t, x)`, i = 0 ... N-1, with the new time and the new state.
    progress: draw a progress bar on stderr.

All return the state at `times[-1]`, and raise UserError for times that are too few, out of order or out of range.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from trigflow.process import HALF_PI
from trigflow.runtime.errors import UserError
from trigflow.runtime.values import row
from trigflow.samplers.guidance import VelocityFunction

Times = Tensor | Sequence[float]
Callback = Callable[[int, float, Tensor], None]


class Solver(Protocol):
    """The signature that all solvers share; see the head of this module."""

    def __call__(
        self, velocity: VelocityFunction, x: Tensor, times: Times, *, callback: Callback | None = None, progress: bool = False
    ) -> Tensor: ...


def _solver(step: Callable[[VelocityFunction, Tensor, float, float, list[Any]], Tensor]) -> Solver:
    """The solver that goes from time to time by `step(velocity, x_t, t, s, before) -> x_s`.

    `before` is an empty list at the start, in which a step can leave something for the next one.
    """

    @torch.no_grad()
    def solver(
        velocity: VelocityFunction, x: Tensor, times: Times, *, callback: Callback | None = None, progress: bool = False
    ) -> Tensor:
        x, grid = _start(x, times)
        before: list[Any] = []
        steps = tqdm(pairwise(grid), total=len(grid) - 1, disable=not progress, desc="sampling", leave=False)
        for i, (t, s) in enumerate(steps):
            x = step(velocity, x, t, s, before)
            if callback is not None:
                callback(i, s, x)
        return x

    solver.__name__, solver.__qualname__, solver.__doc__ = step.__name__, step.__qualname__, step.__doc__
    return solver


@_solver
def ddim(velocity: VelocityFunction, x: Tensor, t: float, s: float, before: list[Any]) -> Tensor:
    """First order: rotate, `x_s = cos(t - s) x_t - sin(t - s) v(x_t, t)`. NFE = N.

    Euler's method along the circle instead of along its tangent (they agree to first order): exact whenever the predicted
    data and noise do not change during the step. It is DPM-Solver of first order, and on the segment ends of a multistep
    consistency model it is that model's sampler.

    Source: Song et al. 2021 (arXiv 2010.02502); Lu and Song 2025, section 3.
    """
    return _rotate(x, _velocity(velocity, x, t), t, s)


@_solver
def heun(velocity: VelocityFunction, x: Tensor, t: float, s: float, before: list[Any]) -> Tensor:
    """Second order, Heun's method in t. NFE = 2N - 1: 18 steps cost 35, 32 steps cost 63.

    ::

        x'  = x_t + (s - t) v(x_t, t)
        x_s = x_t + (s - t) (v(x_t, t) + v(x', s)) / 2,      and a rotation when s = 0

    Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 1, with TrigFlow's t in place of sigma.
    """
    v = _velocity(velocity, x, t)
    if s == 0:
        return _rotate(x, v, t, s)
    return x + (s - t) / 2 * (v + _velocity(velocity, x + (s - t) * v, s))


@_solver
def dpm_solver_2s(velocity: VelocityFunction, x: Tensor, t: float, s: float, before: list[Any]) -> Tensor:
    """Second order, single step: DPM-Solver-2S in data prediction, written for TrigFlow. NFE = 2N - 1.

    With `D(x, t) = cos(t) x - sin(t) v` and the clock `lambda = -log tan(t)`, the midpoint m of a step in lambda has
    `tan^2(m) = tan(t) tan(s)`::

        x_m = (sin(m) x_t + sin(t - m) D(x_t, t)) / sin(t)
        x_s = (sin(s) x_t + sin(t - s) D(x_m, m)) / sin(t),      and D(x_t, t) when s = 0

    These are `sigma_s/sigma_t x - alpha_s (e^-h - 1) D` of the paper with alpha = cos t, sigma = sin t, h the step in lambda.

    Source: Lu et al. 2022 (DPM-Solver++, arXiv 2211.01095), algorithm 1 with r = 1/2.
    """
    d = _denoise(x, _velocity(velocity, x, t), t)
    if s > 0:
        m = math.atan(math.sqrt(math.tan(t) * math.tan(s)))
        x_m = _toward(x, d, t, m)
        d = _denoise(x_m, _velocity(velocity, x_m, m), m)
    return _toward(x, d, t, s)


@_solver
def dpm_solver_pp_2m(velocity: VelocityFunction, x: Tensor, t: float, s: float, before: list[Any]) -> Tensor:
    """Second order, multistep: DPM-Solver++(2M) written for TrigFlow. NFE = N, one evaluation per step.

    The previous step's denoised `D'` takes the place of a second evaluation. With h and h' the lengths of this step and
    the previous one in `lambda = -log tan(t)`::

        x_s = (sin(s) x_t + sin(t - s) (D + h/(2h') (D - D'))) / sin(t)

    The first step, and the one to s = 0 where h is infinite, are of first order.

    Source: Lu et al. 2022 (DPM-Solver++, arXiv 2211.01095), algorithm 2.
    """
    d = extrapolated = _denoise(x, _velocity(velocity, x, t), t)
    if s > 0:
        h = math.log(math.tan(t) / math.tan(s))
        if before:
            d_before, h_before = before
            extrapolated = d + h / (2 * h_before) * (d - d_before)
        before[:] = d, h
    return _toward(x, extrapolated, t, s)


SOLVERS: dict[str, Solver] = {"ddim": ddim, "heun": heun, "dpm2s": dpm_solver_2s, "dpm++2m": dpm_solver_pp_2m}
"""Solvers by name."""

_EVALUATIONS_PER_STEP = {"ddim": 1, "heun": 2, "dpm2s": 2, "dpm++2m": 1}


def get_solver(name: str) -> Solver:
    """The solver of that name.

    Raises:
        UserError: for an unknown name; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in SOLVERS:
        raise UserError(f"unknown solver '{name}'; expected one of {', '.join(SOLVERS)}; correct the name")
    return SOLVERS[name]


def nfe(solver: str, steps: int) -> int:
    """Evaluations of the velocity for `steps` steps, the last one to t = 0: N, or 2N - 1 with two evaluations per step.

    Guidance doubles the work of each evaluation, unless the scale is an input of the network.

    Raises:
        UserError: for an unknown solver or steps < 1.
    """
    get_solver(solver)
    if steps < 1:
        raise UserError(f"{steps} steps of {solver}; expected at least 1; raise steps")
    return steps if _EVALUATIONS_PER_STEP[solver] == 1 else 2 * steps - 1


def steps_for_nfe(solver: str, evaluations: int) -> int:
    """The largest number of steps that costs at most `evaluations`; the inverse of `nfe`.

    Raises:
        UserError: for an unknown solver or evaluations < 1.
    """
    get_solver(solver)
    if evaluations < 1:
        raise UserError(f"{evaluations} evaluations of {solver}; expected at least 1; raise the budget")
    return evaluations if _EVALUATIONS_PER_STEP[solver] == 1 else (evaluations + 1) // 2


def _start(x: Tensor, times: Times) -> tuple[Tensor, list[float]]:
    """The state in float32 or higher, and the checked times as Python floats."""
    grid = [float(t) for t in row("times", times.tolist() if isinstance(times, Tensor) else times)]
    in_range = all(0 <= t <= HALF_PI + 1e-6 for t in grid)  # float32 rounds pi/2 up
    if len(grid) < 2 or not in_range or not all(s < t for t, s in pairwise(grid)):
        shown = ", ".join(f"{t:.4g}" for t in grid[:8]) + (", ..." if len(grid) > 8 else "")
        raise UserError(f"times ({shown}); expected two or more decreasing times in [0, pi/2]; use sigma_grid")
    return x.to(torch.promote_types(x.dtype, torch.float32)), [min(t, HALF_PI) for t in grid]


def _velocity(velocity: VelocityFunction, x: Tensor, t: float) -> Tensor:
    """`velocity(x, t)` with the same t for every sample, in the dtype of the state."""
    return velocity(x, torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device)).to(x.dtype)


def _rotate(x: Tensor, v: Tensor, t: float, s: float) -> Tensor:
    """`cos(t - s) x - sin(t - s) v`."""
    return math.cos(t - s) * x - math.sin(t - s) * v


def _denoise(x: Tensor, v: Tensor, t: float) -> Tensor:
    """`D = cos(t) x - sin(t) v`."""
    return math.cos(t) * x - math.sin(t) * v


def _toward(x: Tensor, d: Tensor, t: float, s: float) -> Tensor:
    """The point at time s on the circle through `(x, t)` whose data is d: `(sin(s) x + sin(t - s) d) / sin(t)`."""
    return math.sin(s) / math.sin(t) * x + math.sin(t - s) / math.sin(t) * d
