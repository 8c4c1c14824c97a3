"""Which blocks of keys each block of queries sees, so that kernels pass over the others."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Queries and keys of a block."""


def blocks_of(mask: Tensor) -> Tensor:
    """What a mask lets the blocks of queries see of the blocks of keys.

    Args:
        mask: boolean (True: seen) or added to the scores, `(b, h, l, s)`.

    Returns:
        int8 `(b or 1, h or 1, ceil(l / 128), ceil(s / 128))`, with 1 for an axis along which the mask was broadcast:
        0 where nothing is seen, 2 where the mask changes nothing, else 1.
    """
    for axis in (0, 1):
        if mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    some, every = (mask, mask) if mask.dtype == torch.bool else (mask != -math.inf, mask == 0)
    some, every = _tiles(some, False).any(-1), _tiles(every, True).all(-1)
    return some.to(torch.int8) + (some & every)


def _tiles(x: Tensor, edge: bool) -> Tensor:
    """`(b, h, l, s)` as `(b, h, blocks of l, blocks of s, numbers in a block)`."""
    rows, columns = (-n % BLOCK for n in x.shape[2:])
    x = F.pad(x, (0, columns, 0, rows), value=edge) if rows or columns else x
    return x.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(3, 4).flatten(4)


def lists(blocks: Tensor) -> Tensor:
    """For each row of `blocks` the number n of blocks to visit, then their indices j, as `2 j + (1 if masked)`, n of them.

    Returns:
        int32 `(b or 1, h or 1, rows, 1 + columns)`.
    """
    order = torch.argsort((blocks == 0).to(torch.int8), dim=-1, stable=True)
    entries = 2 * order + (blocks.gather(-1, order) == 1)
    return torch.cat([(blocks > 0).sum(-1, keepdim=True), entries], -1).to(torch.int32)


def from_flex(block_mask: Any) -> tuple[Tensor, Tensor]:
    """The boolean mask `(b or 1, h or 1, l, s)` for which a `BlockMask` of `flex_attention` stands, and its `blocks_of`.

    Call it once for all steps: it evaluates the function of the mask for every pair.
    """
    from torch.nn.attention.flex_attention import create_mask

    batch, heads, rows, columns = block_mask.shape
    mask = create_mask(block_mask.mask_mod, batch, heads, rows, columns, device=block_mask.kv_indices.device)
    seen = block_mask.to_dense() > 0
    for axis, size in zip((-2, -1), block_mask.BLOCK_SIZE, strict=True):
        seen = seen.repeat_interleave(size, axis)
    mask = mask & seen[..., :rows, :columns]
    return mask, blocks_of(mask)
