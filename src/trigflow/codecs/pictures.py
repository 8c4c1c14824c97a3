"""Images out: uint8 tensors `(n, c, h, w)` to PNG grids and files."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from trigflow.runtime.errors import UserError
from trigflow.runtime.files import replacing
from trigflow.runtime.places import check_place

S = TypeVar("S", bound="DrawnPictures")


def make_grid(images: Tensor, columns: int | None = None, *, gap: int = 1, scale: int | None = None) -> Image.Image:
    """Images side by side on a white sheet.

    Args:
        images: uint8 `(n, c, h, w)` with 1 or 3 channels.
        columns: images per row; as square as possible by default.
        gap: pixels between images, before scaling.
        scale: whole-number magnification without smoothing; by default small images are magnified to about 32 pixels.

    Raises:
        UserError: for other shapes or types.
    """
    if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[1] not in (1, 3) or not len(images):
        raise UserError(
            f"cannot draw images of shape {tuple(images.shape)} and type {images.dtype}; expected uint8 (n, 1 or 3, h, w); "
            "convert them first"
        )
    if columns is not None and columns < 1:
        raise UserError(f"{columns} images per row; expected at least 1; change --columns")
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = torch.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images.cpu()):
        top, left = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        sheet[:, top : top + h, left : left + w] = image
    picture = to_picture(sheet)
    scale = scale or max(1, 32 // max(h, w))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def to_picture(image: Tensor) -> Image.Image:
    """One uint8 image `(c, h, w)`, 1 or 3 channels, as a Pillow image."""
    array = image.cpu().numpy()
    return Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))


PICTURES = (".png", ".webp", ".jpg", ".jpeg")
"""Endings of the files that are written."""
OTHERS = (".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic", ".jp2", ".svg", ".pdf")
"""Endings of pictures that are not, and that no folder is likely to have."""
NUMBERED = re.compile(r"\d{6,}\.png")


def check_ending(path: Path) -> None:
    """Raise a UserError unless `save_picture` can write a file with the ending of `path`."""
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"cannot write '{path}': unknown image ending; expected .png, .webp or .jpg; change --out")


def save_picture(picture: Image.Image, path: str | Path) -> Path:
    """Write a picture atomically; the ending of `path` (.png, .webp, .jpg) decides the format. Raises a UserError for an
    unknown ending or a folder that cannot be written."""
    path = check_place(path, "file")
    check_ending(path)
    with replacing(path) as temporary:
        try:
            picture.save(temporary)
        except ValueError as error:
            raise UserError(
                f"cannot write '{path}' ({error}); expected a picture that fits {path.suffix}; write a .png"
            ) from None
    return path


def save_grid(images: Tensor, path: str | Path, columns: int | None = None) -> Path:
    """`make_grid` to a file; see there."""
    return save_picture(make_grid(images, columns), path)


def save_images(images: Tensor, folder: str | Path, names: Sequence[str] | None = None) -> list[Path]:
    """Every image to its own PNG, `000000.png` onwards or `names`. Raises a UserError for a folder that cannot be written, or
    that holds numbered images beyond these, of another call."""
    if names is None:
        check_images(folder, len(images))
    names = names or [f"{i:06d}.png" for i in range(len(images))]
    return [save_picture(to_picture(image), Path(folder) / name) for image, name in zip(images, names, strict=True)]


def check_images(folder: str | Path, num: int) -> None:
    """Check before they are drawn that so many numbered images can be written into a folder; see `save_images`."""
    folder = check_place(folder, "folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in names if NUMBERED.fullmatch(name) and int(name[:-4]) >= num]
    if others:
        raise UserError(
            f"'{folder}' holds {len(others)} images of another call, such as {others[0]}, beyond the {num} to be written; "
            "expected a folder without; remove them, or choose another --out"
        )


def is_folder(path: str | Path) -> bool:
    """Whether a path to write images to means a folder of them: with `/` at its end, or without the ending of a picture."""
    ending = Path(path).suffix.lower()
    return str(path).endswith(("/", os.sep)) or ending not in (*PICTURES, *OTHERS)


def label_panels(panels: Mapping[str, Tensor], columns: int = 10) -> Image.Image:
    """Several grids with a line of text above each, two of them side by side, on one white sheet.

    Args:
        panels: text to images uint8 `(n, c, h, w)`, all of one shape.
        columns: images per row of each grid.
    """
    grids = {text: make_grid(images, columns).convert("RGB") for text, images in panels.items()}
    width = max(grid.width for grid in grids.values())
    height = max(grid.height for grid in grids.values())
    margin, line, across = 12, 26, 2
    rows = math.ceil(len(grids) / across)
    sheet = Image.new("RGB", (across * (width + margin) + margin, rows * (height + line + margin) + margin), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=17)
    for i, (text, grid) in enumerate(grids.items()):
        left = margin + (i % across) * (width + margin)
        top = margin + (i // across) * (height + line + margin)
        draw.text((left + 2, top), text, fill="black", font=font)
        sheet.paste(grid, (left, top + line))
    return sheet


class DrawnPictures:
    """What most codecs have in common: what is drawn are images, uint8 `(n, c, h, w)`, or can be shown as such by `pictures`,
    and nothing beside the codec is needed to draw. See `trigflow.codecs.Codec` for what each member is."""

    def pictures(self, drawn: Tensor) -> Tensor:
        """The images themselves."""
        return drawn

    def seen(self: Any, pictures: Tensor) -> Tensor:
        """The same as `encode`, where stored data are pictures."""
        if not self.pictured or len(self.shape) != 3:
            raise UserError("a picture for a model whose data are no pictures; expected a model of pixels; use one")
        encoded: Tensor = self.encode(pictures)
        return encoded

    def preview(self, drawn: Tensor, columns: int | None = None) -> Image.Image:
        """Images side by side; see `make_grid`."""
        return make_grid(self.pictures(drawn), columns)

    def check_save(self, path: str | Path, num: int) -> None:
        """See that there is a place for a grid, or for a folder of `num` images."""
        if is_folder(path):
            check_images(path, num)
        else:
            check_ending(check_place(path, "file"))

    def save(self, drawn: Tensor, path: str | Path, columns: int | None = None) -> str:
        """A grid, or a folder of one PNG an image, as the path says; see `is_folder`."""
        if is_folder(path):
            return f"{len(save_images(self.pictures(drawn), path))} images in {Path(path)}"
        return str(save_grid(self.pictures(drawn), path, columns))

    def prepare(self, device: torch.device | str | None = None) -> None:
        """Nothing is needed."""

    def component(self) -> Any:
        """None is needed."""

    def with_component(self: S, module: Any) -> S:
        """Itself."""
        return self

    def with_autoencoder(self: S, name: str) -> S:
        """Raise a UserError: none is needed."""
        raise UserError("an autoencoder for a model without latents; expected a model of latents; drop --vae")

    def normalized(self, mean: list[float], std: list[float]) -> list[tuple[str, float, float]]:
        """Nothing is known."""
        return []

    def describe(self) -> dict[str, Any]:
        """Nothing but what every codec has."""
        return {}
