"""Stable Audio Open: sound, `(c, length)`, told from which second to which it is."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trigflow.models.foreign.family import Family, encoded, family


@family
class StableAudio(Family):
    name = "stable-audio"
    classes = ("StableAudioDiTModel",)
    conditions = ("text", "sizes")
    shells = True

    def shape(self, config: Mapping[str, Any], factor: int, size: int | None) -> tuple[int, ...]:
        return config["in_channels"], config["sample_size"]

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        width, places = model.config.attention_head_dim // 2, x.shape[2] + 1
        turns = get_1d_rotary_pos_embed(width, places, use_real=True, repeat_interleave_real=False)
        return model(
            x, time, encoder_hidden_states=told["text"], global_hidden_states=told["sizes"],
            rotary_embedding=tuple(row.to(x.device) for row in turns), return_dict=False,
        )[0]  # fmt: skip

    def read(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        text = encoded(pipeline, texts)
        return {"text": torch.cat([text, *(row.expand(len(text), -1, -1) for row in seconds(pipeline))], 1)}

    def none(self, pipeline: Any, size: tuple[int, ...]) -> dict[str, Tensor]:
        text = self.read(pipeline, [""])["text"]
        return {"text": torch.zeros_like(text), "sizes": torch.cat(seconds(pipeline), 2)}  # seconds are told all the same


def seconds(pipeline: Any) -> tuple[Tensor, Tensor]:
    """What the first and the last second mean, each `(1, 1, width)`, of the longest sound there is."""
    end = pipeline.transformer.config.sample_size * pipeline.vae.hop_length / pipeline.vae.config.sampling_rate
    return pipeline.encode_duration(0.0, end, "cpu", False, 1)
