"""Lumina Image 2."""

from typing import Any

from torch import Tensor

from trigflow.models.foreign.family import Family, encoded, family


@family
class Lumina2(Family):
    name = "lumina2"
    classes = ("Lumina2Transformer2DModel",)
    conditions = ("text", "text_mask")
    time_scale = 1.0

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        return -model(  # data - noise at the share of data
            x, timestep=1 - time, encoder_hidden_states=told["text"], encoder_attention_mask=told["text_mask"],
            return_dict=False,
        )[0]  # fmt: skip

    def none(self, pipeline: Any, size: tuple[int, ...]) -> dict[str, Tensor]:
        *_, text, mask = encoded(pipeline, [""], do_classifier_free_guidance=True)  # without the words before a prompt
        return {"text": text, "text_mask": mask.bool()}
