"""Which blocks a mask leaves to visit, against every pair of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from tangent.helpers import draw
from trigflow.tangent.attention.blocks import blocks_of, from_flex, lists


def expected(mask: Tensor) -> Tensor:
    seen, free = (mask, mask) if mask.dtype == torch.bool else (mask > -math.inf, mask == 0)
    rows, columns = (math.ceil(n / 128) for n in mask.shape[2:])
    result = torch.zeros(*mask.shape[:2], rows, columns, dtype=torch.int8)
    for i in range(rows):
        for j in range(columns):
            some, every = (x[..., 128 * i : 128 * i + 128, 128 * j : 128 * j + 128].flatten(2) for x in (seen, free))
            result[..., i, j] = some.any(-1).to(torch.int8) + (some.any(-1) & every.all(-1))
    return result


@pytest.mark.parametrize(("rows", "columns"), [(256, 384), (300, 130), (1, 129)])
@pytest.mark.parametrize("added", [False, True])
def test_blocks_of_a_mask(rows: int, columns: int, added: bool) -> None:
    mask = draw(1, 2, 3, rows, columns) > 0
    mask[0, :, :128] = True
    mask[1, :, :, 100:] = False
    if added:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        mask[0, 0, 0, 0] = 1.0
    assert torch.equal(blocks_of(mask), expected(mask))


def test_a_broadcast_axis_stays_one() -> None:
    mask = (draw(1, 2, 1, 200, 200) > 0).expand(2, 5, -1, -1)
    assert blocks_of(mask).shape == (2, 1, 2, 2)
    assert torch.equal(blocks_of(mask).expand(2, 5, 2, 2), expected(mask))


def test_lists_name_the_blocks_that_are_not_empty() -> None:
    blocks = torch.tensor([[[[0, 1, 2], [0, 0, 0], [2, 0, 1]]]], dtype=torch.int8)
    found = lists(blocks)
    assert found.dtype == torch.int32
    count = found[0, 0, :, 0].tolist()
    assert count == [2, 0, 2]
    assert [found[0, 0, i, 1 : 1 + n].tolist() for i, n in enumerate(count)] == [[3, 4], [], [0, 5]]


@pytest.mark.parametrize("size", [128, 64])
def test_the_mask_of_flex_attention(size: int) -> None:
    made = create_block_mask(lambda b, h, q, k: (q // 70 >= k // 70) & (h < 1), 1, 2, 300, 200, "cpu", BLOCK_SIZE=size)
    mask, blocks = from_flex(made)
    q, k = torch.arange(300)[:, None] // 70, torch.arange(200) // 70
    assert torch.equal(mask, torch.stack([q >= k, torch.zeros(300, 200, dtype=torch.bool)])[None])
    assert torch.equal(blocks, expected(mask))


def test_a_block_mask_made_from_its_blocks() -> None:
    counts, indices = torch.tensor([[[1, 2]]], dtype=torch.int32), torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    made = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=128, seq_lengths=(200, 256))
    mask, blocks = from_flex(made)
    assert mask.shape == (1, 1, 200, 256)
    assert not mask[..., :128, :128].any()
    assert blocks.tolist() == [[[[0, 2], [2, 2]]]]
