"""From a place on the quarter circle to the time a variance-preserving model was trained with.

The place is the angle `theta` in [0, pi/2] with `a = cos(theta)`, `b = sin(theta)`, so `tan(theta)` is the noise level. A
schedule is a function from angles `(b,)` to model times `(b,)`, held at its ends outside of `angle_range`.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trigflow.process import HALF_PI
from trigflow.runtime.errors import UserError


class Schedule(Protocol):
    """`schedule(theta) -> model time`, and the angles it was trained on."""

    @property
    def angle_range(self) -> tuple[float, float]: ...

    def __call__(self, angle: Tensor) -> Tensor: ...


class DiscreteSchedule:
    """Training steps 0 ... n - 1 (DDPM), with the time linear in the angle between neighbours: exact at every step.

    Args:
        alphas_cumprod: `a^2` of each step, falling, `(n,)`, as in `scheduler.alphas_cumprod` of diffusers. A last step of
            zero (no signal at all) is fine.
        times: what the model is told at each step, `(n,)`; the number of the step by default.

    Raises:
        UserError: if there are fewer than two steps, the values do not fall or leave [0, 1], or times do not match.
    """

    def __init__(self, alphas_cumprod: Tensor, times: Tensor | None = None) -> None:
        squares = torch.as_tensor(alphas_cumprod).detach().double().cpu()
        fine = squares.ndim == 1 and len(squares) > 1 and bool(((squares >= 0) & (squares <= 1)).all())
        if not fine or not bool((squares.diff() < 0).all()):
            raise UserError(
                f"alphas_cumprod of shape {tuple(squares.shape)} that are no schedule; expected two or more falling numbers "
                "in [0, 1]; pass scheduler.alphas_cumprod"
            )
        self.angles = torch.atan2((1 - squares).sqrt(), squares.sqrt())
        self.times = torch.arange(len(squares)).double() if times is None else torch.as_tensor(times).double().cpu()
        if self.times.shape != self.angles.shape:
            raise UserError(
                f"{self.times.numel()} times for {len(squares)} steps; expected one for each; leave times out for 0, 1, ..."
            )

    @property
    def angle_range(self) -> tuple[float, float]:
        return float(self.angles[0]), float(self.angles[-1])

    def __call__(self, angle: Tensor) -> Tensor:
        angles, times = self.angles.to(angle), self.times.to(angle)
        above = torch.searchsorted(angles, angle.detach()).clamp(1, len(angles) - 1)
        low, high = angles[above - 1], angles[above]
        part = ((angle - low) / (high - low)).clamp(0, 1)
        return times[above - 1] + part * (times[above] - times[above - 1])


@dataclass(frozen=True)
class LinearSchedule:
    """The continuous VP process of score SDEs: `log a(s) = -(beta_max - beta_min) s^2 / 4 - beta_min s / 2`, s in [0, 1].

    Attributes:
        beta_min: noise rate at s = 0.
        beta_max: noise rate at s = 1.
        time_scale: the model is told `time_scale * s` (999 for the models of Song et al.).

    Source: Song et al. 2021, appendix C.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    time_scale: float = 1.0

    @property
    def angle_range(self) -> tuple[float, float]:
        return 0.0, math.acos(math.exp(-(self.beta_max + self.beta_min) / 4))

    def __call__(self, angle: Tensor) -> Tensor:
        rise, half = self.beta_max - self.beta_min, self.beta_min / 2
        decay = torch.log1p(torch.tan(angle).square()) / 2  # -log a, accurate at both ends
        s = 2 * decay / (half + torch.sqrt(half**2 + rise * decay))
        return self.time_scale * s.clamp(0, 1)


@dataclass(frozen=True)
class CosineSchedule:
    """`a = cos(pi s / 2)`, `b = sin(pi s / 2)`: the time is the angle itself, `s = 2 theta / pi` in [0, 1].

    Attributes:
        time_scale: the model is told `time_scale * s`.

    Source: Salimans and Ho 2022, section 3. (The offset cosine of Nichol and Dhariwal is a `DiscreteSchedule`.)
    """

    time_scale: float = 1.0

    @property
    def angle_range(self) -> tuple[float, float]:
        return 0.0, HALF_PI

    def __call__(self, angle: Tensor) -> Tensor:
        return self.time_scale * angle / HALF_PI
