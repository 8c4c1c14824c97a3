"""Pictures as bytes."""

import io
import json
import math
import struct
from typing import Any

import numpy as np
from torch import Tensor

from trigflow.codecs.pictures import make_grid

MEDIA_TYPES = {"png": "image/png", "webp": "image/webp", "npy": "application/octet-stream"}


def columns_of(count: int) -> int:
    """Pictures in a row of a sheet of `count`."""
    return math.ceil(math.sqrt(count))


def encode(images: Tensor, format: str) -> bytes:
    """uint8 `(n, c, h, w)` as bytes.

    ==========  ==========================================================================================
    raw         the pixels, in the order of the shape
    npy         the same with NumPy's header
    png, webp   one sheet, `columns_of(n)` pictures a row without gaps, white where there are none; lossless
    ==========  ==========================================================================================
    """
    buffer = io.BytesIO()
    if format == "raw":
        return images.contiguous().numpy().tobytes()
    if format == "npy":
        np.save(buffer, images.contiguous().numpy(), allow_pickle=False)
    else:
        options = {"compress_level": 1} if format == "png" else {"lossless": True, "quality": 0}
        make_grid(images, columns_of(len(images)), gap=0, scale=1).save(buffer, format, **options)
    return buffer.getvalue()


def pack(header: dict[str, Any], content: bytes) -> bytes:
    """A frame: length of the header in 4 bytes, little-endian, the header as JSON, the content."""
    head = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<I", len(head)) + head + content


def unpack(frame: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and content of a frame: the inverse of `pack`."""
    (length,) = struct.unpack_from("<I", frame)
    return json.loads(frame[4 : 4 + length]), frame[4 + length :]
