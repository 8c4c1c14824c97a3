"""The U-Net on images of every size and layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from networks.helpers import awake, draw, network
from trigflow.networks import UNet, UNetConfig
from trigflow.networks.unet import UNetBlock
from trigflow.runtime.errors import UserError

SIZES = [(1, 1), (1, 6), (2, 2), (7, 9), (11, 5), (28, 28)]


def times(b: int) -> Tensor:
    return torch.linspace(0.3, 1.4, b)


@pytest.mark.parametrize("mult", [(1,), (1, 2), (2, 1, 2, 1)])
@pytest.mark.parametrize("patch", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_comes_back(size: tuple[int, int], patch: int, mult: tuple[int, ...]) -> None:
    """Same shape, and every pixel of the output follows the pixel of the input below it."""
    net = awake(network("unet", width=4, patch=patch, mult=mult)).double()
    x = draw(0, 2, 2, *size, dtype=torch.float64).requires_grad_()
    out = net(x, times(2).double())
    assert out.shape == x.shape
    assert torch.isfinite(out).all()
    (slope,) = torch.autograd.grad((out * draw(1, *out.shape, dtype=torch.float64)).sum(), x)
    assert torch.isfinite(slope).all()
    assert torch.all(slope != 0)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("patch", [1, 2])
def test_every_number_of_channels(channels: int, patch: int) -> None:
    net = awake(network("unet", channels=channels, patch=patch))
    x = draw(2, 2, channels, 7, 9)
    out = net(x, times(2))
    assert out.shape == x.shape
    assert torch.isfinite(out).all()
    for c in range(channels):
        moved = x.clone()
        moved[:, c] += 1
        assert torch.all((net(moved, times(2)) - out).abs().amax((0, 2, 3)) > 1e-4)


@pytest.mark.parametrize(("size", "patch"), [((7, 9), 2), ((11, 5), 3), ((1, 1), 3), ((5, 6), 2)])
def test_padding_repeats_the_edge_and_is_cut_off(size: tuple[int, int], patch: int) -> None:
    net = awake(network("unet", patch=patch))
    x = draw(3, 2, 2, *size)
    rows = [min(i, size[0] - 1) for i in range(math.ceil(size[0] / patch) * patch)]
    columns = [min(j, size[1] - 1) for j in range(math.ceil(size[1] / patch) * patch)]
    whole = net(x[:, :, rows][:, :, :, columns], times(2))
    torch.testing.assert_close(net(x, times(2)), whole[:, :, : size[0], : size[1]], rtol=1e-5, atol=1e-6)


def test_patch_moves_pixels_into_channels() -> None:
    """A network with patches is the network of more channels on the space-to-depth image."""
    patched, plain = network("unet", channels=1, patch=2), network("unet", channels=4, patch=1)
    plain.load_state_dict(awake(patched).state_dict())
    x = draw(4, 2, 1, 6, 8)
    cells = torch.stack([x[:, 0, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=1)
    out, expected = patched(x, times(2)), plain(cells, times(2))
    for k in range(4):
        torch.testing.assert_close(out[:, 0, k // 2 :: 2, k % 2 :: 2], expected[:, k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", [(), (0,), (1,), (0, 1)])
def test_attention_sits_on_the_levels_asked_for(attention: tuple[int, ...]) -> None:
    """Encoder and decoder blocks at those levels, one in the middle at the coarsest; none at the halving and doubling."""
    net = network("unet", blocks=2, attention=attention)
    assert isinstance(net, UNet)
    with_attention = {name for name, m in net.named_modules() if isinstance(m, UNetBlock) and m.attention is not None}
    expected: set[str] = set()
    if 0 in attention:
        expected |= {"encoder.0", "encoder.1", "decoder.1.0", "decoder.1.1", "decoder.1.2"}
    if 1 in attention:
        expected |= {"encoder.3", "encoder.4", "decoder.0.0", "decoder.0.1", "decoder.0.2", "middle.0"}
    assert with_attention == expected


@pytest.mark.parametrize("patch", [1, 2])
def test_channels_last_is_the_same_network(patch: int) -> None:
    net = awake(network("unet", patch=patch, attention=(1,)))
    x = draw(6, 2, 2, 7, 6)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = net.to(memory_format=layout)
        net.zero_grad()
        out = net(x.contiguous(memory_format=layout), times(2))
        (out * draw(7, *out.shape)).sum().backward()
        results.append((out.detach(), {n: p.grad.clone() for n, p in net.named_parameters()}))
    (out, grads), (out_last, grads_last) = results
    torch.testing.assert_close(out_last, out, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_last[name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()), msg=name)


def block_reference(block: UNetBlock, x: Tensor, emb: Tensor, resample: Any) -> Tensor:
    """`(skip(x) + conv1(silu(adanorm(conv0(resample(silu(norm(x)))), emb)))) / sqrt(2)`."""
    h = resample(F.silu(block.norm0(x)))
    h = F.silu(block.norm1(F.conv2d(h, block.conv0.weight, block.conv0.bias, padding=1), emb))
    h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
    x = resample(x)
    if block.skip is not None:
        x = torch.einsum("oi,bihw->bohw", block.skip.weight[:, :, 0, 0], x) + block.skip.bias[:, None, None]
    return (x + h) / math.sqrt(2)


@pytest.mark.parametrize("c_out", [8, 12])
@pytest.mark.parametrize("resample", ["none", "down", "up"])
def test_block_formula(resample: str, c_out: int) -> None:
    block = awake(UNetBlock(8, c_out, 6, "double", 0.0, down=resample == "down")).double()
    x, emb = draw(8, 2, 8, 4, 6, dtype=torch.float64), draw(9, 2, 6, dtype=torch.float64)
    change = {
        "none": lambda y: y,
        "down": lambda y: (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4,
        "up": lambda y: y.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :7, :11],
    }[resample]
    out = block(x, emb, (7, 11)) if resample == "up" else block(x, emb)
    torch.testing.assert_close(out, block_reference(block, x, emb, change), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (2, 1, 6, 6), (2, 6, 6), (2, 2, 6)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"images of shape \(.*\); expected \(b, 2, h, w\); use images with 2 channels .+"):
        network("unet")(torch.zeros(shape), torch.zeros(2))


@pytest.mark.parametrize(
    "settings",
    [
        {"mult": ()},
        {"mult": (1, 0)},
        {"blocks": 0},
        {"patch": 0},
        {"width": 0},
        {"width": -8},
        {"channels": 0},
        {"attention": (2,)},
    ],
)
def test_impossible_configurations_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"{next(iter(settings))} is .*; expected .*; correct the network settings"):
        UNet(UNetConfig(**settings))
