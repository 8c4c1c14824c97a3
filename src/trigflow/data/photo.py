"""One picture to edit, and what of it to draw anew, from the contents of files."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from trigflow.data.decode import CorruptImageError, fit, open_image, to_gray_or_rgb, to_tensor, upright
from trigflow.runtime.errors import UserError, on_one_line


def read_photo(
    photo: bytes, shape: Sequence[int], *, mask: bytes | None = None, keep: str | int | None = None, pixels: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """A picture, uint8 `(c, h, w)`, and a mask, bool `(h, w)` or None, of a model's shape, as `Model.edit` takes them.

    They are contents of PNG, JPEG or WebP files of one size. For a model of squares, one is cut from the middle and scaled to
    its size, with `keep=N` to `1/N` of it. A mask is white where to draw; without one, what is not opaque is to be drawn.
    Raises a UserError for what is no picture, or has more than so many pixels, and for a mask of another size.
    """
    if len(shape) != 3:
        raise UserError(f"a picture for a model that draws shape {tuple(shape)}; expected one of pictures; draw without one")
    image, alpha = _opened(photo, "picture", pixels)
    anew = alpha if mask is None else _opened(mask, "mask", pixels)[0].convert("L").point(lambda level: 255 * (level < 128))
    if anew is not None and anew.size != image.size:
        raise UserError(f"a mask of {anew.size} pixels for a picture of {image.size}; expected the same size; resize the mask")
    side = None if shape[1] != shape[2] else shape[1] // (keep if isinstance(keep, int) and 0 < keep <= shape[1] else 1)
    picture = to_tensor(fit(image.convert("L" if shape[0] == 1 or keep == "gray" else "RGB"), side, crop=True))
    if anew is None or (mask is None and keep is not None):
        return picture, None
    return picture, to_tensor(fit(anew, side, crop=True))[0] < 255  # what is but in part kept has no colour of its own


def _opened(data: bytes, what: str, pixels: int | None) -> tuple[Image.Image, Image.Image | None]:
    """A gray or RGB picture, upright, over white, and its opacity, unless it is opaque."""
    try:
        with open_image(data, what) as opened:
            if pixels is not None and opened.width * opened.height > pixels:
                raise UserError(f"a {what} of {opened.width}x{opened.height}; expected at most {pixels} pixels; shrink it")
            opened.load()
            image = upright(opened)
            clear = "A" in image.getbands() or "transparency" in image.info
            alpha = image.convert("RGBA").getchannel("A") if clear and not image.mode.startswith("I") else None
            return to_gray_or_rgb(image), None if alpha is None or alpha.getextrema() == (255, 255) else alpha
    except (UserError, MemoryError):
        raise
    except Exception as error:  # decoders meet bad bytes with any kind of exception
        reason = error.reason if isinstance(error, CorruptImageError) else on_one_line(error, 80)
        raise UserError(f"the {what} cannot be read ({reason}); expected a whole PNG, JPEG or WebP; give another") from None
