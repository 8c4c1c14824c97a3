"""Networks of diffusers in configurations of a few thousand parameters, and the oracle of their tangents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangent.helpers import draw
from tangent.steps import directions, oracle, randomize

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; it is a development dependency")

B = 2


@dataclass(frozen=True)
class Case:
    """A network in a configuration of a few thousand parameters.

    Attributes:
        kind: name of its class.
        settings: its configuration.
        latents: shape of the latents, by the name of the argument that takes them.
        conditions: further floating-point inputs, held fixed: shape by name.
        others: further inputs of other types.
        tolerance: relative error of the tangent in double precision: 1e-10, unless the network computes in float32
            whatever its dtype.
        rounding: relative error of the tangent under bfloat16 autocast.
    """

    kind: str
    settings: dict[str, Any]
    latents: tuple[str, tuple[int, ...]]
    conditions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-10
    rounding: float = 0.05

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        return randomize(getattr(diffusers, self.kind)(**self.settings), dtype).eval()

    def call(self, net: nn.Module, **options: Any) -> Callable[..., Any]:
        """`fn(x, t)`, with the conditions in the dtype of the network."""
        dtype = next(net.parameters()).dtype
        fixed = {name: draw(200 + i, *shape).to(dtype) for i, (name, shape) in enumerate(self.conditions.items())}

        def fn(x: Tensor, t: Tensor) -> Any:
            return net(**{self.latents[0]: x, "timestep": t}, **fixed, **self.others, **options)

        return fn

    def fn(self, net: nn.Module) -> Callable[..., Any]:
        call = self.call(net, return_dict=False)
        return lambda x, t: call(x, t)[0]

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        # The times are short binary fractions: Flux multiplies them by 1000 in the dtype of its activations.
        return draw(1, *self.latents[1]).to(dtype), torch.tensor([0.5, 0.75], dtype=dtype)


UNET: dict[str, Any] = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
IDS = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
KEPT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])

CASES = {
    "UNet2DModel": Case(
        "UNet2DModel",
        {
            **UNET,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            "num_class_embeds": 5,
            "resnet_time_scale_shift": "scale_shift",
        },
        ("sample", (B, 3, 8, 8)),
        others={"class_labels": torch.tensor([0, 3])},
    ),
    "UNet2DConditionModel": Case(
        "UNet2DConditionModel",
        {
            **UNET,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 12,
            "attention_head_dim": 2,
        },
        ("sample", (B, 4, 8, 8)),
        {"encoder_hidden_states": (B, 5, 12)},
        {"encoder_attention_mask": KEPT},
    ),
    "DiTTransformer2DModel": Case(
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "num_layers": 2,
            "sample_size": 8,
            "num_embeds_ada_norm": 5,
        },
        ("hidden_states", (B, 4, 8, 8)),
        others={"class_labels": torch.tensor([0, 3])},
    ),
    "SD3Transformer2DModel": Case(
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 10,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        ("hidden_states", (B, 4, 8, 8)),
        {"encoder_hidden_states": (B, 5, 12), "pooled_projections": (B, 10)},
        tolerance=1e-7,  # norms of queries and keys in float32
    ),
    "FluxTransformer2DModel": Case(
        "FluxTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 10,
            "axes_dims_rope": (2, 2, 4),
            "guidance_embeds": True,
        },
        ("hidden_states", (B, 16, 4)),
        {"encoder_hidden_states": (B, 5, 12), "pooled_projections": (B, 10)},
        {"img_ids": IDS, "txt_ids": torch.zeros(5, 3), "guidance": torch.tensor([3.5, 3.5])},
        rounding=0.2,  # the time is multiplied by 1000
    ),
    "SanaTransformer2DModel": Case(
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "sample_size": 8,
            "patch_size": 1,
            "qk_norm": "rms_norm_across_heads",
        },
        ("hidden_states", (B, 4, 8, 8)),
        {"encoder_hidden_states": (B, 5, 12)},
        {"encoder_attention_mask": KEPT},
        tolerance=1e-6,  # linear attention in float32
    ),
    "WanTransformer3DModel": Case(  # writes its rotary embedding into an empty tensor
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 12,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 16,
        },
        ("hidden_states", (B, 4, 2, 8, 8)),
        {"encoder_hidden_states": (B, 5, 12)},
        tolerance=1e-6,  # norms and modulation in float32
    ),
    "Lumina2Transformer2DModel": Case(  # gathers its tokens by writing them into fresh tensors
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (16, 16, 16),
            "cap_feat_dim": 12,
        },
        ("hidden_states", (B, 4, 8, 8)),
        {"encoder_hidden_states": (B, 5, 12)},
        {"encoder_attention_mask": KEPT},
        tolerance=1e-6,
    ),
}


def exact(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """`torch.func.jvp`, with group norm on contiguous copies: PyTorch has no forward derivative of it otherwise."""
    group_norm = F.group_norm
    with mock.patch.object(F, "group_norm", lambda x, *args: group_norm(x.contiguous(), *args)):
        return oracle(fn, inputs, directions(inputs))
