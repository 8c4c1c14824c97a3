"""A folder or zip of images, read whole before training starts, so that every fault in it is found first."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from trigflow.data.dataset import ImageDataset
from trigflow.data.decode import CorruptImageError, decode
from trigflow.data.files import open_files
from trigflow.data.labels import find_labels
from trigflow.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


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
            UserError: if its size is not that of the first image, or the memory limit is passed.
        """
        channels, height, width = image.shape
        if self.count == 0:
            self.first = name
            self._images = self._allocate(channels, height, width)
        _, stored_channels, *size = self._images.shape
        if [height, width] != size:
            raise UserError(
                f"images differ in size: {self.first!r} is {size[1]}x{size[0]} and {name!r} is {width}x{height} "
                "(width x height); expected one size; use --resize N"
            )
        if channels > stored_channels:
            gray = self.images
            self._images = self._allocate(channels, height, width)
            self._images[: self.count] = gray
        self._images[self.count] = image
        self.count += 1

    def check_memory(self, channels: int, height: int, width: int) -> None:
        """Raise a UserError if `capacity` images of this size would pass the memory limit."""
        gib = self.capacity * channels * height * width / 2**30
        if gib > self.memory_limit_gib:
            raise UserError(
                f"{self.capacity} images of {width}x{height} with {channels} channel(s) take {gib:.3g} GiB; expected at most "
                f"{self.memory_limit_gib:.3g} GiB in memory; use --resize N with a smaller N"
            )

    def _allocate(self, channels: int, height: int, width: int) -> Tensor:
        self.check_memory(channels, height, width)
        return torch.empty(self.capacity, channels, height, width, dtype=torch.uint8)


def read_images(
    path: str,
    *,
    resize: int | None,
    crop: bool,
    channels: int | None,
    skip_corrupt: bool,
    progress: bool,
    memory_limit_gib: float,
) -> ImageDataset:
    """The images of the folder or zip at `path`; the arguments and errors are those of `trigflow.data.open_dataset`."""
    with open_files(path) as files:
        names = [name for name in files.names if name.lower().endswith(ENDINGS)]
        if not names:
            raise UserError(
                f"no images found in {path!r}; expected files ending in {', '.join(ENDINGS)}; "
                "check the path or convert the images"
            )
        labels, class_names = find_labels(files, names)
        stack = ImageStack(len(names), memory_limit_gib)
        if resize is not None:
            stack.check_memory(channels or 1, resize, resize)
        kept: list[int] = []
        corrupt: list[str] = []
        for index, name in enumerate(tqdm(names, desc="reading images", unit="image", disable=not progress)):
            try:
                image = decode(files.read(name), name, channels=channels, resize=resize, crop=crop)
            except CorruptImageError:
                corrupt.append(name)
                continue
            stack.add(name, image)
            kept.append(index)
    if corrupt:
        _check_corrupt(path, corrupt, len(names), skip_corrupt)
    return ImageDataset(
        name=os.path.basename(os.path.abspath(path)),
        images=stack.images,
        labels=None if labels is None else torch.tensor([labels[index] for index in kept]),
        class_names=class_names,
        skipped=tuple(corrupt),
    )


def _check_corrupt(path: str, corrupt: Sequence[str], total: int, skip_corrupt: bool) -> None:
    listed = ", ".join(repr(name) for name in corrupt[:3]) + (", ..." if len(corrupt) > 3 else "")
    if len(corrupt) == total:
        raise UserError(
            f"all {total} images in {path!r} are corrupt or truncated: {listed}; "
            "expected whole PNG, JPEG or WebP files; copy or download them again"
        )
    if not skip_corrupt:
        raise UserError(
            f"{len(corrupt)} of {total} images in {path!r} corrupt or truncated: {listed}; "
            "expected whole PNG, JPEG or WebP files; replace them, or leave them out with --skip-corrupt"
        )
