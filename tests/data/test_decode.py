"""Every kind of image file against pixels known beforehand."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from trigflow.data.decode import CorruptImageError, decode, fit
from trigflow.runtime.errors import UserError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(data: bytes, *, channels: int | None = None, resize: int | None = None, crop: bool = True) -> Tensor:
    return decode(data, "test.png", channels=channels, resize=resize, crop=crop)


def raw_png(width: int, depth: int, colour_type: int, row: bytes, transparent: bytes | None = None) -> bytes:
    """A PNG of one row, put together by hand: Pillow cannot write every kind that it must read."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    extra = b"" if transparent is None else chunk(b"tRNS", transparent)
    body = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + body + chunk(b"IEND", b"")


NOISE = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def test_rgb_and_gray_come_out_exactly() -> None:
    assert torch.equal(read(encoded(Image.fromarray(NOISE))), torch.from_numpy(NOISE).permute(2, 0, 1))
    assert torch.equal(read(encoded(Image.fromarray(NOISE[..., 0]))), torch.from_numpy(NOISE[None, ..., 0].copy()))
    webp = encoded(Image.fromarray(NOISE), "WEBP", lossless=True)
    assert torch.equal(read(webp), torch.from_numpy(NOISE).permute(2, 0, 1))


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("I;16", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)])
def test_grayscale_files_stay_gray_and_others_become_rgb(mode: str, channels: int) -> None:
    image = Image.new(mode, (3, 2))
    assert read(encoded(image)).shape == (channels, 2, 3)
    assert read(encoded(image), channels=1).shape == (1, 2, 3)
    assert read(encoded(image), channels=3).shape == (3, 2, 3)


def test_forced_gray_is_luma_and_forced_rgb_repeats() -> None:
    red = encoded(Image.new("RGB", (1, 1), (255, 0, 0)))
    assert read(red, channels=1).item() == round(0.299 * 255)
    assert read(encoded(Image.new("L", (1, 1), 77)), channels=3).flatten().tolist() == [77, 77, 77]


def test_one_bit_becomes_black_and_white() -> None:
    image = Image.fromarray(np.array([[True, False]]))
    assert image.mode == "1"
    assert read(encoded(image)).tolist() == [[[255, 0]]]


def test_sixteen_bits_keep_the_high_byte() -> None:
    gray = raw_png(4, 16, 0, struct.pack(">4H", 0, 0x12FF, 0x8000, 0xFFFF))
    assert read(gray).tolist() == [[[0, 0x12, 0x80, 0xFF]]]
    colour = raw_png(1, 16, 2, struct.pack(">3H", 0x12FF, 0x8000, 0xFFFF))
    assert read(colour).flatten().tolist() == [0x12, 0x80, 0xFF]
    gray_alpha = raw_png(2, 16, 4, struct.pack(">4H", 0x1234, 0xFFFF, 0x1234, 0))
    assert read(gray_alpha, channels=1).tolist() == [[[0x12, 0xFF]]]


def test_alpha_is_composited_over_white() -> None:
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], dtype=np.uint8)
    # alpha 51 is one fifth: 0.2 * colour + 0.8 * 255
    expected = [[200, 255, 244], [100, 255, 224], [0, 255, 204]]
    assert read(encoded(Image.fromarray(rgba)))[:, 0].tolist() == expected
    assert read(encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True))[:, 0].tolist() == expected
    gray_alpha = Image.merge("LA", (Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 51)))
    assert read(encoded(gray_alpha)).item() == 224


def test_palettes_become_their_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([1, 0])
    assert read(encoded(image))[:, 0].tolist() == [[40, 10], [50, 20], [60, 30]]
    assert read(encoded(image, transparency=1))[:, 0].tolist() == [[255, 10], [255, 20], [255, 30]]


def test_one_transparent_colour_becomes_white() -> None:
    assert read(raw_png(2, 8, 0, bytes([7, 8]), struct.pack(">H", 7))).tolist() == [[[255, 8]]]
    colour = raw_png(2, 8, 2, bytes([1, 2, 3, 4, 5, 6]), struct.pack(">3H", 1, 2, 3))
    assert read(colour)[:, 0].tolist() == [[255, 4], [255, 5], [255, 6]]
    deep = raw_png(2, 16, 0, struct.pack(">2H", 0x0700, 0x0701), struct.pack(">H", 0x0700))
    assert read(deep).tolist() == [[[255, 7]]]
    levels = 0x1234, 0x5678, 0x9ABC, 0x3434, 0x7878, 0xBCBC  # the second has the low bytes of the first
    deep = raw_png(2, 16, 2, struct.pack(">6H", *levels), struct.pack(">3H", *levels[:3]))
    assert read(deep)[:, 0].tolist() == [[255, 0x34], [255, 0x78], [255, 0xBC]]


