"""PixArt: alpha, which may be told the size of the picture, and sigma."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trigflow.models.foreign.family import Family, family


@family
class PixArt(Family):
    name = "pixart"
    classes = ("PixArtTransformer2DModel",)
    conditions = ("text", "text_mask")

    def takes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        said = config.get("use_additional_conditions")
        told = config["sample_size"] == 128 if said is None else said
        return (*self.conditions, "sizes") if told else self.conditions

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        sizes = told.get("sizes")
        added = None if sizes is None else {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}
        return model(
            x, timestep=time, encoder_hidden_states=told["text"], encoder_attention_mask=told["text_mask"],
            added_cond_kwargs=added, return_dict=False,
        )[0]  # fmt: skip

    def none(self, pipeline: Any, size: tuple[int, ...]) -> dict[str, Tensor]:
        return {**self.read(pipeline, [""]), "sizes": torch.tensor([[*size, size[0] / size[1]]], dtype=torch.float32)}
