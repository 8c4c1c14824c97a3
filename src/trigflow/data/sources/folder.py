"""Images of a folder, a zip or tar shards, gone through before training starts, so that every fault in them is found first.

They stay in memory, decoded, if they fit. Otherwise they stay where they are and are decoded as training asks for them.
"""

import os
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from trigflow.data.buckets import in_buckets
from trigflow.data.caption_files import find_captions
from trigflow.data.dataset import ImageDataset, digest_of
from trigflow.data.decode import check_corrupt, sizes_differ
from trigflow.data.labels import find_labels
from trigflow.data.loader import in_order
from trigflow.data.rows import Decoder, ImageRows, Scan, chunks_of, scan
from trigflow.data.sources.files import ENDINGS, Files
from trigflow.runtime.errors import UserError


class MemoryLimitError(UserError):
    """Images that take more memory than they may."""


class ImageStack:
    """Equal-sized images gathered into one uint8 tensor: grayscale until the first RGB image comes, RGB from then on.

    Args:
        capacity: how many images may come.
        memory_limit_gib: largest size of the tensor, in GiB.
    """

    def __init__(self, capacity: int, memory_limit_gib: float) -> None:
        self.capacity = capacity
        self.memory_limit_gib = memory_limit_gib
        self.first = ""
        self.count = 0
        self._images = torch.empty(0, 0, 0, 0, dtype=torch.uint8)

    @property
    def images(self) -> Tensor:
        """What was added so far, uint8, shape `(count, c, h, w)`."""
        return self._images[: self.count]

    def add(self, name: str, image: Tensor) -> None:
        """Append one image, uint8, shape `(c, h, w)` with c 1 or 3.

        Raises:
            UserError: if its size is not that of the first image.
            MemoryLimitError: if the memory limit is passed.
        """
        channels, height, width = image.shape
        if self.count == 0:
            self.first = name
            self._images = self._allocate(channels, height, width)
        _, stored_channels, *size = self._images.shape
        if [height, width] != size:
            raise sizes_differ(self.first, size, name, (height, width))
        if channels > stored_channels:
            gray = self.images
            self._images = self._allocate(channels, height, width)
            self._images[: self.count] = gray
        self._images[self.count] = image
        self.count += 1

    def check_memory(self, channels: int, height: int, width: int) -> None:
        """Raise a MemoryLimitError if `capacity` images of this size would pass the memory limit."""
        gib = self.capacity * channels * height * width / 2**30
        if gib > self.memory_limit_gib:
            raise MemoryLimitError(
                f"{self.capacity} images of {width}x{height} with {channels} channel(s) take {gib:.3g} GiB; expected at most "
                f"{self.memory_limit_gib:.3g} GiB in memory; use --resize N with a smaller N"
            )

    def _allocate(self, channels: int, height: int, width: int) -> Tensor:
        self.check_memory(channels, height, width)
        return torch.empty(self.capacity, channels, height, width, dtype=torch.uint8)


def read_images(
    files: Files,
    *,
    resize: int | None,
    crop: bool,
    channels: int | None,
    skip_corrupt: bool,
    progress: bool,
    memory_limit_gib: float,
    workers: int,
    captions: bool,
    buckets: bool,
) -> ImageDataset:
    """The images among these files; the arguments and errors are those of `trigflow.data.open_dataset`."""
    images = image_files(files)
    labels, class_names = find_labels(files, images.names)
    written = find_captions(files, images.names) if captions else None
    decoder = Decoder(images, channels, resize, crop, buckets)
    content: dict[str, Any] = {}

    def check(corrupt: list[int]) -> None:
        check_corrupt("images", images.where, [images.names[i] for i in corrupt], len(images), skip_corrupt)

    if not buckets:
        with suppress(MemoryLimitError):
            stack, corrupt, checksums = _into_memory(decoder, memory_limit_gib, workers, progress)
            check(corrupt)
            content = {"values": stack.images, "digest": digest_of(checksums)}
    if not content:
        found = scan(decoder, workers=workers, progress=progress)
        corrupt = (found.channels == 0).nonzero()[:, 0].tolist()
        check(corrupt)
        content = in_buckets(decoder, found, memory_limit_gib, workers) if buckets else _left_in_place(decoder, found)
        content["digest"] = digest_of(found.checksums)
    kept = torch.ones(len(images), dtype=torch.bool)
    kept[corrupt] = False
    return ImageDataset(
        name=os.path.basename(os.path.abspath(files.where)),
        labels=None if labels is None else torch.tensor(labels)[kept],
        class_names=class_names,
        skipped=tuple(images.names[index] for index in corrupt),
        captions=None if written is None else written.only(kept.nonzero()[:, 0]),
        **content,
    )


def image_files(files: Files) -> Files:
    """Those among the files that have the ending of an image. Raises a UserError if there are none."""
    images = files.only(files.images())
    if len(images) == 0:
        raise UserError(
            f"no images found in {files.where!r}; expected files ending in {', '.join(ENDINGS)}; "
            "check the path or convert the images"
        )
    return images


def _into_memory(decoder: Decoder, limit_gib: float, workers: int, progress: bool) -> tuple[ImageStack, list[int], Tensor]:
    """All images that can be decoded, the indices of the others, and the CRC-32 of every file, int64 `(n,)`."""
    names = decoder.files.names
    stack, corrupt, checksums = ImageStack(len(names), limit_gib), list[int](), list[int]()
    if decoder.resize is not None:
        stack.check_memory(decoder.channels or 1, decoder.resize, decoder.resize)
    pieces = [range(1), *chunks_of(len(names), first=1)]  # one image tells whether they will fit
    with tqdm(total=len(names), desc="reading images", unit="image", disable=not progress) as bar:
        for indices, images in zip(pieces, in_order(decoder.several, pieces, workers), strict=True):
            for index, (checksum, image) in zip(indices, images, strict=True):
                checksums.append(checksum)
                if image is None:
                    corrupt.append(index)
                else:
                    stack.add(names[index], image)
            bar.update(len(indices))
    return stack, corrupt, torch.tensor(checksums)


def _left_in_place(decoder: Decoder, found: Scan) -> dict[str, Any]:
    """What a data set holds of images that are not in memory: the whole ones among those that were scanned."""
    whole = found.channels.nonzero()[:, 0]
    sizes, first = found.sizes[whole], int(whole[0])
    others = (sizes != sizes[0]).any(dim=1).nonzero()
    if len(others):
        other = int(whole[others[0, 0]])
        names = decoder.files.names
        raise sizes_differ(names[first], found.sizes[first].tolist(), names[other], found.sizes[other].tolist())
    channels, (height, width) = int(found.channels.max()), sizes[0].tolist()
    files = decoder.files.only(whole.tolist()) if len(whole) < len(decoder.files) else decoder.files
    return {
        "values": torch.empty(0, channels, height, width, dtype=torch.uint8),
        "rows": ImageRows(replace(decoder, files=files, channels=channels), (height, width)),
        "counts": found.counts_of(channels),
    }
