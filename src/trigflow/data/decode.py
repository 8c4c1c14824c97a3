"""One image file to one array of bytes.

Whatever a PNG, JPEG or WebP may hold ends as 8-bit grayscale or RGB:

* EXIF orientation is applied, so that pictures stand as a viewer shows them.
* Transparency, also of a palette or of one colour, is composited over white.
* 16 bits become 8 by keeping the high byte.
* CMYK and palettes become RGB, and so does gray with alpha of 16 bits; 1-bit and gray with alpha of 8 bits become gray.
* Of an animation the first frame is taken.
"""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from trigflow.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP")
GRAY_MODES = ("1", "L", "LA", "La")


class CorruptImageError(Exception):
    """The bytes of a file are no complete image."""


def decode(data: bytes, name: str, *, channels: int | None, resize: int | None, crop: bool) -> Tensor:
    """The image in `data`, uint8, shape `(c, h, w)`.

    Args:
        data: contents of a PNG, JPEG or WebP file.
        name: what to call it in messages.
        channels: 1 or 3 to convert to grayscale or RGB; None keeps grayscale images gray and makes all others RGB.
        resize: side of the square to make of it (see `fit`), or None.
        crop: see `fit`.

    Raises:
        CorruptImageError: if it cannot be decoded to the end.
        UserError: if it has more pixels than Pillow takes to be safe.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                image.load()
                plain = fit(_to_gray_or_rgb(_upright(image)), resize, crop)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(
            f"image {name!r} has more pixels than are safe to decode; expected at most {Image.MAX_IMAGE_PIXELS}; "
            "shrink or remove it"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders meet bad bytes with any kind of exception
        raise CorruptImageError(name) from error
    if channels is not None:
        plain = plain.convert("L" if channels == 1 else "RGB")
    return to_tensor(plain)


def fit(image: Image.Image, resize: int | None, crop: bool) -> Image.Image:
    """Make an image `resize` by `resize` pixels; None leaves it as it is.

    With `crop` the short side is scaled to `resize` and the centre kept; without, both sides are scaled on their own, which
    distorts what is not square. The filter is Lanczos: its support grows with the reduction, so it does not alias at any
    ratio (a box does unless the ratio is whole), and it keeps more fine detail than bilinear or bicubic. An image that has the
    size already keeps its exact pixels.
    """
    if resize is None:
        return image
    if crop:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if image.size == (resize, resize):
        return image
    return image.resize((resize, resize), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """A grayscale or RGB image as uint8, shape `(c, h, w)`."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    # The pixels are whole at this point: metadata that cannot be read only means that no rotation is known.
    with contextlib.suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


def _to_gray_or_rgb(image: Image.Image) -> Image.Image:
    """Mode "L" for images that are stored as grayscale, "RGB" for all others; alpha composited over white."""
    transparency = image.info.get("transparency")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        high = (values >> 8).astype(np.uint8)
        return Image.fromarray(high if transparency is None else np.where(values == transparency, np.uint8(255), high))
    mode = "L" if image.mode in GRAY_MODES else "RGB"
    if "A" in image.getbands() or transparency is not None:
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image.convert("RGBA"))
    return image.convert(mode)
