"""One image file to one array of bytes.

Whatever a PNG, JPEG or WebP may hold ends as 8-bit grayscale or RGB:

* EXIF orientation is applied, so that pictures stand as a viewer shows them.
* Transparency, also of a palette or of one colour, is composited over white.
* 16 bits become 8 by keeping the high byte.
* CMYK and palettes become RGB, and so does gray with alpha of 16 bits; 1-bit and gray with alpha of 8 bits become gray.
* Of an animation the first frame is taken.

Pictures of many shapes can each be brought to the nearest of several sizes of about equal area: aspect-ratio buckets. For a
square of side S they have a short side `s = S, S - q, S - 2q, ...` and a long side l, one either way round::

    q = largest power of two that is at most 64 and S / 8, but at least 1
    l = q floor(S^2 / (q s)),        l <= 2.5 s

so for S = 64: 64x64, 56x72, 48x80 and 40x96. A picture goes to the size whose ratio is nearest to its own, as a quotient; as
much of its middle is kept as has that ratio, and scaled.
"""

import contextlib
import functools
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from trigflow.runtime.errors import UserError, on_one_line

READERS: dict[bytes, type[Any]] = {b"\x89PNG\r\n\x1a\n": PngImageFile, b"\xff\xd8\xff": JpegImageFile, b"RIFF": WebPImageFile}
"""By the first bytes of a file. `Image.open` would do, but for its warnings: to mute them is not safe with threads."""
OTHER_FORMATS = {"GIF": b"GIF8", "BMP": b"BM", "TIFF": b"II*\0", "big-endian TIFF": b"MM\0*", "PDF": b"%PDF"}
"""What files of other formats begin with, to name them in messages."""
GRAY_MODES = ("1", "L", "LA", "La")
ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is to be turned; 1 for not at all."""


class CorruptImageError(Exception):
    """The bytes of a file are no complete image.

    Args:
        name: the file.
        reason: what is wrong with it, in a few words.
    """

    def __init__(self, name: str, reason: str = "it cannot be decoded") -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason


def sizes_differ(first: str, size: Sequence[int], name: str, other: Sequence[int]) -> UserError:
    """The error for images of two sizes, height and width each."""
    return UserError(
        f"images differ in size: {first!r} is {size[1]}x{size[0]} and {name!r} is {other[1]}x{other[0]} "
        "(width x height); expected one size; use --resize N"
    )


REMEDIES = {
    "images": ("PNG, JPEG or WebP", "copy or download them again", "replace them"),
    "latents": (".npy", "encode the images again", "encode the images again"),
}
"""Of what files are, what to do where all are damaged, and where some are."""


def check_corrupt(what: str, where: str, corrupt: Sequence[str], total: int, skip: bool = False) -> None:
    """Raise a UserError where some of so many images or latents are corrupt, or with `skip` all of them."""
    kind, get, mend = REMEDIES[what]
    listed = ", ".join(map(repr, corrupt[:3])) + (", ..." if len(corrupt) > 3 else "")
    faults = f"corrupt or truncated: {listed}; expected whole {kind} files"
    if len(corrupt) == total:
        raise UserError(f"all {total} {what} in {where!r} are {faults}; {get}")
    if corrupt and not skip:
        raise UserError(
            f"{len(corrupt)} of {total} {what} in {where!r} {faults}; {mend}, or leave them out with --skip-corrupt"
        )


def decode(data: bytes, name: str, *, channels: int | None, resize: int | None, crop: bool, buckets: bool = False) -> Tensor:
    """The image in `data`, uint8, shape `(c, h, w)`.

    Args:
        data: contents of a PNG, JPEG or WebP file.
        name: what to call it in messages.
        channels: 1 or 3 to convert to grayscale or RGB; None keeps grayscale images gray and makes all others RGB.
        resize: side of the square to make of it (see `fit`), or None.
        crop: see `fit`.
        buckets: make of it the nearest of `bucket_sizes(resize)` in place of the square.

    Raises:
        CorruptImageError: if it cannot be decoded to the end.
        UserError: if it has more pixels than Pillow takes to be safe.
    """
    with open_image(data, name) as image:
        try:
            image.load()
            plain = to_gray_or_rgb(upright(image))
            plain = fit(plain, nearest_bucket(plain.size, resize) if buckets and resize else resize, crop)
        except MemoryError:
            raise
        except Exception as error:  # decoders meet bad bytes with any kind of exception
            raise CorruptImageError(name, on_one_line(error, 80)) from error
    if channels is not None:
        plain = _convert(plain, "L" if channels == 1 else "RGB")
    return to_tensor(plain)


def open_image(data: bytes, name: str) -> Image.Image:
    """A PNG, JPEG or WebP file whose header was read, and no pixel yet.

    Raises:
        CorruptImageError: if it is none of these.
        UserError: if it has more pixels than Pillow takes to be safe.
    """
    reader = next((reader for signature, reader in READERS.items() if data.startswith(signature)), None)
    if reader is None:
        other = next((kind for kind, signature in OTHER_FORMATS.items() if data.startswith(signature)), None)
        found = f"it is a {other}, and no PNG, JPEG or WebP" if other else "it is no PNG, JPEG or WebP"
        raise CorruptImageError(name, found if data else "the file is empty")
    try:
        image = reader(io.BytesIO(data))
    except MemoryError:
        raise
    except Exception as error:
        raise CorruptImageError(name, on_one_line(error, 80)) from error
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and image.tile[0][-1] == "RGB;16B":  # of pixels the high bytes are read
        image.info["transparency"] = tuple(level >> 8 for level in clear)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise UserError(
            f"image {name!r} has more pixels than are safe to decode; expected at most {limit}; shrink or remove it"
        )
    return image


def fit(image: Image.Image, resize: int | tuple[int, int] | None, crop: bool) -> Image.Image:
    """Make an image `resize` by `resize` pixels, or of that width and height; None leaves it as it is.

    With `crop` it is scaled until it just covers these, and the centre kept; without, both sides are scaled on their own, which
    distorts what is not square. The filter is Lanczos: its support grows with the reduction, so it does not alias at any
    ratio (a box does unless the ratio is whole), and it keeps more fine detail than bilinear or bicubic. An image that has the
    size already keeps its exact pixels.
    """
    if resize is None:
        return image
    width, height = (resize, resize) if isinstance(resize, int) else resize
    if crop:
        w = min(image.width, max(1, round(image.height * width / height)))
        h = min(image.height, max(1, round(image.width * height / width)))
        left, top = (image.width - w) // 2, (image.height - h) // 2
        image = image.crop((left, top, left + w, top + h))
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS)


@functools.cache
def bucket_sizes(side: int) -> list[tuple[int, int]]:
    """Width and height of all buckets of the square of this side, from the narrowest to the widest; see the module. Raises a
    UserError if the side is no multiple of their step."""
    step = next(q for q in (64, 32, 16, 8, 4, 2, 1) if q <= side / 8 or q == 1)
    if side % step:
        raise UserError(f"resize {side} with buckets; expected a multiple of {step}; use --resize {side - side % step}")
    pairs = [(short, step * (side**2 // (step * short))) for short in range(side, 0, -step)]
    upright = [(short, long) for short, long in pairs if long <= 2.5 * short]
    return sorted({*upright, *(size[::-1] for size in upright)})


def nearest_bucket(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The bucket whose ratio is nearest to that of an image of this width and height; of two as near the squarer one."""

    def distance(bucket: tuple[int, int]) -> tuple[float, int]:
        one, other = size[0] * bucket[1], size[1] * bucket[0]
        return max(one, other) / min(one, other), abs(bucket[0] - bucket[1])

    return min(bucket_sizes(side), key=distance)


def to_tensor(image: Image.Image) -> Tensor:
    """A grayscale or RGB image as uint8, shape `(c, h, w)`."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, len(image.getbands())).permute(2, 0, 1)


def upright(image: Image.Image) -> Image.Image:
    """A picture as a viewer shows it."""
    if is_turned(image):
        with contextlib.suppress(Exception):
            return ImageOps.exif_transpose(image)
    return image


def is_turned(image: Image.Image) -> bool:
    """Whether the EXIF data say so. Where they cannot be read, no rotation is known."""
    with contextlib.suppress(Exception):
        return bool(image.getexif().get(ORIENTATION, 1) != 1)
    return False


def _convert(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def to_gray_or_rgb(image: Image.Image) -> Image.Image:
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
    return _convert(image, mode)
