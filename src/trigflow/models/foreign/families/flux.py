"""Flux.1: dev (guidance is an input) and schnell."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trigflow.models.foreign.family import Family, family, packed, unpacked


@family
class Flux(Family):
    name = "flux"
    classes = ("FluxTransformer2DModel",)
    conditions = ("text", "pooled")
    time_scale = 1.0

    def takes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        return (*self.conditions, "guidance") if config.get("guidance_embeds") else self.conditions

    def shape(self, config: Mapping[str, Any], factor: int, size: int | None) -> tuple[int, ...]:
        side = (size or self.size) // factor
        return config["in_channels"] // 4, side, side

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        text = told["text"]
        rows = model(
            hidden_states=packed(x), timestep=time, guidance=told.get("guidance"), pooled_projections=told["pooled"],
            encoder_hidden_states=text, txt_ids=text.new_zeros(text.shape[1], 3), img_ids=places(x), return_dict=False,
        )[0]  # fmt: skip
        return unpacked(rows, x)

    def none(self, pipeline: Any, size: tuple[int, ...]) -> dict[str, Tensor]:
        return {**super().none(pipeline, size), "guidance": torch.tensor([3.5])}

    def spread(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return unpacked(x, x.new_empty(len(x), *shape))

    def read(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        text, pooled, _ = pipeline.encode_prompt(texts, texts)
        return {"text": text, "pooled": pooled}


def places(x: Tensor) -> Tensor:
    """Row and column of every patch of 2 x 2, `(h w / 4, 3)`, after a zero."""
    h, w = (side // 2 for side in x.shape[2:])
    grid = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1)
    return torch.nn.functional.pad(grid.reshape(-1, 2), (1, 0)).to(x)
