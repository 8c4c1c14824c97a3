"""Images that stay in their folder, zip or tar shards, and are decoded as they are asked for.

One pass over them tells which are whole, what they are like, and how often each byte occurs. It decodes every image to its end,
so that a fault shows before training and not in its tenth hour. What it finds is kept in the user's cache folder
(`trigflow.data.cache`).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from trigflow.codecs.pixels import count_values
from trigflow.data.cache import Arrays, remembered
from trigflow.data.decode import CorruptImageError, decode
from trigflow.data.loader import in_order
from trigflow.data.sources.files import Files
from trigflow.runtime.errors import UserError


@dataclass(frozen=True)
class Decoder:
    """Reads and decodes images by their number; the settings are those of `trigflow.data.decode.decode`."""

    files: Files
    channels: int | None
    resize: int | None
    crop: bool
    buckets: bool = False

    def __call__(self, index: int) -> Tensor:
        """One image, uint8, shape `(c, h, w)`; errors as `Files.read` and `decode`."""
        return self._decoded(index, self.files.read(index))

    def whole(self, index: int) -> tuple[Tensor, bytes]:
        """One image, which has to be whole, and the content of its file. Raises a UserError if it is not, or cannot be read."""
        try:
            content = self.files.read(index)
            return self._decoded(index, content), content
        except CorruptImageError as error:
            raise UserError(
                f"image {error.name!r} in {self.files.where!r} is corrupt or truncated; expected a whole PNG, JPEG or WebP "
                "file; replace or remove it"
            ) from None

    def several(self, indices: Sequence[int]) -> list[tuple[int, Tensor | None]]:
        """For each index the CRC-32 of the file and the image, or None where it is corrupt."""
        images: list[tuple[int, Tensor | None]] = []
        for index in indices:
            checksum, image = 0, None
            with suppress(CorruptImageError):
                content = self.files.read(index)
                checksum = zlib.crc32(content)
                image = self._decoded(index, content)
            images.append((checksum, image))
        return images

    def _decoded(self, index: int, content: bytes) -> Tensor:
        name = self.files.names[index]
        return decode(content, name, channels=self.channels, resize=self.resize, crop=self.crop, buckets=self.buckets)


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Images of equal size that have been seen to be whole. The size is height and width."""

    decoder: Decoder
    size: tuple[int, int]
    shards = None
    window = 1

    def __len__(self) -> int:
        return len(self.decoder.files)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The images at these indices `(b,)`, uint8 `(b, c, h, w)`. Raises a UserError if one cannot be read or decoded any
        more."""
        images = torch.empty(len(indices), self.decoder.channels or 3, *self.size, dtype=torch.uint8)
        for row, index in zip(images, indices.tolist(), strict=True):
            try:
                image = self.decoder(index)
            except CorruptImageError as error:
                raise self._changed(index, error.reason) from error
            if image.shape != row.shape:
                raise self._changed(index, f"it is now {image.shape[2]}x{image.shape[1]}")
            row.copy_(image)
        return images

    def only(self, indices: Tensor) -> ImageRows:
        """These images alone."""
        return replace(self, decoder=replace(self.decoder, files=self.decoder.files.only(indices.tolist())))

    def _changed(self, index: int, reason: str) -> UserError:
        files = self.decoder.files
        return UserError(
            f"image {files.names[index]!r} in {files.where!r} has changed since it was indexed ({reason}); expected the image "
            "that was there; restore it, or look at the data with: trigflow data check"
        )


CHUNK = 64
"""Images that a worker is given at a time."""


@dataclass(frozen=True)
class Scan:
    """What was found, for n images.

    Attributes:
        sizes: height and width of each, int64, shape `(n, 2)`; 0 for those that are corrupt.
        channels: 1 or 3 of each, int64, shape `(n,)`; 0 for those that are corrupt.
        counts: how often each byte occurs in each channel of the grayscale images, and of the others, int64, shape `(4, 256)`.
        checksums: CRC-32 of each file, int64, shape `(n,)`.
    """

    sizes: Tensor
    channels: Tensor
    counts: Tensor
    checksums: Tensor

    def counts_of(self, channels: int) -> Tensor:
        """How often each byte occurs in each channel when all images have this many; int64, shape `(channels, 256)`."""
        return self.counts[:1] if channels == 1 else self.counts[1:] + self.counts[:1]


def scan(decoder: Decoder, *, workers: int, progress: bool) -> Scan:
    """Decode all images of the decoder's files. Raises a UserError if a file cannot be read, or has more pixels than are
    safe."""
    files = decoder.files
    subject = ["scan", files.where, decoder.channels, decoder.resize, decoder.crop, *["buckets"] * decoder.buckets]
    found = remembered(subject, [*files.identity(), len(files)], lambda: _scan(decoder, workers, progress))
    return Scan(*(torch.from_numpy(found[name]) for name in ("sizes", "channels", "counts", "checksums")))


def chunks_of(count: int, first: int = 0) -> list[range]:
    """`first ... count - 1` in pieces for workers."""
    return [range(start, min(start + CHUNK, count)) for start in range(first, count, CHUNK)]


def _scan(decoder: Decoder, workers: int, progress: bool) -> Arrays:
    shapes, checksums, counts = [], [], np.zeros((4, 256), dtype=np.int64)
    with tqdm(total=len(decoder.files), desc="indexing images", unit="image", disable=not progress) as bar:
        for found, counted in in_order(functools.partial(_examine, decoder), chunks_of(len(decoder.files)), workers):
            checksums += [checksum for checksum, _ in found]
            shapes += [shape for _, shape in found]
            counts += counted
            bar.update(len(found))
    table = np.array(shapes, dtype=np.int64)
    return {"channels": table[:, 0], "sizes": table[:, 1:], "counts": counts, "checksums": np.array(checksums)}


def _examine(decoder: Decoder, indices: Sequence[int]) -> tuple[list[tuple[int, tuple[int, ...]]], npt.NDArray[np.int64]]:
    """Checksums and shapes of some images, and the counts of all of them."""
    images = decoder.several(indices)
    counts = np.zeros((4, 256), dtype=np.int64)
    for channels, rows in ((1, counts[:1]), (3, counts[1:])):
        values = [image.flatten(1) for _, image in images if image is not None and len(image) == channels]
        if values:
            rows += count_values(torch.cat(values, dim=1)[None, :, :, None]).numpy()
    return [(checksum, (0, 0, 0) if image is None else tuple(image.shape)) for checksum, image in images], counts
