"""Images of the sizes of `trigflow.data.decode`, which training sees in batches of one (`trigflow.data.order.BucketOrder`).

To everything else they are squares: drawing, and the codec. Evaluation opens the data anew, as squares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trigflow.data.loader import in_order
from trigflow.data.rows import Decoder, ImageRows, Scan, chunks_of
from trigflow.runtime.errors import UserError


@dataclass(frozen=True, eq=False)
class BucketRows:
    """Images of several sizes, in memory or left in place size by size.

    Attributes:
        parts: of each size all images, uint8 `(n, c, h, w)`, or what reads them.
        groups: in which part each image is, int64, shape `(n,)`; batches are of one.
        places: and where in it, int64, shape `(n,)`.
    """

    parts: tuple[Tensor | ImageRows, ...]
    groups: Tensor
    places: Tensor
    shards = None
    window = 1

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The images at these indices `(b,)`, uint8 `(b, c, h, w)`. Raises a UserError if they are of several sizes, or cannot
        be read any more."""
        groups = self.groups[indices].unique()
        if len(groups) > 1:
            raise UserError(
                f"images of {len(groups)} sizes in one batch; expected those of one; take them in the order of "
                "dataset.order, or open the data without buckets"
            )
        return self.parts[int(groups.sum())][self.places[indices]]

    def only(self, indices: Tensor) -> BucketRows:
        """These images alone."""
        return replace(self, groups=self.groups[indices], places=self.places[indices])


def in_buckets(decoder: Decoder, found: Scan, memory_limit_gib: float, workers: int) -> dict[str, Any]:
    """What a data set holds of the whole ones among images that were scanned."""
    whole, channels, side = found.channels.nonzero()[:, 0], int(found.channels.max()), decoder.resize or 1
    sizes, groups = found.sizes[whole].unique(dim=0, return_inverse=True)
    places = torch.empty_like(groups)
    parts: list[Tensor | ImageRows] = []
    fits = channels * int(found.sizes[whole].prod(dim=1).sum()) / 2**30 <= memory_limit_gib
    for group, (height, width) in enumerate(sizes.tolist()):
        members = (groups == group).nonzero()[:, 0]
        places[members] = torch.arange(len(members))
        files = decoder.files.only(whole[members].tolist())
        rows = ImageRows(replace(decoder, files=files, channels=channels), (height, width))
        parts.append(_into_memory(rows, workers) if fits else rows)
    return {
        "values": torch.empty(0, channels, side, side, dtype=torch.uint8),
        "rows": BucketRows(tuple(parts), groups, places),
        "counts": found.counts_of(channels),
    }


def _into_memory(rows: ImageRows, workers: int) -> Tensor:
    pieces = in_order(rows.decoder.several, chunks_of(len(rows)), workers)
    images = [image for piece in pieces for _, image in piece]
    for i, image in enumerate(images):
        if image is None or image.shape[1:] != rows.size:  # it has changed by now, which its rows say
            images[i] = rows[torch.tensor([i])][0]
    return torch.stack(images)  # type: ignore[arg-type] # none is None
