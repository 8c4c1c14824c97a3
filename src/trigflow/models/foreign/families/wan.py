"""Wan 2.1: video, `(c, frames, h, w)`."""

from typing import Any

from torch import Tensor

from trigflow.models.foreign.family import Family, family


@family
class Wan(Family):
    name = "wan"
    classes = ("WanTransformer3DModel",)
    size = 480
    frames = 21
    """Of latents: 81 frames of a video, four at a time after the first."""

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        return model(hidden_states=x, timestep=time, encoder_hidden_states=told["text"], return_dict=False)[0]
