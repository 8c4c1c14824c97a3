"""The TrigFlow diffusion process: no networks, only trigonometry.

Data `x0` with per-element standard deviation `sd` (sigma_data) and noise `z ~ N(0, sd^2 I)` meet on a quarter circle::

    x_t = cos(t) x0 + sin(t) z,      t in [0, pi/2]
    v   = cos(t) z  - sin(t) x0      (its derivative in t)

A network `F(x_t / sd, t)` of unit-variance input and output predicts `sd F -> v`. Everything else is a rotation by `t`.

Source: Lu and Song, ICLR 2025 (arXiv 2410.11081), section 3 and appendix B.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from trigflow.runtime.errors import UserError
from trigflow.runtime.values import check_types

Prediction = Literal["F", "velocity", "x0", "noise", "score"]

HALF_PI = math.pi / 2


def trig(t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
    """`(cos t, sin t)`, shaped to broadcast over `like`.

    Computed in float32 or higher whatever the dtype of `like`, because half precision loses `cos(t)` near pi/2.

    Args:
        t: time in [0, pi/2], a scalar or of shape `(b,)`.
        like: tensor of shape `(b, ...)` that the result will multiply.
    """
    precision = torch.promote_types(like.dtype, torch.float32)
    if isinstance(t, int | float):  # the functions of a number are exact, and need no copy to the device
        return tuple(torch.full((), f(t), dtype=precision, device=like.device) for f in (math.cos, math.sin))  # type: ignore[return-value]
    t = t.to(like.device, torch.promote_types(t.dtype, precision))
    if t.ndim == 1:
        if like.ndim == 0 or t.shape[0] not in (1, like.shape[0]):
            raise UserError(
                f"times of shape {tuple(t.shape)} do not match a batch of shape {tuple(like.shape)}; "
                "expected one time or one per sample; pass t of shape (b,)"
            )
        t = t.reshape(-1, *[1] * (like.ndim - 1))
    elif t.ndim != 0:
        raise UserError(f"times of shape {tuple(t.shape)}; expected a scalar or shape (b,); flatten t to one axis")
    return torch.cos(t), torch.sin(t)


@dataclass(frozen=True)
class TrigFlow:
    """The process and every conversion that belongs to it.

    Attributes:
        sigma_data: `sd`, standard deviation of one data element; 0.5 in every preset of the paper.
        sigma_min: lowest EDM noise level on a sampling grid (samplers then step to 0).
        sigma_max: EDM noise level where sampling starts, `t_max = atan(sigma_max / sd)`.

    Raises:
        UserError: if the levels are not finite and positive, or `sigma_min >= sigma_max`.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        check_types(self)
        values = (self.sigma_data, self.sigma_min, self.sigma_max)
        if not all(math.isfinite(v) and v > 0 for v in values) or self.sigma_min >= self.sigma_max:
            raise UserError(
                f"noise levels sigma_data={self.sigma_data}, sigma_min={self.sigma_min}, sigma_max={self.sigma_max}; "
                "expected finite positive numbers with sigma_min < sigma_max; correct the process settings"
            )

    # Time and noise level ------------------------------------------------------------------------------------------

    @property
    def t_max(self) -> float:
        """`atan(sigma_max / sd)`, just under pi/2: where sampling starts."""
        return math.atan(self.sigma_max / self.sigma_data)

    def sigma_from_time(self, t: Tensor) -> Tensor:
        """EDM noise level `sigma = sd tan(t)`, for t in [0, pi/2); at pi/2 it is infinite and floating point is of no use."""
        return self.sigma_data * torch.tan(t)

    def time_from_sigma(self, sigma: Tensor) -> Tensor:
        """`t = atan(sigma / sd)`, in [0, pi/2)."""
        return torch.atan(sigma / self.sigma_data)

    def log_snr(self, t: Tensor) -> Tensor:
        """`lambda = log(alpha / sigma) = -log tan(t)`, the clock of DPM-Solver (noise in units of sd); t in (0, pi/2)."""
        return -torch.log(torch.tan(t))

    # Building the process ------------------------------------------------------------------------------------------

    def sample_noise(self, x0: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`z ~ N(0, sd^2 I)` with the shape, dtype and device of `x0`; drawn on the generator's device."""
        device = generator.device if generator is not None else x0.device
        z = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=device)
        return self.sigma_data * z.to(x0.device)

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """`x_t = cos(t) x0 + sin(t) z`."""
        c, s = trig(t, x0)
        return c * x0 + s * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """Conditional velocity `v = cos(t) z - sin(t) x0`, the target of the diffusion loss."""
        c, s = trig(t, x0)
        return c * noise - s * x0

    # Moving along it -----------------------------------------------------------------------------------------------

    def denoise(self, x_t: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
        """`x0_hat = cos(t) x_t - sin(t) v`.

        With `v = sd F(x_t / sd, t)` of a diffusion network this is the denoiser; of a consistency network it is the
        consistency function `f(x_t, t)`, for which `f(x, 0) = x` whatever F is.
        """
        c, s = trig(t, x_t)
        return c * x_t - s * velocity

    def predict_noise(self, x_t: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
        """`z_hat = sin(t) x_t + cos(t) v`."""
        c, s = trig(t, x_t)
        return s * x_t + c * velocity

    def ddim_step(self, x_t: Tensor, velocity: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        """`x_s = cos(t - s) x_t - sin(t - s) v`, exact when the predicted x0 and noise do not change on the way."""
        return self.denoise(x_t, velocity, t - s)

    # Conversions ---------------------------------------------------------------------------------------------------

    def convert(self, value: Tensor, x_t: Tensor, t: Tensor | float, source: Prediction, target: Prediction) -> Tensor:
        """One prediction at `(x_t, t)` expressed as another.

        All of them are the same knowledge. With the velocity `v` in the middle::

            F      v = sd F
            x0     v = (cos(t) x_t - x0) / sin(t)              x0    = cos(t) x_t - sin(t) v
            noise  v = (z - sin(t) x_t) / cos(t)               z     = sin(t) x_t + cos(t) v
            score  z = -sin(t) sd^2 score                      score = -z / (sin(t) sd^2)

        Args:
            value: the prediction, of the shape of `x_t`.
            x_t: noisy sample, `(b, ...)`.
            t: time, scalar or `(b,)`. From x0, and to the score, needs t > 0; from noise or score needs t < pi/2.
            source: what `value` is.
            target: what to return.

        Raises:
            UserError: for an unknown kind of prediction.
        """
        for kind in (source, target):
            if kind not in get_args(Prediction):
                known = ", ".join(get_args(Prediction))
                raise UserError(f"unknown prediction '{kind}'; expected one of {known}; correct source or target")
        if source == target:
            return value
        c, s = trig(t, x_t)
        sd = self.sigma_data
        if source == "x0":
            v = (c * x_t - value) / s
        elif source == "noise":
            v = (value - s * x_t) / c
        elif source == "score":
            v = (-s * sd**2 * value - s * x_t) / c
        else:
            v = sd * value if source == "F" else value
        if target == "x0":
            return c * x_t - s * v
        if target == "noise":
            return s * x_t + c * v
        if target == "score":
            return -(s * x_t + c * v) / (s * sd**2)
        return v / sd if target == "F" else v


@dataclass(frozen=True)
class Proposal:
    """Distribution of training times: `tau ~ N(mean, std^2)`, `t = atan(exp(tau) / sd)`.

    `exp(tau)` is the EDM noise level, so `mean` and `std` are the P_mean and P_std of EDM and of the paper
    (CIFAR-10: -1.0, 1.4; ImageNet 512 teacher: -0.4, 1.0).

    Raises:
        UserError: if mean or std is no finite number, or std not positive.
    """

    mean: float = -1.0
    std: float = 1.4

    def __post_init__(self) -> None:
        check_types(self)
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise UserError(
                f"proposal mean={self.mean}, std={self.std}; expected finite numbers with std > 0; correct the proposal"
            )

    def sample(self, process: TrigFlow, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` times in (0, pi/2), float32, shape `(n,)`, on the generator's device."""
        device = generator.device if generator is not None else None
        tau = self.mean + self.std * torch.randn(n, generator=generator, device=device, dtype=torch.float32)
        return process.time_from_sigma(torch.exp(tau))
