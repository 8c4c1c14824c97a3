"""Layers against brute force and independent formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from networks.helpers import awake, draw
from trigflow.networks.layers import AdaptiveNorm, SelfAttention, downsample, norm_groups, pixel_norm, upsample

SIZES = [(1, 1), (1, 2), (2, 1), (1, 5), (2, 2), (4, 6), (5, 4), (7, 9), (11, 5)]


def group_norm(x: np.ndarray, groups: int, eps: float = 1e-5) -> np.ndarray:
    """Zero mean and unit variance over each group of channels and all positions."""
    flat = x.reshape(x.shape[0], groups, -1)
    return ((flat - flat.mean(2, keepdims=True)) / np.sqrt(flat.var(2, keepdims=True) + eps)).reshape(x.shape)


# Normalization -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dim"), [((3, 6), 1), ((2, 6, 4, 3), 1), ((2, 3, 6), 2)])
def test_pixel_norm_formula(shape: tuple[int, ...], dim: int) -> None:
    x = draw(0, *shape, dtype=torch.float64)
    y = x.numpy() / np.sqrt((x.numpy() ** 2).mean(axis=dim, keepdims=True) + 1e-4)
    torch.testing.assert_close(pixel_norm(x, dim), torch.from_numpy(y), rtol=1e-12, atol=1e-12)
    coarse = x.numpy() / np.sqrt((x.numpy() ** 2).mean(axis=dim, keepdims=True) + 0.5)
    torch.testing.assert_close(pixel_norm(x, dim, eps=0.5), torch.from_numpy(coarse), rtol=1e-12, atol=1e-12)


def test_pixel_norm_is_bounded_by_one_and_continuous_at_zero() -> None:
    x = draw(1, 50, 6, dtype=torch.float64) * torch.logspace(-8, 8, 50, dtype=torch.float64)[:, None]
    rms = pixel_norm(x).square().mean(1).sqrt()
    assert torch.all(rms < 1 + 1e-12)
    assert rms[-1] > 0.9999
    assert rms[0] < 1e-5
    assert torch.equal(pixel_norm(torch.zeros(1, 6)), torch.zeros(1, 6))


def test_norm_groups_is_the_largest_divisor_allowed() -> None:
    for channels in range(1, 300):
        allowed = [g for g in range(1, 33) if channels % g == 0 and (4 * g <= channels or g == 1)]
        assert norm_groups(channels) == max(allowed)


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (3, 8, 4, 5)])
@pytest.mark.parametrize("groups", [None, 1, 4])
@pytest.mark.parametrize("kind", ["double", "adagn"])
def test_adaptive_norm_formula(kind: str, groups: int | None, shape: tuple[int, ...]) -> None:
    if groups == 4 and len(shape) == 2:
        shape = (3, 8, 1)
    layer = awake(AdaptiveNorm(8, 6, kind, groups)).double()  # type: ignore[arg-type]
    x, emb = draw(2, *shape, dtype=torch.float64), draw(3, 3, 6, dtype=torch.float64)
    s, b = np.split(emb.numpy() @ layer.affine.weight.detach().numpy().T + layer.affine.bias.detach().numpy(), 2, 1)
    if kind == "double":
        s, b = (a / np.sqrt((a**2).mean(1, keepdims=True) + 1e-4) for a in (s, b))
    else:
        s = 1 + s
    s, b = (a.reshape(3, 8, *[1] * (len(shape) - 2)) for a in (s, b))
    expected = group_norm(x.numpy(), 2 if groups is None else groups) * s + b
    torch.testing.assert_close(layer(x, emb), torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


def modulation(layer: AdaptiveNorm, emb: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift, solved from what the layer does to an input and to its negative."""
    x = draw(4, len(emb), 8, 3, dtype=torch.float64)
    plus, minus = layer(x, emb), layer(-x, emb)
    scale = (plus - minus) / 2 / torch.from_numpy(group_norm(x.numpy(), layer.groups))
    return scale.mean(2), ((plus + minus) / 2).mean(2)