@pytest.mark.parametrize("inks", [(0, 0, 0, 0), (255, 255, 255, 0), (0, 0, 0, 255), (0, 255, 255, 0)])
def test_cmyk_jpeg_becomes_rgb(inks: tuple[int, int, int, int]) -> None:
    data = encoded(Image.new("CMYK", (8, 8), inks), "JPEG", quality=100)
    c, m, y, k = (1 - ink / 255 for ink in inks)
    expected = torch.tensor([c * k, m * k, y * k]) * 255
    assert (read(data).float() - expected[:, None, None]).abs().max() <= 3


def test_gray_jpeg_stays_gray() -> None:
    data = encoded(Image.new("L", (8, 8), 100), "JPEG", quality=100)
    assert read(data).shape == (1, 8, 8)
    assert (read(data).int() - 100).abs().max() <= 1


UPRIGHT = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8) * 40
# How each orientation stores the upright picture, from the EXIF standard's "row 0 is ..., column 0 is ...".
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](UPRIGHT)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif, lossless=True)
    assert torch.equal(read(data, channels=1)[0], torch.from_numpy(UPRIGHT))


def test_unreadable_exif_is_no_reason_to_refuse_an_image() -> None:
    data = encoded(Image.new("L", (4, 2), 50), "JPEG", exif=b"Exif\0\0this is not EXIF")
    assert read(data).shape == (1, 2, 4)


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert read(data)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.9])
def test_truncated_files_are_corrupt(kind: str, part: float) -> None:
    data = encoded(Image.fromarray(np.kron(NOISE, np.ones((5, 5, 1), dtype=np.uint8))), kind)
    with pytest.raises(CorruptImageError):
        read(data[: int(part * len(data))])


def test_other_contents_are_corrupt() -> None:
    gif = encoded(Image.new("L", (2, 2)), "GIF")
    for data in (b"", b"not an image", gif):
        with pytest.raises(CorruptImageError):
            read(data)


def test_a_damaged_byte_never_changes_pixels_unnoticed() -> None:
    data = encoded(Image.fromarray(NOISE))
    refused = 0
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        try:
            image = read(bytes(damaged))
        except CorruptImageError:
            refused += 1
        else:
            assert torch.equal(image, torch.from_numpy(NOISE).permute(2, 0, 1))
    assert refused > len(data) / 2


@pytest.mark.parametrize("limit", [10, 20])
def test_decompression_bombs_are_user_errors(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    # Pillow warns above its limit and refuses above twice the limit: 30 pixels are one or the other.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match=f"'test.png' has more pixels .* expected at most {limit}; shrink or remove it"):
        read(encoded(Image.fromarray(NOISE)))


STRIPES = Image.fromarray(np.repeat(np.array([[10, 120, 240]], dtype=np.uint8), 10, axis=1).repeat(10, axis=0))


def test_resize_crops_the_centre() -> None:
    assert STRIPES.size == (30, 10)
    assert read(encoded(STRIPES), resize=5).tolist() == [[[120] * 5] * 5]
    assert read(encoded(STRIPES.rotate(90, expand=True)), resize=5).tolist() == [[[120] * 5] * 5]


def test_resize_without_crop_keeps_everything() -> None:
    squeezed = read(encoded(STRIPES), resize=15, crop=False)[0]
    assert squeezed.shape == (15, 15)
    assert squeezed[:, [1, 7, 13]].unique(dim=0).tolist() == [[10, 120, 240]]


def test_resize_to_the_size_it_has_keeps_exact_pixels() -> None:
    picture = Image.fromarray(NOISE)
    assert torch.equal(read(encoded(picture), resize=5), torch.from_numpy(NOISE[:5]).permute(2, 0, 1))
    assert fit(picture, None, True) is picture


def test_reduction_does_not_alias() -> None:
    # Lines one pixel wide are above what 8 pixels can show: without a filter they would come out black, white or beating.
    lines = np.tile(np.array([0, 255], dtype=np.uint8), (100, 50))
    small = read(encoded(Image.fromarray(lines)), resize=8)
    assert (small.float() - 127.5).abs().max() < 8


def test_enlarging_keeps_a_flat_image_flat() -> None:
    assert read(encoded(Image.new("RGB", (2, 3), (9, 90, 200))), resize=7).flatten(1).unique(dim=1).tolist() == [
        [9],
        [90],
        [200],
    ]
