"""Stable Diffusion 1, 2 and XL: a U-Net with cross-attention."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trigflow.models.foreign.family import Family, encoded, family


@family
class StableDiffusion(Family):
    name = "stable-diffusion"
    classes = ("UNet2DConditionModel",)
    component = "unet"
    size = 512

    def takes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        return ("text", "pooled", "sizes") if config.get("addition_embed_type") == "text_time" else ("text",)

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        added = {"text_embeds": told["pooled"], "time_ids": told["sizes"]} if "pooled" in told else None
        return model(x, time, encoder_hidden_states=told["text"], added_cond_kwargs=added, return_dict=False)[0]

    def read(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        if hasattr(pipeline, "text_encoder_2"):
            text, _, pooled, _ = encoded(pipeline, texts)
            return {"text": text, "pooled": pooled}
        return {"text": encoded(pipeline, texts)[0]}

    def none(self, pipeline: Any, size: tuple[int, ...]) -> dict[str, Tensor]:
        none = self.read(pipeline, [""])
        if pipeline.config.get("force_zeros_for_empty_prompt"):
            none = {name: torch.zeros_like(row) for name, row in none.items()}
        if "pooled" in none:  # XL is also told the size of the picture, where it was cut, and the size that is wanted
            none["sizes"] = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32)
        return none
