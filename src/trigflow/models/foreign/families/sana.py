"""Sana: linear attention on the latents of a deep compression autoencoder."""

import inspect
from typing import Any

from torch import Tensor

from trigflow.models.foreign.family import Family, family


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

    def read(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
        return encoded(pipeline, texts, instruction)

    def none(self, pipeline: Any, size: tuple[int, ...]) -> dict[str, Tensor]:
        return encoded(pipeline, [""], None)  # as the pipeline's own negative prompts


def encoded(pipeline: Any, texts: list[str], instruction: list[str] | None) -> dict[str, Tensor]:
    """What the encoder makes of texts behind an instruction on how to enhance them."""
    text, mask, _, _ = pipeline.encode_prompt(
        texts, do_classifier_free_guidance=False, complex_human_instruction=instruction
    )  # fmt: skip
    return {"text": text, "text_mask": mask.bool()}
