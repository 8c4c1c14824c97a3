"""Hunyuan-DiT: two encoders of text, with rotary embeddings for the picture."""

from typing import Any

import torch
from torch import Tensor

from trigflow.models.foreign.family import Family, encoded, family


@family
class HunyuanDiT(Family):
    name = "hunyuandit"
    classes = ("HunyuanDiT2DModel",)
    conditions = ("text", "text_mask", "t5", "t5_mask", "sizes")

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

        patch = model.config.patch_size
        grid = tuple(side // patch for side in x.shape[2:])
        region = get_resize_crop_region_for_grid(grid, 64 // patch)  # type: ignore[no-untyped-call]
        turns = get_2d_rotary_pos_embed(model.config.attention_head_dim, region, grid, device=x.device)
        return model(
            x, time.to(x.dtype), encoder_hidden_states=told["text"], text_embedding_mask=told["text_mask"],
            encoder_hidden_states_t5=told["t5"], text_embedding_mask_t5=told["t5_mask"],
            image_meta_size=told["sizes"].contiguous(), style=torch.zeros(len(x), dtype=torch.long, device=x.device),
            image_rotary_emb=turns, return_dict=False,
        )[0]  # fmt: skip

    def read(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        told = {}
        for index, name in enumerate(("text", "t5")):
            told[name], _, mask, _ = encoded(pipeline, texts, text_encoder_index=index)
            told[f"{name}_mask"] = mask.bool()
        return told

    def none(self, pipeline: Any, size: tuple[int, ...]) -> dict[str, Tensor]:
        return {**self.read(pipeline, [""]), "sizes": torch.tensor([[1024, 1024, *size, 0, 0]], dtype=torch.float32)}
