"""Pictures against pixels placed one by one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from trigflow.codecs.pictures import label_panels, make_grid, save_grid, save_images, save_picture, to_picture
from trigflow.runtime.errors import UserError


def random_images(n: int, c: int, h: int, w: int) -> Tensor:
    return torch.randint(0, 256, (n, c, h, w), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def placed(images: Tensor, columns: int, gap: int, scale: int) -> np.ndarray[Any, Any]:
    """The sheet `(height, width, 3)`, every pixel looked up on its own."""
    n, c, h, w = images.shape
    rows = math.ceil(n / columns)
    height, width = (rows * (h + gap) + gap) * scale, (columns * (w + gap) + gap) * scale
    sheet = np.full((height, width, 3), 255, dtype=np.uint8)
    for y in range(height):
        for x in range(width):
            (row, dy), (column, dx) = divmod(y // scale - gap, h + gap), divmod(x // scale - gap, w + gap)
            i = row * columns + column
            if 0 <= dy < h and 0 <= dx < w and row >= 0 and 0 <= column < columns and i < n:
                pixel = images[i, :, dy, dx].tolist()
                sheet[y, x] = pixel if c == 3 else pixel * 3
    return sheet


@pytest.mark.parametrize(
    ("n", "c", "h", "w", "columns", "gap", "scale"),
    [(1, 1, 4, 4, 1, 1, 1), (5, 1, 3, 2, 2, 1, 2), (6, 3, 2, 5, 3, 2, 1), (7, 3, 3, 3, 10, 0, 3), (4, 1, 2, 2, 4, 3, 1)],
)
def test_grid_against_every_pixel(n: int, c: int, h: int, w: int, columns: int, gap: int, scale: int) -> None:
    images = random_images(n, c, h, w)
    grid = make_grid(images, columns, gap=gap, scale=scale)
    assert grid.mode == ("L" if c == 1 else "RGB")
    assert np.array_equal(np.asarray(grid.convert("RGB")), placed(images, columns, gap, scale))


@pytest.mark.parametrize(("n", "columns", "rows"), [(1, 1, 1), (4, 2, 2), (5, 3, 2), (10, 4, 3), (16, 4, 4)])
def test_grids_are_as_square_as_possible(n: int, columns: int, rows: int) -> None:
    assert make_grid(random_images(n, 1, 40, 40)).size == (columns * 41 + 1, rows * 41 + 1)


@pytest.mark.parametrize(("side", "scale"), [(4, 8), (8, 4), (10, 3), (28, 1), (32, 1), (64, 1)])
def test_small_images_are_magnified_to_about_32_pixels(side: int, scale: int) -> None:
    assert make_grid(random_images(1, 1, side, side)).size == ((side + 2) * scale, (side + 2) * scale)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 4, 4),
        torch.zeros(2, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 2, 4, 4, dtype=torch.uint8),
        torch.zeros(0, 1, 4, 4, dtype=torch.uint8),
    ],
)
def test_what_cannot_be_drawn(images: Tensor) -> None:
    with pytest.raises(UserError, match=r"cannot draw images of shape .*; expected uint8 \(n, 1 or 3, h, w\)"):
        make_grid(images)


@pytest.mark.parametrize("columns", [0, -3])
def test_columns_out_of_range(columns: int) -> None:
    with pytest.raises(UserError, match=f"{columns} images per row; expected at least 1; change --columns"):
        make_grid(random_images(4, 1, 4, 4), columns)


def read(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as picture:
        return np.asarray(picture).copy()


@pytest.mark.parametrize("c", [1, 3])
def test_single_files_keep_every_pixel(c: int, tmp_path: Path) -> None:
    images = random_images(3, c, 5, 7)
    paths = save_images(images, tmp_path / "deep" / "folder")
    assert [path.name for path in paths] == ["000000.png", "000001.png", "000002.png"]
    for path, image in zip(paths, images, strict=True):
        expected = image[0].numpy() if c == 1 else image.permute(1, 2, 0).numpy()
        assert np.array_equal(read(path), expected)
    named = save_images(images[:2], tmp_path, names=["a.png", "b.png"])
    assert named == [tmp_path / "a.png", tmp_path / "b.png"]


@pytest.mark.parametrize(
    ("name", "kind"), [("x.png", "PNG"), ("x.PNG", "PNG"), ("x.jpg", "JPEG"), ("x.jpeg", "JPEG"), ("x.webp", "WEBP")]
)
@pytest.mark.parametrize("c", [1, 3])
def test_the_ending_decides_the_format(name: str, kind: str, c: int, tmp_path: Path) -> None:
    path = save_grid(random_images(4, c, 8, 8), tmp_path / "new" / name, 2)
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == kind
        assert picture.size == (76, 76)
    assert [p.name for p in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("name", ["x.gif", "x.txt", "x", "x.png.zip"])
def test_unknown_endings(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown image ending; expected \.png, \.webp or \.jpg; change --out"):
        save_picture(Image.new("L", (2, 2)), tmp_path / "sub" / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_encoder_leaves_nothing(existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    if existing:
        path.write_text("before")

    def fail(self: Image.Image, target: Path) -> None:
        target.write_bytes(b"half")
        raise RuntimeError("encoder")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(RuntimeError, match="encoder"):
        save_picture(Image.new("L", (2, 2)), path)
    assert [p.name for p in tmp_path.iterdir()] == (["x.png"] if existing else [])
    assert not existing or path.read_text() == "before"


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Image.Image, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"cannot write '.*x\.png' \(No space left on device\); expected"):
        save_picture(Image.new("L", (2, 2)), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    (tmp_path / "taken.png").mkdir()
    for path in (tmp_path / "file" / "x.png", tmp_path / "file" / "deep" / "x.png", tmp_path / "taken.png"):
        with pytest.raises(UserError, match=r"cannot write '.*; choose another --out"):
            save_picture(Image.new("L", (2, 2)), path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "taken.png"]


def test_panels_hold_every_grid(tmp_path: Path) -> None:
    panels = {f"panel {i}": random_images(6, 1 if i % 2 else 3, 4, 4) for i in range(3)}
    sheet = label_panels(panels, columns=3)
    grids = [make_grid(images, 3).convert("RGB") for images in panels.values()]
    width, height = grids[0].size
    assert sheet.size == (2 * (width + 12) + 12, 2 * (height + 26 + 12) + 12)
    for i, grid in enumerate(grids):
        left, top = 12 + (i % 2) * (width + 12), 12 + (i // 2) * (height + 38)
        inside = sheet.crop((left, top + 26, left + width, top + 26 + height))
        assert inside.tobytes() == grid.tobytes()
        caption = np.asarray(sheet.crop((left, top, left + width, top + 26)).convert("L"))
        assert caption.min() < 100  # there is text above


def test_one_picture_from_one_image() -> None:
    assert to_picture(torch.tensor([[[1, 2], [3, 4]]], dtype=torch.uint8)).tobytes() == bytes([1, 2, 3, 4])
    rgb = torch.tensor([[[1]], [[2]], [[3]]], dtype=torch.uint8)
    assert to_picture(rgb).getpixel((0, 0)) == (1, 2, 3)


def test_a_picture_too_large_for_its_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*x\.webp' \(.*16383.*\); expected a picture that fits \.webp"):
        save_picture(Image.new("L", (16384, 1)), tmp_path / "x.webp")
    assert not list(tmp_path.iterdir())
