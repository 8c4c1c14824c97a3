"""Qwen-Image."""

from typing import Any

from torch import Tensor

from trigflow.models.foreign.families.flux import Flux
from trigflow.models.foreign.family import encoded, family, packed, padded, unpacked


@family
class QwenImage(Flux):
    name = "qwen-image"
    classes = ("QwenImageTransformer2DModel",)
    conditions = ("text", "text_mask")
    length = 512
    """Tokens of a text, without those of the words around it."""

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        rows = model(
            hidden_states=packed(x), timestep=time, encoder_hidden_states=told["text"], return_dict=False,
            encoder_hidden_states_mask=told["text_mask"], img_shapes=[[(1, *(side // 2 for side in x.shape[2:]))]] * len(x),
        )[0]  # fmt: skip
        return unpacked(rows, x)

    def read(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        return padded([encoded(pipeline, [text])[0][0] for text in texts], self.length)
