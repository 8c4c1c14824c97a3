"""Z-Image: takes lists of pictures and texts, each as long as it is."""

from typing import Any

import torch
from torch import Tensor

from trigflow.models.foreign.family import Family, encoded, family, padded


@family
class ZImage(Family):
    name = "z-image"
    classes = ("ZImageTransformer2DModel",)
    conditions = ("text", "text_mask")
    time_scale = 1.0
    patch = 2
    length = 512

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        texts = [text[mask] for text, mask in zip(told["text"], told["text_mask"], strict=True)]
        made = model(list(x.unsqueeze(2).unbind()), 1 - time, texts, return_dict=False)[0]  # data - noise, at the share of data
        return -torch.stack(made).squeeze(2)

    def read(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        return padded(encoded(pipeline, texts)[0], self.length)
