"""HunyuanVideo."""

from typing import Any

from torch import Tensor

from trigflow.models.foreign.family import Family, encoded, family


@family
class HunyuanVideo(Family):
    name = "hunyuan-video"
    classes = ("HunyuanVideoTransformer3DModel",)
    conditions = ("text", "text_mask", "pooled")
    size = 720
    scale = 6.0
    frames = 33
    """Of latents: 129 frames of a video, four at a time after the first."""

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        guidance = told["guidance"] * 1000 if "guidance" in told else None
        return model(
            x, timestep=time, encoder_hidden_states=told["text"], encoder_attention_mask=told["text_mask"].to(x.dtype),
            pooled_projections=told["pooled"], guidance=guidance, return_dict=False,
        )[0]  # fmt: skip

    def read(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        text, pooled, mask = encoded(pipeline, texts)
        return {"text": text, "pooled": pooled, "text_mask": mask.bool()}
