"""Variants of the networks of diffusers: other blocks, attention, conditions and forms of the time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tangent.diffusers_cases import CASES, B, exact
from tangent.helpers import draw, relative_error
from tangent.steps import assert_same_step, directions, oracle
from trigflow.tangent import TangentError, coverage, jvp

embeddings = pytest.importorskip("diffusers.models.embeddings", reason="diffusers is not installed")
processors = pytest.importorskip("diffusers.models.attention_processor", reason="diffusers is not installed")

every = pytest.mark.parametrize("name", CASES)


# Blocks, attention, conditions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel"])
def test_attention_written_out(name: str) -> None:
    """The attention of older versions: `baddbmm` into an empty tensor, softmax, `bmm`."""
    case = CASES[name]
    net = case.build()
    for module in net.modules():
        if isinstance(module, processors.Attention):
            module.set_processor(processors.AttnProcessor())
    fn, inputs = case.fn(net), case.inputs()
    assert relative_error(assert_same_step(net, fn, inputs), exact(fn, inputs)) < 1e-6  # softmax in float32
    assert not coverage(fn, *inputs).fallbacks


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel"])
def test_fused_projections(name: str) -> None:
    case = CASES[name]
    net = case.build()
    net.fuse_qkv_projections()
    fn, inputs = case.fn(net), case.inputs()
    assert relative_error(assert_same_step(net, fn, inputs), exact(fn, inputs)) < case.tolerance


def test_feed_forward_in_chunks() -> None:
    case = CASES["SD3Transformer2DModel"]
    net = case.build()
    net.enable_forward_chunking(1, dim=0)
    fn, inputs = case.fn(net), case.inputs()
    assert relative_error(assert_same_step(net, fn, inputs), exact(fn, inputs)) < case.tolerance


def test_double_precision_throughout() -> None:
    """SD3 without the norms that it computes in float32."""
    case = CASES["SD3Transformer2DModel"]
    case = replace(case, settings={**case.settings, "qk_norm": None})
    fn, inputs = case.fn(case.build()), case.inputs()
    assert relative_error(jvp(fn, inputs, directions(inputs))[1], oracle(fn, inputs, directions(inputs))) < 1e-10


@pytest.mark.parametrize("upsample", ["conv", "resnet"])
@pytest.mark.parametrize("embedding", ["positional", "fourier"])
def test_other_blocks_of_the_unet(embedding: str, upsample: str) -> None:
    settings = {"time_embedding_type": embedding, "upsample_type": upsample, "downsample_type": upsample}
    case = CASES["UNet2DModel"]
    case = replace(case, settings={**case.settings, **settings})
    net = case.build()
    fn, inputs = case.fn(net), case.inputs()
    assert relative_error(assert_same_step(net, fn, inputs), exact(fn, inputs)) < case.tolerance


def test_blocks_with_skips_that_add_in_place() -> None:
    """The blocks of NCSN++, after which the network does `sample += skip_sample`."""
    case = CASES["UNet2DModel"]
    settings = {
        "block_out_channels": (32, 64),
        "norm_num_groups": None,
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "time_embedding_type": "fourier",
        "resnet_time_scale_shift": "default",
    }
    case = replace(case, settings={**case.settings, **settings})
    net = case.build()
    fn, inputs = case.fn(net), case.inputs()
    assert relative_error(assert_same_step(net, fn, inputs), exact(fn, inputs)) < 1e-10


def test_spectral_weights_written_into_a_slice() -> None:
    """FreeU filters by FFT and writes `h[:, :n] = h[:, :n] * factor`."""
    case = CASES["UNet2DConditionModel"]
    net = case.build()
    net.enable_freeu(0.9, 0.2, 1.2, 1.4)
    fn, inputs = case.fn(net), case.inputs()
    tangent = assert_same_step(net, fn, inputs)
    assert relative_error(tangent, exact(fn, inputs)) < 1e-10
    net.disable_freeu()
    assert relative_error(tangent, jvp(fn, inputs, directions(inputs))[1]) > 1e-2


CONDITIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sizes and crops": (
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 7},
        {"added_cond_kwargs": {"text_embeds": draw(5, B, 7), "time_ids": draw(6, B, 6)}},
    ),
    "guidance": ({"time_cond_proj_dim": 6}, {"timestep_cond": draw(5, B, 6)}),
    "residuals of another network": (
        {},
        {
            "down_block_additional_residuals": tuple(
                draw(i, B, *shape) for i, shape in enumerate([(8, 8, 8), (8, 8, 8), (8, 4, 4), (16, 4, 4)])
            ),
            "mid_block_additional_residual": draw(5, B, 16, 4, 4),
        },
    ),
}


@pytest.mark.parametrize("kind", CONDITIONS)
def test_further_conditions(kind: str) -> None:
    settings, options = CONDITIONS[kind]
    case = CASES["UNet2DConditionModel"]
    case = replace(case, settings={**case.settings, **settings}, others={**case.others, **options})
    net = case.build()
    fn, inputs = case.fn(net), case.inputs()
    assert relative_error(assert_same_step(net, fn, inputs), exact(fn, inputs)) < 1e-10
    assert not coverage(fn, *inputs).fallbacks


# Time ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize("cosine_first", [False, True])
def test_sinusoidal_embedding(width: int, cosine_first: bool) -> None:
    embed = partial(embeddings.get_timestep_embedding, embedding_dim=width, flip_sin_to_cos=cosine_first)
    t, dt = draw(1, 3), draw(2, 3)
    out, tangent = jvp(embed, (t,), (dt,))
    assert torch.equal(out, embed(t))
    assert tangent.dtype == torch.float32
    expected = oracle(embed, (t,), (dt,))
    assert expected.any()
    assert relative_error(tangent, expected) < 1e-6
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(4) / 3).double()
    angles = t[:, None] * frequencies
    closed = [angles.cos() * frequencies * dt[:, None], -angles.sin() * frequencies * dt[:, None]]
    closed = torch.cat([*(reversed(closed) if cosine_first else closed), torch.zeros(3, width - 8)], -1)
    assert relative_error(tangent.double(), closed) < 1e-5


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel"])
def test_one_time_for_the_whole_batch(name: str) -> None:
    case = CASES[name]
    fn, (x, t) = case.fn(case.build()), case.inputs()
    single = t[0].clone()
    tangent = jvp(lambda s: fn(x, s), (single,), (torch.ones_like(single),))[1]
    same = jvp(lambda s: fn(x, s), (single.expand(B),), (torch.ones(B).double(),))[1]
    assert tangent.any()
    assert relative_error(tangent, same) < 1e-12


@every
def test_integer_times_carry_no_tangent(name: str) -> None:
    case = CASES[name]
    fn, (x, t) = case.fn(case.build()), case.inputs()
    steps, (dx, dt) = torch.tensor([3, 7]), directions((x, t))
    with pytest.raises(TangentError, match=r"torch\.int64, which has no tangents"):
        jvp(fn, (x, steps), (dx, dt))
    out, tangent = jvp(fn, (x, steps), (dx, None))
    assert torch.equal(out, fn(x, steps))
    same = jvp(fn, (x, steps.double()), (dx, torch.zeros_like(dt)))[1]
    assert relative_error(tangent, same) < 1e-6


@every
def test_times_cast_to_integers_are_constants_for_both(name: str) -> None:
    """Where a caller rounds the time, its derivative is zero, for `torch.func.jvp` as well."""
    case = CASES[name]
    fn, inputs = case.fn(case.build()), case.inputs()

    def rounded(x: Tensor, t: Tensor) -> Tensor:
        return fn(x, (1000 * t).long())

    dx, dt = directions(inputs)
    with_time = jvp(rounded, inputs, (dx, dt))[1]
    assert torch.equal(with_time, jvp(rounded, inputs, (dx, None))[1])
