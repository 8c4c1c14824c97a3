"""The exact network of jumps from t to any earlier time s, for independent Gaussian coordinates.

The trajectory through x_t is `x_s = x_t sqrt(V(s) / V(t))`, `V(t) = cos^2(t) l + sin^2(t) sd^2`, so the network of
`x_s = cos(t - s) x_t - sin(t - s) sd F` is, with `rho = sqrt(V(s) / V(t))`::

    F = x (cos(t - s) - rho) / sin(t - s)
      = x ((sd^2 - l) sin(t + s) - sin(t - s) V(t)) / (V(t) (cos(t - s) + rho))

for `x = x_t / sd`; the second form, for which `V(t) - V(s) = (sd^2 - l) sin(t + s) sin(t - s)`, divides by nothing small.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExactJumps(nn.Module):
    """F above, in operations that carry tangents; every input in the dtype of x."""

    takes = frozenset({"end"})

    def __init__(self, variances: Tensor, sd: float = 0.5) -> None:
        super().__init__()
        self.variances, self.sd = variances, sd

    def variance(self, t: Tensor) -> Tensor:
        """`V(t)`, `(b, d)`."""
        return torch.cos(t)[:, None] ** 2 * self.variances + torch.sin(t)[:, None] ** 2 * self.sd**2

    def jump(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Where the trajectory through x at t is at s; shapes `(b, d)`, `(b,)`, `(b,)`."""
        return x * torch.sqrt(self.variance(s) / self.variance(t))

    def forward(self, x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        v, rho = self.variance(t), torch.sqrt(self.variance(end) / self.variance(t))
        cos, sin = torch.cos(t - end)[:, None], torch.sin(t - end)[:, None]
        bend = (self.sd**2 - self.variances) * torch.sin(t + end)[:, None]
        return x * (bend - sin * v) / (v * (cos + rho))
