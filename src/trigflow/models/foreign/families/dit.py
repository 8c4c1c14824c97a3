"""DiT: classes of ImageNet."""

from typing import Any

from torch import Tensor

from trigflow.models.foreign.family import Family, family


@family
class DiT(Family):
    name = "dit"
    classes = ("DiTTransformer2DModel",)
    conditions = ("label",)

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        return model(x, timestep=time, class_labels=told["label"], return_dict=False)[0]
