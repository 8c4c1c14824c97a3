"""Images that stay in their folder, zip or tar shards, and are decoded as they are asked for."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trigflow.data.decode import CorruptImageError, decode
from trigflow.data.sources.files import Files
from trigflow.runtime.errors import UserError


@dataclass(frozen=True)
class Decoder:
    """Reads and decodes images by their number; the settings are those of `trigflow.data.decode.decode`."""

    files: Files
    channels: int | None
    resize: int | None
    crop: bool

    def __call__(self, index: int) -> Tensor:
        """One image, uint8, shape `(c, h, w)`.

        Raises:
            UserError, CorruptImageError: as `Files.read` and `decode`.
        """
        content, name = self.files.read(index), self.files.names[index]
        return decode(content, name, channels=self.channels, resize=self.resize, crop=self.crop)

    def several(self, indices: Sequence[int]) -> list[tuple[int, Tensor | None]]:
        """For each index the CRC-32 of the file and the image, or None where it is corrupt."""
        images: list[tuple[int, Tensor | None]] = []
        for index in indices:
            checksum = 0
            try:
                content, name = self.files.read(index), self.files.names[index]
                checksum = zlib.crc32(content)
                image = decode(content, name, channels=self.channels, resize=self.resize, crop=self.crop)
                images.append((checksum, image))
            except CorruptImageError:
                images.append((checksum, None))
        return images


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Images of equal size that have been seen to be whole.

    Attributes:
        decoder: reads them.
        size: height and width.
    """

    decoder: Decoder
    size: tuple[int, int]
    shards = None
    window = 1

    def __len__(self) -> int:
        return len(self.decoder.files)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The images at these indices `(b,)`, uint8 `(b, c, h, w)`.

        Raises:
            UserError: if one cannot be read or decoded any more.
        """
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
