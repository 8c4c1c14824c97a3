"""The U-Net of DDPM: pixels without a text, with classes or without."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trigflow.models.foreign.family import Family, family
from trigflow.runtime.errors import UserError


@family
class UNet(Family):
    name = "unet"
    classes = ("UNet2DModel",)
    component = "unet"
    null_label = False

    def takes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        embedding = config.get("time_embedding_type"), config.get("class_embed_type")
        if embedding[0] == "learned" or embedding[1]:
            raise UserError(
                f"a UNet2DModel that is told its time as '{embedding[0]}' and its class as '{embedding[1]}'; expected a time "
                "that moves smoothly (positional) and a class by its number (null); take another pipeline"
            )
        return ("label",) if config.get("num_class_embeds") else ()

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        return model(x, time, class_labels=told.get("label"), return_dict=False)[0]

    def classes_of(self, config: Mapping[str, Any]) -> int:
        return int(config["num_class_embeds"])
