"""Mixture of isotropic Gaussians: an exact teacher for data with several modes.

For `x0 ~ sum_k w_k N(m_k, l_k I)`, component k of `x_t` is `N(cos(t) m_k, V_k I)`, `V_k = cos^2(t) l_k + sin^2(t) sd^2`.
With the responsibilities `r_k` of `x_t` and `d_k = (x_t - cos(t) m_k) / V_k`::

    E[x0 | x_t] = sum_k r_k (m_k + cos(t) l_k d_k)      E[z | x_t] = sum_k r_k sin(t) sd^2 d_k
    score       = -sum_k r_k d_k                        v = cos(t) E[z] - sin(t) E[x0]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oracles.gaussian import OracleNetwork, cos_sin


class MixtureOracle:
    """Unconditional, or conditional on the component (label k); the null label is the whole mixture.

    Args:
        means: `(k, d)`.
        variances: `(k,)`, positive.
        weights: `(k,)`, positive; normalized here.
        sd: sigma_data of the process.

    Samples x are `(b, d)`, times `()` or `(b,)`, labels int64 `(b,)` in [0, k], where k is the null label.
    """

    def __init__(self, means: Tensor, variances: Tensor, weights: Tensor, sd: float = 0.5) -> None:
        self.means = means
        self.variances = variances
        self.weights = weights / weights.sum()
        self.sd = sd
        self.null_label = len(means)

    def log_density(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """`log p_t(x)`, `(b,)`."""
        return torch.logsumexp(self._log_joint(x, t, label), dim=1)

    def denoise(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Posterior mean `E[x0 | x_t]`."""
        return self._posterior(x, t, label)[0]

    def velocity(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Exact PF-ODE velocity."""
        x0, noise, _ = self._posterior(x, t, label)
        c, s = cos_sin(t, x)
        return c * noise - s * x0

    def score(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """`grad log p_t(x)`."""
        return self._posterior(x, t, label)[2]

    def F_velocity(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """The diffusion network: `v / sd` for `x = x_t / sd`."""
        return self.velocity(self.sd * x, t, label) / self.sd

    def teacher(self) -> OracleNetwork:
        """The exact class-conditional diffusion network as a module."""
        return OracleNetwork(self.F_velocity, self.null_label)

    def quantile_map(self, x: Tensor, t: float) -> Tensor:
        """The exact consistency function, for d = 1 only, found without any ODE.

        In one dimension the flow keeps the order of points, so `f(x, t)` is the data point of the same quantile. Bisection
        in float64; good to about 1e-12 away from the far tails.
        """
        q = self._cdf(x.double(), t)
        reach = self.means.double().abs().max() + 12 * self.variances.double().max().sqrt()
        low, high = torch.full_like(q, -float(reach)), torch.full_like(q, float(reach))
        for _ in range(100):
            middle = (low + high) / 2
            below = self._cdf(middle, 0.0) < q
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def sample(
        self, n: int, generator: torch.Generator | None = None, label: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """`n` data points `(n, d)` and their components `(n,)`; drawn from the given components if `label` is."""
        if label is None:
            label = torch.full((n,), self.null_label)
        drawn = torch.multinomial(self.weights.double(), n, replacement=True, generator=generator)
        component = torch.where(label == self.null_label, drawn, label)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=dtype)
        x = self.means.to(dtype)[component] + self.variances.to(dtype)[component].sqrt()[:, None] * z
        return x, component

    def _log_joint(self, x: Tensor, t: Tensor | float, label: Tensor | None) -> Tensor:
        """`log w_k N(x; cos(t) m_k, V_k I)`, `(b, k)`; the weights are one-hot where a label is given."""
        offset, v = self._offset(x, t)
        d = self.means.shape[1]
        log_w = self.weights.to(x).log().expand(len(x), -1)
        if label is not None:
            components = torch.arange(self.null_label, device=x.device)
            chosen = torch.where(components == label[:, None], 0.0, -torch.inf).to(x)
            log_w = torch.where((label == self.null_label)[:, None], log_w, chosen)
        return log_w - offset.square().sum(2) / (2 * v) - d / 2 * torch.log(2 * math.pi * v)

    def _offset(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """`x - cos(t) m_k`, `(b, k, d)`, and `V_k`, `(b or 1, k)`."""
        c, s = (a.reshape(-1, 1) for a in cos_sin(t, x))
        v = c**2 * self.variances.to(x) + s**2 * self.sd**2
        return x[:, None] - c[:, :, None] * self.means.to(x), v

    def _posterior(self, x: Tensor, t: Tensor | float, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """`E[x0 | x_t]`, `E[z | x_t]` and the score, each `(b, d)`."""
        c, s = (a.reshape(-1, 1, 1) for a in cos_sin(t, x))
        offset, v = self._offset(x, t)
        r = torch.softmax(self._log_joint(x, t, label), dim=1)[:, :, None]
        d = offset / v[:, :, None]
        x0 = (r * (self.means.to(x) + c * self.variances.to(x)[:, None] * d)).sum(1)
        weighted = (r * d).sum(1)
        return x0, s[:, 0] * self.sd**2 * weighted, -weighted

    def _cdf(self, x: Tensor, t: float) -> Tensor:
        """P(x_t < x) of the whole mixture in one dimension, of the shape of x."""
        offset, v = self._offset(x, t)
        per_component = torch.special.ndtr(offset[:, :, 0] / v.sqrt())
        return (per_component * self.weights.to(x)).sum(1, keepdim=True)
