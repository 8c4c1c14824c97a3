"""Stable Diffusion 3 and 3.5."""

from typing import Any

from torch import Tensor

from trigflow.models.foreign.family import Family, encoded, family


@family
class SD3(Family):
    name = "sd3"
    classes = ("SD3Transformer2DModel",)
    conditions = ("text", "pooled")

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        return model(
            x, timestep=time, encoder_hidden_states=told["text"], pooled_projections=told["pooled"], return_dict=False
        )[0]  # fmt: skip

    def read(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        text, _, pooled, _ = encoded(pipeline, texts)
        return {"text": text, "pooled": pooled}
