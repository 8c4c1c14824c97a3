"""CogView 4: a text is filled up to a multiple of 16 tokens, all of which count."""

from typing import Any

import torch
from torch import Tensor

from trigflow.models.foreign.family import Family, by_length, encoded, family, padded


@family
class CogView4(Family):
    name = "cogview4"
    classes = ("CogView4Transformer2DModel",)
    conditions = ("text", "text_mask", "sizes")
    length = 1024
    whole_times = True

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        def run(length: int, x: Tensor, time: Tensor, text: Tensor, sizes: Tensor) -> Tensor:
            return model(
                x, text[:, :length], timestep=time, original_size=sizes[:, :2], target_size=sizes[:, 2:4],
                crop_coords=sizes[:, 4:], return_dict=False,
            )[0]  # fmt: skip

        return by_length(run, x, told["text_mask"], time, told["text"], told["sizes"])

    def read(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        return padded([encoded(pipeline, [text])[0][0] for text in texts], self.length)

    def none(self, pipeline: Any, size: tuple[int, ...]) -> dict[str, Tensor]:
        return {**self.read(pipeline, [""]), "sizes": torch.tensor([[*size, *size, 0, 0]], dtype=torch.float32)}
