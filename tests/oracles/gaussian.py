"""Independent Gaussian coordinates: velocity, score and consistency function in closed form.

For `x0_i ~ N(0, l_i)` and `z ~ N(0, sd^2 I)`, `x_t` has variance `V(t) = cos^2(t) l + sin^2(t) sd^2`, and::

    E[x0 | x_t] = cos(t) l x_t / V          E[z | x_t] = sin(t) sd^2 x_t / V
    v           = cos(t) E[z] - sin(t) E[x0] = x_t sin(t) cos(t) (sd^2 - l) / V = x_t V'(t) / (2 V)
    f(x_t, t)   = x_t sqrt(l / V)           (solves dx/dt = v from x_t at t to time 0)

Everything follows the dtype of x, float64 included, and broadcasts t of shape `()` or `(b,)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class OracleNetwork(nn.Module):
    """A function `F(x_t / sd, t, label)` with the signature and attributes of a network, without parameters.

    Args:
        function: called with label None where there is none.
        null_label: of a network that takes a label; None for one without.
    """

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor | None], Tensor], null_label: int | None = None) -> None:
        super().__init__()
        self.function = function
        self.takes = frozenset({"label"} if null_label is not None else ())
        self.null = {} if null_label is None else {"label": torch.tensor(null_label)}

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        assert conditions.keys() <= self.takes, conditions.keys()
        return self.function(x, t, conditions.get("label"))


class GaussianOracle:
    """Data `N(0, diag(variances))` of shape `(d,)`, or of any shape `variances` broadcasts to.

    Args:
        variances: l, positive, `(d,)` or the shape of one sample.
        sd: sigma_data of the process.
    """

    def __init__(self, variances: Tensor, sd: float = 0.5) -> None:
        self.variances = variances
        self.sd = sd

    def variance(self, x: Tensor, t: Tensor | float) -> Tensor:
        """`V(t)`, broadcasting over x."""
        c, s = cos_sin(t, x)
        return c**2 * self._l(x) + s**2 * self.sd**2

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Exact PF-ODE velocity `x sin(t) cos(t) (sd^2 - l) / V`."""
        c, s = cos_sin(t, x)
        return x * s * c * (self.sd**2 - self._l(x)) / self.variance(x, t)

    def denoise(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Posterior mean `E[x0 | x_t] = cos(t) l x / V`."""
        c, _ = cos_sin(t, x)
        return c * self._l(x) * x / self.variance(x, t)

    def score(self, x: Tensor, t: Tensor | float) -> Tensor:
        """`grad log p_t(x) = -x / V`."""
        return -x / self.variance(x, t)

    def consistency(self, x: Tensor, t: Tensor | float) -> Tensor:
        """`f(x, t) = x sqrt(l / V)`."""
        return x * torch.sqrt(self._l(x) / self.variance(x, t))

    def F_velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The diffusion network: `v / sd` for `x = x_t / sd`."""
        return self.velocity(self.sd * x, t) / self.sd

    def F_consistency(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The network F, of `x = x_t / sd`, with `cos(t) x_t - sin(t) sd F = f(x_t, t)`.

        `F = x (cos(t) - sqrt(l/V)) / sin(t)`, multiplied out so that nothing is divided by sin(t)::

            F = x sin(t) (cos^2(t) sd^2 - (1 + cos^2(t)) l) / (V (cos(t) + sqrt(l / V)))
        """
        c, s = cos_sin(t, x)
        var, v = self._l(x), self.variance(x, t)
        return x * s * (c**2 * self.sd**2 - (1 + c**2) * var) / (v * (c + torch.sqrt(var / v)))

    def teacher(self) -> OracleNetwork:
        """The exact diffusion network as a module."""
        return OracleNetwork(lambda x, t, label: self.F_velocity(x, t))

    def student(self) -> OracleNetwork:
        """The exact consistency network as a module."""
        return OracleNetwork(lambda x, t, label: self.F_consistency(x, t))

    def sample(self, n: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """`n` data points, `(n, *variances.shape)`."""
        z = torch.randn(n, *self.variances.shape, generator=generator, dtype=dtype)
        return z * self.variances.to(dtype).sqrt()

    def _l(self, x: Tensor) -> Tensor:
        return self.variances.to(dtype=x.dtype, device=x.device)


def cos_sin(t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
    """`(cos t, sin t)` in the dtype of x, with axes added after the batch axis; independent of the library."""
    t = torch.tensor(t, dtype=torch.float64) if isinstance(t, int | float) else t
    t = t.to(dtype=x.dtype, device=x.device)
    if t.ndim == 1:
        t = t.reshape(-1, *[1] * (x.ndim - 1))
    return torch.cos(t), torch.sin(t)
