"""Functions linear in their tensors: shapes, indexing, padding, resampling, joining."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tangent.helpers import check, draw, no_fallback

IMAGE = (2, 4, 6, 6)


LINEAR: dict[str, Callable[[Tensor], Any]] = {
    "reshape": lambda x: x.reshape(2, -1),
    "view": lambda x: x.view(2, 4, 36),
    "view_as": lambda x: x.view_as(x),
    "flatten": lambda x: x.flatten(1),
    "torch.flatten": lambda x: torch.flatten(x, 2),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "expand": lambda x: x[:1].expand(3, -1, -1, -1),
    "expand_as": lambda x: x[:1].expand_as(x),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "tile": lambda x: torch.tile(x, (2, 1)),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "None index": lambda x: x[:, None, ..., ::2],
    "tensor index": lambda x: x[torch.tensor([1, 0, 1]), :, 2],
    "mask index": lambda x: x[:, torch.tensor([True, False, True, True])],
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 2),
    "t": lambda x: x.flatten(1).t(),
    "T": lambda x: x.flatten(1).T,
    "mT": lambda x: x.mT,
    "movedim": lambda x: torch.movedim(x, 1, -1),
    "swapaxes": lambda x: x.swapaxes(0, 3),
    "narrow": lambda x: x.narrow(2, 1, 3),
    "select": lambda x: x.select(1, 2),
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 0])),
    "gather": lambda x: x.gather(1, torch.zeros(2, 1, 6, 6, dtype=torch.long)),
    "take_along_dim": lambda x: torch.take_along_dim(x, torch.zeros(2, 1, 6, 6, dtype=torch.long), 1),
    "masked_select": lambda x: x.masked_select(torch.arange(6) > 3),
    "masked_fill": lambda x: x.masked_fill(torch.arange(6) > 3, 5.0),
    "diagonal": lambda x: x.diagonal(0, 2, 3),
    "diag_embed": lambda x: torch.diag_embed(x),
    "tril": lambda x: x.tril(),
    "triu": lambda x: torch.triu(x, 1),
    "flip": lambda x: x.flip(1, 2),
    "roll": lambda x: torch.roll(x, (1, 2), (2, 3)),
    "rot90": lambda x: torch.rot90(x, 1, (2, 3)),
    "unfold": lambda x: F.unfold(x, 3, padding=1),
    "sliding unfold": lambda x: x.unfold(2, 3, 2),
    "fold": lambda x: F.fold(F.unfold(x, 2, stride=2), (6, 6), 2, stride=2),
    "chunk": lambda x: x.chunk(2, 1),
    "split": lambda x: x.split(3, 1),
    "torch.split sections": lambda x: torch.split(x, [1, 3], dim=1),
    "tensor_split": lambda x: torch.tensor_split(x, 3, 1),
    "unbind": lambda x: x.unbind(1),
    "iterate": lambda x: [row * 2 for row in x],
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "contiguous": lambda x: x.mT.contiguous(),
    "clone": lambda x: x.clone(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "to itself": lambda x: x.to(x.device).to(torch.float64).double(),
    "type_as": lambda x: x.type_as(x),
    "sum": lambda x: x.sum(),
    "sum axes": lambda x: x.sum((2, 3), keepdim=True),
    "mean": lambda x: x.mean(dim=1),
    "cumsum": lambda x: x.cumsum(1),
    "trace": lambda x: x[0, 0].trace(),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad value": lambda x: F.pad(x, (1, 2, 0, 1), value=3.0),
    "pad reflect": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "pad replicate": lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"),
    "pad circular": lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "avg_pool1d": lambda x: F.avg_pool1d(x[0], 2, stride=1, padding=1),
    "avg_pool3d": lambda x: F.avg_pool3d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x[0], 4),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, (2, 3, 1)),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest-exact": lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, size=(9, 4), mode="bilinear", align_corners=True),
    "bicubic": lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic"),
    "area": lambda x: F.interpolate(x, size=3, mode="area"),
    "antialias": lambda x: F.interpolate(x, size=3, mode="bilinear", antialias=True),
    "upsample module": torch.nn.Upsample(scale_factor=2, mode="bilinear"),
    "complex and back": lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(2, 4, 6, 3, 2)) * 1j),
    "atleast_3d": lambda x: torch.atleast_3d(x[0, 0]),
    "broadcast_to": lambda x: x[:1].broadcast_to(3, 4, 6, 6),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
    "max_pool2d indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "max_pool1d": lambda x: F.max_pool1d(x[0], 2),
    "max_pool3d": lambda x: F.max_pool3d(x, 2),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear(name: str) -> None:
    x = draw(3, *IMAGE)
    check(LINEAR[name], (x,))
    no_fallback(LINEAR[name], x)


@pytest.mark.parametrize("carry", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b: torch.cat([a, b], 1),
        lambda a, b: torch.stack((a, b), dim=2),
        lambda a, b: torch.cat([b, a, b], dim=-1),
        lambda a, b: torch.hstack([a, b]),
        lambda a, b: torch.broadcast_tensors(a[:1], b),
        lambda a, b: torch.meshgrid(a[0], b[1], indexing="ij"),
        lambda a, b: a.index_add(0, torch.tensor([0, 0, 1]), b),
        lambda a, b: torch.scatter(a, 0, torch.tensor([[0], [2], [1]]).expand(3, 4), b),
        lambda a, b: a.masked_fill(torch.arange(4) > 1, b.sum()),
        lambda a, b: torch.complex(a, b).abs(),
    ],
)
def test_joined(fn: Callable[..., Any], carry: tuple[bool, bool]) -> None:
    check(fn, (draw(4, 3, 4), draw(5, 3, 4)), carry)
