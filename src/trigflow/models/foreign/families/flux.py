"""Flux.1: dev (guidance is an input) and schnell; and Chroma, which was made from it."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trigflow.models.foreign.family import Family, encoded, family, packed, unpacked


@family
class Flux(Family):
    name = "flux"
    classes = ("FluxTransformer2DModel",)
    conditions: ClassVar[tuple[str, ...]] = ("text", "pooled")
    time_scale = 1.0
    patch: ClassVar[int] = 2

    def shape(self, config: Mapping[str, Any], factor: int, size: int | None) -> tuple[int, ...]:
        side = (size or self.size) // factor
        return config["in_channels"] // 4, side, side

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        text = told["text"]
        rows = model(
            hidden_states=packed(x), timestep=time, encoder_hidden_states=text, txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=places(x), return_dict=False, **self.more(x, told),
        )[0]  # fmt: skip
        return unpacked(rows, x)

    def more(self, x: Tensor, told: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """What else is told."""
        return {"guidance": told.get("guidance"), "pooled_projections": told["pooled"]}

    def read(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        text, pooled, _ = encoded(pipeline, texts)
        return {"text": text, "pooled": pooled}


@family
class Chroma(Flux):
    name = "chroma"
    classes = ("ChromaTransformer2DModel",)
    conditions = ("text", "text_mask")

    def more(self, x: Tensor, told: dict[str, Tensor]) -> dict[str, Tensor | None]:
        rows = x.shape[2] * x.shape[3] // 4
        return {"attention_mask": F.pad(told["text_mask"].to(x.dtype), (0, rows), value=1.0)}

    def read(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        text, _, mask, *_ = encoded(pipeline, texts)
        return {"text": text, "text_mask": mask.bool()}


def places(x: Tensor) -> Tensor:
    """Row and column of every patch of 2 x 2, `(h w / 4, 3)`, after a zero."""
    h, w = (side // 2 for side in x.shape[2:])
    grid = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1)
    return F.pad(grid.reshape(-1, 2), (1, 0)).to(x)
