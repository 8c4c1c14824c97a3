"""Classes of diffusers that its own tests of models leave out, in configurations of a few thousand parameters.

Each is like a class of those tests: what builds the network, and what it is called with. UVit2DModel is left out, which takes
tokens, and so are adapters and decoders that denoise nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor


class Configuration:
    """A class with `get_init_dict` and `get_dummy_inputs`, as the tests of diffusers have it."""

    def __init__(self, kind: str, settings: dict[str, Any], inputs: Callable[[], dict[str, Any]]) -> None:
        self.model_class = class_of(kind)
        self.settings, self.inputs = settings, inputs

    def get_init_dict(self) -> dict[str, Any]:
        return dict(self.settings)

    def get_dummy_inputs(self) -> dict[str, Any]:
        return self.inputs()


PIPELINES = "diffusers.pipelines"
ELSEWHERE = {
    "AudioLDM2UNet2DConditionModel": f"{PIPELINES}.audioldm2.modeling_audioldm2",
    "UNetFlatConditionModel": f"{PIPELINES}.deprecated.versatile_diffusion.modeling_text_unet",
    "UTransformer2DModel": f"{PIPELINES}.deprecated.unidiffuser.modeling_uvit",
    "UniDiffuserModel": f"{PIPELINES}.deprecated.unidiffuser.modeling_uvit",
    "WuerstchenDiffNeXt": f"{PIPELINES}.deprecated.wuerstchen.modeling_wuerstchen_diffnext",
    "WuerstchenPrior": f"{PIPELINES}.deprecated.wuerstchen.modeling_wuerstchen_prior",
}
"""Denoisers that live beside their pipelines."""


def class_of(kind: str) -> Any:
    """The class of this name in the installed diffusers, None where it has none."""
    if kind not in ELSEWHERE:
        return getattr(diffusers, kind, None)
    try:
        return getattr(importlib.import_module(ELSEWHERE[kind]), kind)
    except ImportError:
        return None


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def resizes_without_torchvision() -> None:
    """Cosmos resizes its padding mask with torchvision, which is nowhere else needed; PyTorch can do it as well."""
    cosmos = importlib.import_module("diffusers.models.transformers.transformer_cosmos")
    if not hasattr(cosmos, "transforms"):
        functional = SimpleNamespace(resize=lambda x, size, interpolation: F.interpolate(x, size, mode=interpolation))
        cosmos.transforms = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))  # type: ignore[attr-defined]


TIMES = torch.tensor([0.5, 0.75])
CASES: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "QwenImage21Transformer2DModel": (  # writes the tokens of the picture into those of the text
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda: {
            "hidden_states": draw(1, 2, 20, 4),
            "encoder_hidden_states": draw(2, 2, 5, 12),
            "timestep": TIMES,
            "img_shapes": [[(1, 2, 2), (1, 4, 4)]] * 2,
            "img_mask": torch.tensor([[False, True, False, False, False, True, True, True, True]] * 2),
            "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.bool),
        },
    ),
    "Cosmos3OmniTransformer": (  # the same with pictures, text and their places in one sequence
        {
            "head_dim": 12,
            "hidden_size": 24,
            "intermediate_size": 32,
            "latent_channel": 3,
            "latent_patch_size": 1,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "patch_latent_dim": 3,
            "rope_axes_dim": [2, 2, 2],
            "timestep_scale": 1.0,
            "vocab_size": 16,
        },
        lambda: {
            "input_ids": torch.tensor([1, 2]),
            "text_indexes": torch.tensor([0, 1]),
            "position_ids": torch.arange(18).view(3, 6) % 4,
            "und_len": 2,
            "sequence_length": 6,
            "vision_tokens": [draw(1, 1, 3, 1, 2, 2)],
            "vision_token_shapes": [(1, 2, 2)],
            "vision_sequence_indexes": torch.arange(2, 6),
            "vision_mse_loss_indexes": torch.arange(2, 6),
            "vision_timesteps": 0.7 * torch.ones(4),
            "vision_noisy_frame_indexes": [torch.tensor([0])],
        },
    ),
    "AnyFlowFARTransformer3DModel": (  # flexible attention
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 3,
            "out_channels": 3,
            "text_dim": 10,
            "freq_dim": 16,
            "ffn_dim": 20,
            "num_layers": 2,
            "rope_max_seq_len": 16,
        },
        lambda: {
            "hidden_states": draw(1, 1, 2, 3, 8, 8),
            "timestep": torch.tensor([[300.5, 700.25]]),
            "r_timestep": torch.tensor([[100.0, 500.0]]),
            "encoder_hidden_states": draw(2, 1, 5, 10),
            "chunk_partition": [1, 1],
        },
    ),
    "Kandinsky6SRTransformer3DModel": (
        {
            "in_visual_dim": 2,
            "out_visual_dim": 3,
            "time_dim": 12,
            "model_dim": 32,
            "ff_dim": 40,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "nabla_window": (1, 1, 1),
        },
        lambda: {"hidden_states": draw(1, 1, 2, 16, 8, 5), "timestep": 100 * TIMES[:1]},
    ),
    "Kandinsky6Transformer3DModel": (
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 10,
            "time_dim": 12,
            "model_dim": 32,
            "ff_dim": 40,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "visual_cond": False,
            "in_audio_dim": 3,
            "out_audio_dim": 3,
        },
        lambda: {
            "hidden_states": draw(1, 1, 2, 4, 4, 4),
            "audio_hidden_states": draw(4, 1, 6, 3),
            "encoder_hidden_states": draw(2, 1, 5, 12),
            "pooled_projections": draw(3, 1, 10),
            "timestep": 100 * TIMES[:1],
        },
    ),
    "Kandinsky5Transformer3DModel": (
        {
            "in_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 10,
            "time_dim": 12,
            "out_visual_dim": 4,
            "model_dim": 32,
            "ff_dim": 40,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
        lambda: {
            "hidden_states": draw(1, 1, 2, 4, 4, 4),
            "encoder_hidden_states": draw(2, 1, 5, 12),
            "timestep": 100 * TIMES[:1],
            "pooled_projections": draw(3, 1, 10),
            "visual_rope_pos": [torch.arange(2), torch.arange(2), torch.arange(2)],
            "text_rope_pos": torch.arange(5),
        },
    ),
    "Kandinsky3UNet": (
        {
            "time_embedding_dim": 4,
            "groups": 2,
            "attention_head_dim": 4,
            "layers_per_block": 2,
            "block_out_channels": (16, 32),
            "cross_attention_dim": 4,
            "encoder_hid_dim": 12,
        },
        lambda: {
            "sample": draw(1, 2, 4, 8, 8),
            "timestep": 100 * TIMES,
            "encoder_hidden_states": draw(2, 2, 5, 12),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        },
    ),
    "HunyuanImageTransformer2DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "guidance_embeds": True,
            "text_embed_dim": 12,
            "text_embed_2_dim": 10,
            "rope_axes_dim": (4, 4),
        },
        lambda: {
            "hidden_states": draw(1, 2, 4, 4, 4),
            "timestep": 100 * TIMES,
            "encoder_hidden_states": draw(2, 2, 5, 12),
            "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
            "encoder_hidden_states_2": draw(3, 2, 4, 10),
            "encoder_attention_mask_2": torch.tensor([[True] * 4, [True, True, False, False]]),
            "guidance": torch.tensor([3.5, 3.5]),
        },
    ),
    "DreamLiteTransformer2DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "norm_num_groups": 4, "cross_attention_dim": 12},
        lambda: {"hidden_states": draw(1, 2, 16, 4, 4), "encoder_hidden_states": draw(2, 2, 5, 12)},
    ),
    "DreamLiteUNetModel": (
        {
            "sample_size": 8,
            "down_block_types": (
                "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
                "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
                "DreamLiteCrossAttnDownBlock2D",
            ),
            "block_out_channels": (16, 32, 64),
            "cross_attention_dim": 12,
            "attention_head_dim": 8,
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
        lambda: {"sample": draw(1, 2, 4, 8, 8), "timestep": 100 * TIMES, "encoder_hidden_states": draw(2, 2, 5, 12)},
    ),
    "BriaFibo2Transformer2DModel": (
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 12,
            "injection_layer_ids": (0, 1),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6),
            "axes_lens": (64, 16, 16),
        },
        lambda: {"hidden_states": draw(1, 2, 4, 4, 4), "timestep": TIMES, "encoder_hidden_states": draw(2, 2, 3, 5, 12)},
    ),
    "Flux3Transformer2DModel": (
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "timestep_channels": 8,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda: {
            "hidden_states": draw(1, 2, 6, 4),
            "encoder_hidden_states": draw(2, 2, 5, 12),
            "timestep": TIMES,
            "img_ids": torch.arange(24.0).view(6, 4) % 5,
            "txt_ids": torch.zeros(5, 4),
        },
    ),
    "I2VGenXLUNet": (
        {
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "cross_attention_dim": 12,
            "attention_head_dim": 4,
            "num_attention_heads": None,
        },
        lambda: {
            "sample": draw(1, 1, 4, 2, 8, 8),
            "timestep": 100 * TIMES[:1],
            "fps": torch.tensor([8]),
            "image_latents": draw(2, 1, 4, 2, 8, 8),
            "image_embeddings": draw(3, 1, 12),
            "encoder_hidden_states": draw(4, 1, 5, 12),
        },
    ),
    "StableAudioDiTModel": (
        {
            "sample_size": 4,
            "in_channels": 3,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "out_channels": 3,
            "cross_attention_dim": 8,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 8,
        },
        lambda: {
            "hidden_states": draw(1, 2, 3, 6),
            "timestep": TIMES,
            "encoder_hidden_states": draw(2, 2, 5, 8),
            "global_hidden_states": draw(3, 2, 1, 8),
            "rotary_embedding": (draw(4, 7, 2).cos(), draw(4, 7, 2).sin()),
        },
    ),
    "StableCascadeUNet": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 16,
            "block_out_channels": (16, 16),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_in_channels": 12,
            "clip_text_pooled_in_channels": 10,
            "clip_image_in_channels": 6,
            "clip_seq": 2,
            "dropout": (0.0, 0.0),
        },
        lambda: {
            "sample": draw(1, 2, 4, 4, 4),
            "timestep_ratio": TIMES,
            "clip_text_pooled": draw(2, 2, 1, 10),
            "clip_text": draw(3, 2, 5, 12),
            "clip_img": draw(4, 2, 1, 6),
        },
    ),
    "T5FilmDecoder": (
        {"input_dims": 6, "targets_length": 8, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32},
        lambda: {
            "encodings_and_masks": [(draw(1, 2, 5, 16), torch.ones(2, 5))],
            "decoder_input_tokens": draw(2, 2, 8, 6),
            "decoder_noise_time": TIMES,
        },
    ),
    "Transformer2DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 16,
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
            "attention_bias": True,
        },
        lambda: {"hidden_states": draw(1, 2, 16, 4, 4), "encoder_hidden_states": draw(2, 2, 5, 12)},
    ),
    "SanaWMTransformer3DModel": (
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "caption_channels": 12,
            "use_chunk_plucker_post_attn": False,
            "chunk_plucker_channels": 6,
            "chunk_plucker_post_attn_blocks": 2,
        },
        lambda: {
            "hidden_states": draw(1, 1, 4, 3, 4, 4),
            "timestep": torch.tensor([[[100.2, 200.3, 300.4]]]),
            "encoder_hidden_states": draw(2, 1, 1, 5, 12),
            "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 2,
            "caption_channels": 12,
        },
        lambda: {
            "hidden_states": draw(1, 2, 6, 4),
            "encoder_hidden_states": draw(2, 2, 5, 12),
            "timestep": 1000 * TIMES[:, None].expand(2, 6),
            "video_rotary_emb": (draw(3, 1, 6, 16).cos(), draw(3, 1, 6, 16).sin()),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        },
    ),
    "RFD4ProteinaTransformer": (
        {
            "nlayers": 2,
            "token_dim": 32,
            "nheads": 2,
            "dim_cond": 16,
            "pair_repr_dim": 12,
            "latent_dim": 4,
            "t_emb_dim": 8,
            "xt_pair_dist_dim": 6,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "tri_mult_c": 8,
        },
        lambda: {
            "bb_ca": draw(1, 2, 5, 3),
            "local_latents": draw(2, 2, 5, 4),
            "bb_ca_time": TIMES,
            "local_latents_time": TIMES,
            "padding_mask": torch.tensor([[True] * 5, [True, True, True, True, False]]),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(2, 5, dtype=torch.bool),
                "supports_local_latent": torch.ones(2, 5, dtype=torch.bool),
            },
        },
    ),
    "AudioLDM2UNet2DConditionModel": (
        {
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "sample_size": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": ((None, 8, 16), (None, 8, 16)),
        },
        lambda: {
            "sample": draw(1, 2, 4, 8, 8),
            "timestep": 100 * TIMES,
            "encoder_hidden_states": draw(2, 2, 5, 8),
            "encoder_hidden_states_1": draw(3, 2, 6, 16),
            "encoder_attention_mask_1": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
        },
    ),
    "UNetFlatConditionModel": (
        {
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlockFlat", "DownBlockFlat"),
            "up_block_types": ("UpBlockFlat", "CrossAttnUpBlockFlat"),
            "cross_attention_dim": 12,
            "attention_head_dim": 4,
        },
        lambda: {"sample": draw(1, 2, 4, 4, 1), "timestep": 100 * TIMES, "encoder_hidden_states": draw(2, 2, 5, 12)},
    ),
    "UTransformer2DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "num_layers": 2,
            "sample_size": 4,
            "patch_size": 2,
            "use_patch_pos_embed": True,
        },
        lambda: {"hidden_states": draw(1, 2, 4, 4, 4)},
    ),
    "UniDiffuserModel": (
        {
            "text_dim": 12,
            "clip_img_dim": 10,
            "num_text_tokens": 5,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "sample_size": 4,
            "patch_size": 2,
            "use_data_type_embedding": True,
        },
        lambda: {
            "latent_image_embeds": draw(1, 2, 4, 4, 4),
            "image_embeds": draw(2, 2, 1, 10),
            "prompt_embeds": draw(3, 2, 5, 12),
            "timestep_img": 100 * TIMES,
            "timestep_text": 100 * TIMES,
        },
    ),
    "WuerstchenPrior": (
        {"c_in": 4, "c": 16, "c_cond": 12, "c_r": 8, "depth": 2, "nhead": 2},
        lambda: {"x": draw(1, 2, 4, 3, 3), "r": TIMES, "c": draw(2, 2, 5, 12)},
    ),
    "WuerstchenDiffNeXt": (
        {
            "c_r": 8,
            "c_cond": 12,
            "c_hidden": [8, 16],
            "nhead": [-1, 2],
            "blocks": [1, 2],
            "level_config": ["CT", "CTA"],
            "inject_effnet": [False, True],
            "effnet_embd": 6,
            "clip_embd": 10,
        },
        lambda: {"x": draw(1, 2, 4, 8, 8), "r": TIMES, "effnet": draw(2, 2, 6, 3, 3), "clip": draw(3, 2, 5, 10)},
    ),
}


def cases() -> Iterator[tuple[str, str, Configuration]]:
    """Name of the class, of the configuration, and the configuration, where the installed diffusers has the class."""
    for kind, (settings, inputs) in CASES.items():
        if class_of(kind) is not None:
            yield kind, "ours", Configuration(kind, settings, inputs)
