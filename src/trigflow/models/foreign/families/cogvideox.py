"""CogVideoX and CogVideoX 1.5: video from a text."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trigflow.models.foreign.family import Family, family


@family
class CogVideoX(Family):
    name = "cogvideox"
    classes = ("CogVideoXTransformer3DModel",)

    def shape(self, config: Mapping[str, Any], factor: int, size: int | None) -> tuple[int, ...]:
        frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
        frames += -frames % (config.get("patch_size_t") or 1)
        sides = (size // factor, size // factor) if size else (config["sample_height"], config["sample_width"])
        return config["in_channels"], frames, *sides

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        turns = turns_of(model.config, x) if model.config.use_rotary_positional_embeddings else None
        frames = x.transpose(1, 2)
        made = model(frames, told["text"], timestep=time, image_rotary_emb=turns, return_dict=False)[0]
        return made.transpose(1, 2)


def turns_of(config: Any, x: Tensor) -> Any:
    """Rotary embeddings of the places of a video; where patches are deep (1.5), no place depends on how many there are."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    grid = tuple(side // config.patch_size for side in x.shape[3:])
    whole = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    deep = config.patch_size_t
    how: dict[str, Any] = {"grid_type": "slice", "max_size": whole} if deep else {}
    region = None if deep else get_resize_crop_region_for_grid(grid, whole[1], whole[0])  # type: ignore[no-untyped-call]
    frames = -(-x.shape[2] // (deep or 1))
    return get_3d_rotary_pos_embed(config.attention_head_dim, region, grid, frames, device=x.device, **how)
