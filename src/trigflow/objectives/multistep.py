"""Multistep consistency: M segments of the trajectory, each of which the student crosses in one evaluation.

Shorter jumps are easier to learn: M = 1 is the consistency model, and with M growing the student becomes its teacher, drawn
with M steps.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trigflow.objectives.common import Loss, Network, VelocityFunction
from trigflow.objectives.consistency import TangentConfig, consistency_loss
from trigflow.process import TrigFlow
from trigflow.segments import segment_bounds


def multistep_loss(
    network: Network,
    process: TrigFlow,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    segments: int,
    teacher: VelocityFunction | None = None,
    label: Tensor | None = None,
    guidance: Tensor | None = None,
    tangent: TangentConfig | None = None,
    r: float = 1.0,
    weight: Callable[[Tensor], Tensor] | None = None,
) -> Loss:
    """Continuous-time consistency within each of M segments `(s_k, s_{k+1}]`, by training (`teacher=None`) or distillation::

        f(x_t, t -> s_k) = cos(t - s_k) x_t - sin(t - s_k) sd F,      s_k < t <= s_{k+1}
        g = -cos^2(t - s_k) (sd F- - dx_t/dt) - r cos(t - s_k) sin(t - s_k) (x_t + sd dF-/dt)
        L = E[ cos(t - s_k)^p ( exp(w(t)) / D || F - F- - g ||^2 - w(t) ) ]

    What F has to be jumps where one segment ends and the next begins, from a whole segment ahead to none. A network with the
    attribute `takes_end` is told s_k, which sets the two sides apart; the derivative dF/dt leaves s_k as it is.

    Args:
        segments: M. With 1, this is `consistency_loss`, for which see all other arguments and the figures.

    Raises:
        UserError: if segments < 1.

    Source: Lu and Song 2025; Heek et al. 2024 (arXiv 2403.06807) for the segments.
    """
    end, _ = segment_bounds(t, segments)
    return consistency_loss(
        network,
        process,
        x0,
        noise,
        t,
        teacher=teacher,
        label=label,
        guidance=guidance,
        end=end,
        tangent=tangent,
        r=r,
        weight=weight,
    )
