"""Sana: linear attention on the latents of a deep compression autoencoder."""

from typing import Any

from torch import Tensor

from trigflow.models.foreign.family import Family, encoded, family


@family
class Sana(Family):
    name = "sana"
    classes = ("SanaTransformer2DModel",)
    conditions = ("text", "text_mask")

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        mask, time = told["text_mask"].to(x.dtype), time * model.config.timestep_scale
        return model(
            x, encoder_hidden_states=told["text"], encoder_attention_mask=mask, timestep=time, return_dict=False
        )[0]  # fmt: skip

    def none(self, pipeline: Any, size: tuple[int, ...]) -> dict[str, Tensor]:
        text, mask, *_ = encoded(pipeline, [""], complex_human_instruction=None)  # as the pipeline's own negative prompts
        return {"text": text, "text_mask": mask.bool()}
