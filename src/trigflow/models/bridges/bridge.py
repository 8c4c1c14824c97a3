"""One bridge for each way in which a model was trained."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.conditions import OLD, check_told, in_order, null_rows
from trigflow.models.bridges.schedules import DiscreteSchedule, Schedule
from trigflow.process import TrigFlow, trig
from trigflow.runtime.errors import UserError

TINY = 1e-8
"""Divisors are kept above it: 0 and pi/2 then give finite numbers (of no use, as the formulas have none there)."""


def least_sine(sin: Tensor) -> float:
    """What a difference of data is divided by at least: closer to t = 0, where jumps end, it is mostly rounding."""
    return float(torch.finfo(sin.dtype).eps ** 0.5)


Adapter = Callable[..., Tensor]
"""How a bridge calls the model it wraps: `adapter(model, x, time, **conditions)`, noisy input `(b, ...)`, model time `(b,)` and
conditions by name, to the prediction, of the shape of x. It is handed the model, so that a copied bridge calls its own."""


def plain(model: Any, x: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
    """`model(x, time)`, and after these the conditions that it takes, label first, then guidance, then others by name."""
    return model(x, time, *(conditions[name] for name in in_order(conditions)))


@dataclass(frozen=True)
class OneHot:
    """`model(x, time, one_hot)`: labels as rows of zeros with a one, all zeros for the null label. What EDM and EDM2 take.

    Attributes:
        num_classes: classes of the model; this index is the null label.
    """

    num_classes: int

    def __call__(self, model: Any, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        if label is None:
            return model(x, time, x.new_zeros(len(x), self.num_classes))
        return model(x, time, F.one_hot(label, self.num_classes + 1)[:, : self.num_classes].to(x.dtype))


class Bridge(nn.Module, ABC):
    """A TrigFlow network around another model; `parameters()`, `train()` and `to()` are those of the model.

    Args:
        model: what is wrapped: any callable module; see `adapter`.
        process: the TrigFlow process, which gives `sd`.
        scale: the model's data are `scale` times those of the process. A model of data in [-1, 1] needs none with
            `Normalization.symmetric`; one of unit-variance data with `sd = 0.5` needs `scale = 2`.
        adapter: how the model is called; see `Adapter`.
        null: what means "none" to the model, by the name of the condition, such as `{"label": 1000}`: a number, or a tensor
            without batch axis; used where the condition is not told.
        takes: names of all conditions that the model takes; those of `null` by default.

    Shapes: X `(b, ...)`, t `(b,)`, conditions `(b, ...)`; the result like X, in float32 or higher.

    Raises:
        UserError: if the scale is not positive or the model is not a module; when called, for conditions that the model
            does not take, or misses.
    """

    def __init__(
        self,
        model: nn.Module,
        process: TrigFlow,
        *,
        scale: float = 1.0,
        adapter: Adapter = plain,
        null: Mapping[str, int | float | Tensor] | None = None,
        takes: Iterable[str] = (),
        **old: Any,
    ) -> None:
        super().__init__()
        for name in old:
            raise UserError(
                f"{name} for a bridge; expected scale, adapter, null or takes; "
                f"{'set ' + OLD[name] if name in OLD else 'leave it out'}"
            )
        if not isinstance(model, nn.Module):
            raise UserError(f"a {type(model).__name__} to bridge; expected a torch.nn.Module; wrap the function in a module")
        if not (math.isfinite(scale) and scale > 0):
            raise UserError(f"data scale {scale}; expected a positive number; use 1.0 for data as they are")
        self.model = model
        self.process = process
        self.scale = scale
        self.k = scale * process.sigma_data
        self.adapter = adapter
        self.null = {name: torch.as_tensor(row) for name, row in (null or {}).items()}
        self.takes = frozenset({*takes, *self.null})

    @property
    def sigma_range(self) -> tuple[float, float]:
        """EDM noise levels `sd tan(t)` the model was trained on, as far as its schedule says: (0, inf) for all.

        Outside, the model is told the nearest time it knows, and the result is an approximation. A sampler stays inside
        with `TrigFlow(sigma_max=min(80.0, bridge.sigma_range[1]))`.
        """
        return 0.0, math.inf

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        check_told(self, conditions)
        told = {**null_rows(self, x), **conditions}
        cos, sin = trig(t, x)

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            return self.adapter(self.model, noisy.to(x.dtype), time.reshape(-1).expand(len(x)), **told)

        return self.translate(x, cos, sin, predict)

    @abstractmethod
    def translate(self, x: Tensor, cos: Tensor, sin: Tensor, predict: Adapter) -> Tensor:
        """F from X, `cos(t)`, `sin(t)` (broadcasting over X) and the model, `predict(x', time) -> prediction`."""


class EDMBridge(Bridge):
    """The raw network of EDM or EDM2, `F_edm(c_in y, c_noise)`, `c_noise = log(sigma) / 4`.

    The network predicts `-v` on the circle of its own `sd'` (`sigma_data`). With `kappa = scale sd / sd'` and
    `r^2 = cos^2(t) + kappa^2 sin^2(t)`::

        F = (sin(t) cos(t) (kappa^2 - 1) / r^2) X - F_edm(kappa X / r, log(k tan(t)) / 4) / r

    which is `F = -F_edm(X, log(sd tan(t)) / 4)` where the two circles are the same. For a class-conditional model of NVIDIA
    use `adapter=OneHot(num_classes)`.

    Args:
        sigma_data: sd' of the model; that of the process, in its units, by default.
        shared: arguments of `Bridge`.

    Source: Karras et al. 2022, table 1; Lu and Song 2025, appendix B.
    """

    def __init__(self, model: nn.Module, process: TrigFlow, *, sigma_data: float | None = None, **shared: Any) -> None:
        super().__init__(model, process, **shared)
        if sigma_data is not None and not (math.isfinite(sigma_data) and sigma_data > 0):
            raise UserError(f"sigma_data {sigma_data} of a model; expected a positive number; leave it out for the process's")
        self.kappa = 1.0 if sigma_data is None else self.k / sigma_data

    def translate(self, x: Tensor, cos: Tensor, sin: Tensor, predict: Adapter) -> Tensor:
        c_noise = torch.log(self.k * sin.clamp_min(TINY) / cos.clamp_min(TINY)) / 4
        if self.kappa == 1:
            return -predict(x, c_noise)
        r = torch.sqrt(cos**2 + (self.kappa * sin) ** 2)
        return sin * cos * (self.kappa**2 - 1) / r**2 * x - predict(self.kappa * x / r, c_noise) / r


class DenoiserBridge(Bridge):
    """A denoiser `D(y, sigma)` of `y = x0' + sigma n`, whatever is inside: EDM's and EDM2's preconditioned networks::

        F = (cos(t) X - D(k X / cos(t), k tan(t)) / k) / sin(t)

    The division is ill-conditioned as t -> 0, where the denoiser hands back its input and F is what is left of the
    difference: an error e of D becomes e / sin(t) (in float32, up to 1e-4 at sigma = 0.002). Prefer `EDMBridge` where the
    raw network can be had; never take tangents through this one at small times in half precision.

    Source: Lu and Song 2025, appendix B.
    """

    def translate(self, x: Tensor, cos: Tensor, sin: Tensor, predict: Adapter) -> Tensor:
        cos, sin = cos.clamp_min(TINY), sin.clamp_min(least_sine(sin))
        return (cos * x - predict(self.k * x / cos, self.k * sin / cos) / self.k) / sin


class FlowBridge(Bridge):
    """Rectified flow and flow matching: `x' = (1 - s) x0' + s n`, the model predicting `u = n - x0'` (or its negative)::

        s = k sin(t) / m,    x' = k X / m,    F = ((k cos(t) - sin(t)) X + u) / m,    m = cos(t) + k sin(t)

    Nothing is divided by cos or sin: as well conditioned as the model itself at every time.

    Args:
        noise_at: time of pure noise, 1 (Stable Diffusion 3, Flux: the model is told s) or 0 (SiT, Lipman et al.: it is
            told 1 - s).
        velocity: what the model predicts: `noise - data` or `data - noise`. By default the derivative in its own time:
            the former for noise_at = 1, the latter for noise_at = 0.
        time_scale: the model is told this many times its time (1000 for models of diffusers).
        shared: arguments of `Bridge`.

    Source: Liu et al. 2023; Lipman et al. 2023; Ma et al. 2024 (SiT).
    """

    def __init__(
        self,
        model: nn.Module,
        process: TrigFlow,
        *,
        noise_at: Literal[0, 1] = 1,
        velocity: Literal["noise - data", "data - noise"] | None = None,
        time_scale: float = 1.0,
        **shared: Any,
    ) -> None:
        super().__init__(model, process, **shared)
        if noise_at not in (0, 1):
            raise UserError(f"noise at time {noise_at}; expected 0 or 1; say at which end of time the model sees noise")
        if velocity not in (None, "noise - data", "data - noise"):
            raise UserError(
                f"velocity '{velocity}'; expected 'noise - data' or 'data - noise'; leave it out for the model's derivative"
            )
        self.noise_at = noise_at
        self.time_scale = time_scale
        self.sign = 1.0 if (velocity or ("noise - data" if noise_at else "data - noise")) == "noise - data" else -1.0

    def translate(self, x: Tensor, cos: Tensor, sin: Tensor, predict: Adapter) -> Tensor:
        m = cos + self.k * sin
        time = (self.k * sin if self.noise_at else cos) / m  # s, or 1 - s
        u = self.sign * predict(self.k * x / m, self.time_scale * time)
        return ((self.k * cos - sin) * x + u) / m


Predicts = Literal["epsilon", "v", "x0"]


class VPBridge(Bridge):
    """Variance-preserving diffusion (DDPM, DiT, Stable Diffusion 1 and 2): `x' = a x0' + b n`, `a^2 + b^2 = 1`::

        a = cos(t) / r,    b = k sin(t) / r,    x' = k X / r,    r^2 = cos^2(t) + k^2 sin^2(t)

        epsilon    F = (eps - sin(t) X) / cos(t)
        v          F = (sin(t) cos(t) (k^2 - 1) / r^2) X + v / r,      v = a n - b x0'
        x0         F = (cos(t) X - x0' / k) / sin(t)

    The first is ill-conditioned as t -> pi/2 (errors grow by 1 / cos(t), 160 at sigma = 80), the last as t -> 0, whatever
    the implementation: such a model says little about its other half there.

    Args:
        schedule: from the angle `atan2(b, a)` to the time the model is told: a `Schedule`, or `alphas_cumprod` of the
            training steps, `(n,)`, which are then interpolated.
        predicts: epsilon, v, or x0 (diffusers' prediction types epsilon, v_prediction, sample).
        shared: arguments of `Bridge`.

    Source: Ho et al. 2020; Salimans and Ho 2022 (v).
    """

    def __init__(
        self, model: nn.Module, process: TrigFlow, schedule: Schedule | Tensor, *, predicts: Predicts = "epsilon", **shared: Any
    ) -> None:
        super().__init__(model, process, **shared)
        if predicts not in get_args(Predicts):
            known = ", ".join(get_args(Predicts))
            raise UserError(f"a model that predicts '{predicts}'; expected one of {known}; correct predicts")
        self.schedule: Schedule = DiscreteSchedule(schedule) if isinstance(schedule, Tensor) else schedule
        self.predicts = predicts

    @property
    def sigma_range(self) -> tuple[float, float]:
        low, high = self.schedule.angle_range
        return math.tan(low) / self.scale, math.tan(high) / self.scale

    def translate(self, x: Tensor, cos: Tensor, sin: Tensor, predict: Adapter) -> Tensor:
        r = torch.sqrt(cos**2 + (self.k * sin) ** 2)
        time = self.schedule(torch.atan2(self.k * sin, cos).reshape(-1))
        prediction = predict(self.k * x / r, time)
        if self.predicts == "epsilon":
            return (prediction - sin * x) / cos.clamp_min(TINY)
        if self.predicts == "x0":
            return (cos * x - prediction / self.k) / sin.clamp_min(least_sine(sin))
        return sin * cos * (self.k**2 - 1) / r**2 * x + prediction / r