def test_double_normalization_bounds_the_modulation() -> None:
    double, adagn = (awake(AdaptiveNorm(8, 6, kind)).double() for kind in ("double", "adagn"))  # type: ignore[arg-type]
    for size in (0.0, 1.0, 1e4):
        emb = size * draw(5, 4, 6, dtype=torch.float64)
        for part in modulation(double, emb):
            rms = part.square().mean(1).sqrt()
            assert torch.all(rms <= 1 + 1e-9)
            assert torch.all(rms > 0.9)
    assert all(part.square().mean(1).sqrt().min() > 100 for part in modulation(adagn, emb))


def test_double_normalization_begins_near_a_plain_one() -> None:
    layer = AdaptiveNorm(8, 6, "double").double()
    scale, shift = modulation(layer, torch.zeros(2, 6, dtype=torch.float64))
    torch.testing.assert_close(scale, torch.ones_like(scale), atol=1e-4, rtol=0)
    assert torch.all(shift.square().mean(1) < 1)


# Attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "heads"), [(6, 1), (128, 2)])
def test_attention_formula(channels: int, heads: int) -> None:
    """`(x + W softmax(q k^T / sqrt(e)) v) / sqrt(2)`, one head and one position at a time."""
    layer = awake(SelfAttention(channels), scale=0.3).double()
    x = draw(6, 2, channels, 2, 3, dtype=torch.float64)
    w = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    normed = group_norm(x.numpy(), layer.norm.num_groups) * w["norm.weight"][:, None, None]
    normed = (normed + w["norm.bias"][:, None, None]).reshape(2, channels, 6)
    expected = np.empty_like(normed)
    width = channels // heads
    for i in range(2):
        q, k, v = np.split(w["qkv.weight"][:, :, 0, 0] @ normed[i] + w["qkv.bias"][:, None], 3)
        mixed = np.empty_like(q)
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            for position in range(6):
                scores = np.exp(k[own].T @ q[own, position] / math.sqrt(width))
                mixed[own, position] = v[own] @ (scores / scores.sum())
        out = w["proj.weight"][:, :, 0, 0] @ mixed + w["proj.bias"][:, None]
        expected[i] = (x[i].numpy().reshape(channels, 6) + out) / math.sqrt(2)
    torch.testing.assert_close(layer(x), torch.from_numpy(expected).reshape(x.shape), rtol=1e-9, atol=1e-9)


def test_attention_begins_near_the_identity() -> None:
    x = draw(7, 2, 8, 3, 3)
    torch.testing.assert_close(SelfAttention(8)(x), x * math.sqrt(0.5), atol=1e-3, rtol=0)


@pytest.mark.parametrize("channels", [4, 96, 130, 200, 224])
def test_attention_takes_any_number_of_channels(channels: int) -> None:
    x = draw(8, 1, channels, 2, 2)
    assert SelfAttention(channels)(x).shape == x.shape


# Resampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_downsample_means_over_what_is_there(size: tuple[int, int]) -> None:
    x = draw(9, 2, 3, *size, dtype=torch.float64)
    rows, columns = math.ceil(size[0] / 2), math.ceil(size[1] / 2)
    expected = np.empty((2, 3, rows, columns))
    for i in range(rows):
        for j in range(columns):
            expected[:, :, i, j] = x.numpy()[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))
    torch.testing.assert_close(downsample(x), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_upsample_repeats_and_undoes_the_size(size: tuple[int, int]) -> None:
    x = draw(10, 2, 3, math.ceil(size[0] / 2), math.ceil(size[1] / 2))
    expected = np.empty((2, 3, *size), dtype=np.float32)
    for i in range(size[0]):
        for j in range(size[1]):
            expected[:, :, i, j] = x.numpy()[:, :, i // 2, j // 2]
    assert torch.equal(upsample(x, size), torch.from_numpy(expected))
    assert torch.equal(downsample(upsample(x, size)), x)
