"""AuraFlow."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trigflow.models.foreign.family import Family, family


@family
class AuraFlow(Family):
    name = "auraflow"
    classes = ("AuraFlowTransformer2DModel",)
    time_scale = 1.0

    def shape(self, config: Mapping[str, Any], factor: int, size: int | None) -> tuple[int, ...]:
        return super().shape(config, factor, size or self.size)  # twice what the configuration says, as its pipeline has it

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        return model(x, timestep=time, encoder_hidden_states=told["text"], return_dict=False)[0]
