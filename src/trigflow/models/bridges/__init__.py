"""Any pretrained diffusion or flow model seen as a TrigFlow network `F(x_t / sd, t, **conditions)`, exactly.

A model trained with `x' = a x0' + b n`, `n ~ N(0, I)`, sees the same noisy data as TrigFlow at the time t where the
signal-to-noise ratios agree. With data of another scale, `x0' = scale * x0`, and `k = scale * sd`::

    b / a = k tan(t),        x' = a k X / cos(t),        X = x_t / sd

What the model predicts there fixes both the data and the noise, and so `F = (cos(t) z - sin(t) x0) / sd`. Nothing is
retrained and nothing is approximated: a bridged model can be sampled with `trigflow.samplers`, guided, and used as the
teacher of a student.

Source: Lu and Song 2025, appendix B; Karras et al. 2022, table 1.
"""

from trigflow.models.bridges.bridge import Adapter, Bridge, DenoiserBridge, EDMBridge, FlowBridge, OneHot, VPBridge, plain
from trigflow.models.bridges.schedules import CosineSchedule, DiscreteSchedule, LinearSchedule, Schedule

__all__ = [
    "Adapter", "Bridge", "CosineSchedule", "DenoiserBridge", "DiscreteSchedule", "EDMBridge", "FlowBridge", "LinearSchedule",
    "OneHot", "Schedule", "VPBridge", "plain",
]  # fmt: skip
