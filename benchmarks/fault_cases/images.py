"""Images that are damaged, or are none, among sound ones."""

from __future__ import annotations

import functools
import io
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from fault_cases.runs import NETWORK, Bench, Command, Trial, expect, last_lines, one_line

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
KNOWN = FORMATS[:3]
"""Formats that training reads."""
ENDINGS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
WAYS = ("truncated", "bits flipped", "wrong ending", "empty", "text", "absurd size", "bomb", "noise at the end")
PLACES = ("folder", "zip", "deflated zip", "tar", "damaged zip", "damaged tar")
SOUND = 6
"""Sound images beside each damaged one."""


def rubbish(bench: Bench, count: int) -> Iterator[Trial]:
    """Each damaged image is checked with `trigflow data check`, and trained on with and without `--skip-corrupt`."""
    for i in range(count):
        form, way, place = FORMATS[i % 6], WAYS[i // 6 % 8], PLACES[(i + i // 6 + i // 48) % 6]
        yield Trial(f"image {i}: {form}, {way}, in a {place}", functools.partial(_feed, bench, i, form, way, place))


def _feed(bench: Bench, index: int, form: str, way: str, place: str, folder: Path) -> dict[str, Any]:
    random = bench.random("image", index)
    content = spoil(picture(form, random), form, way, random)
    ending = ENDINGS.get(form, ".png")
    if way == "wrong ending":
        ending = random.choice([other for other in ENDINGS.values() if other != ending])
    name = f"a/damaged{ending}"
    source = pack(folder, name, content, place, random)
    whole = can_be_decoded(content)
    check = Command(("data", "check", source, "--resize", 8, "--quiet", "--limit", 0), folder / "check")
    code = check.wait()
    expect(code in (0, 1, 2), f"data check ended with {code}: {last_lines(check.said())}")
    expect("Traceback" not in check.said(), f"data check: a traceback: {last_lines(check.said())}")
    if code == 2:
        one_line(check.said())
    if not place.startswith("damaged"):
        named = f"damaged{ending}" in check.out.read_text() + check.said()
        expect(whole or (code != 0 and named), f"data check ended with {code} and does not name the image")
    counts: dict[str, int] = {"reported": code == 1, "refused": code == 2, "harmless": code == 0}
    skip = ("--skip-corrupt",) if random.random() < 0.5 else ()
    words = ("train", "--preset", "digits", "--data", source, "--resize", 8, "--out", folder / "run", *NETWORK, *skip)
    loop = ("--iterations", 1, "--batch-size", 4, "--loop.sample-every", 0, "--loop.device", "cpu", "--quiet")
    train = Command((*words, *loop), folder / "train")
    code = train.wait()
    expect(code in (0, 2), f"train ended with {code}: {last_lines(train.said())}")
    expect("Traceback" not in train.said(), f"train: a traceback: {last_lines(train.said())}")
    if code == 2:
        one_line(train.said())
    if not place.startswith("damaged"):
        expect(code == 2 or whole or bool(skip), "trained on an image that cannot be decoded")
        expect(code == 0 or not whole, f"refused an image that can be decoded: {last_lines(train.said())}")
    return counts | {"trained": code == 0, "training_refused": code == 2}


# Images ------------------------------------------------------------------------------------------------------------------


def picture(form: str, random: Random) -> bytes:
    """A sound image of random pixels, of random mode."""
    pixels = np.frombuffer(random.randbytes(12 * 10 * 3), np.uint8).reshape(10, 12, 3)
    image = Image.fromarray(pixels).convert(random.choice(["RGB", "L"]))
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def spoil(content: bytes, form: str, way: str, random: Random) -> bytes:
    """Damage the bytes of an image in one of `WAYS`."""
    if way == "truncated":
        return content[: random.randrange(1, len(content))]
    if way == "bits flipped":
        flipped = bytearray(content)
        for _ in range(random.randrange(1, 20)):
            flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
        return bytes(flipped)
    if way == "empty":
        return b""
    if way == "text":
        return "\n".join(f"{i}: not an image, whatever it is called" for i in range(random.randrange(1, 99))).encode()
    if way == "absurd size":
        return with_absurd_size(content, form, random)
    if way == "bomb":
        return bomb(random)
    if way == "noise at the end":
        return content + random.randbytes(random.randrange(1, 2000))
    return content


def with_absurd_size(content: bytes, form: str, random: Random) -> bytes:
    """Width and height in the header become something else: nothing, or the largest that the format can say."""
    places = {"PNG": (16, 8, "big"), "GIF": (6, 4, "little"), "BMP": (18, 8, "little")}
    changed = bytearray(content)
    if form == "JPEG":
        at = content.index(b"\xff\xc0") + 5
        changed[at : at + 4] = random.choice([b"\xff\xff\xff\xff", bytes(4), b"\x00\x01\xff\xff"])
    elif form in places:
        at, size, order = places[form]
        side = random.choice([0, 1, 2 ** (4 * size) - 1, 2 ** (4 * size - 1) - 1, 65535])
        changed[at : at + size] = side.to_bytes(size // 2, order) * 2  # type: ignore[arg-type]
        if form == "PNG":
            changed[29:33] = zlib.crc32(changed[12:29]).to_bytes(4, "big")
    else:  # somewhere in the first bytes, where these formats have them
        at = random.randrange(8, 32)
        changed[at : at + 4] = b"\xff\xff\xff\x7f"
    return bytes(changed)


def bomb(random: Random) -> bytes:
    """A few bytes that claim to be, and are, a PNG of hundreds of millions of pixels."""
    side = random.choice([14_000, 20_000, 30_000])
    packer, parts = zlib.compressobj(9), []
    line = bytes(1 + (side + 7) // 8)
    for _ in range(0, side, 100):
        parts.append(packer.compress(line * 100))
    head = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    chunks = [(b"IHDR", head), (b"IDAT", b"".join(parts) + packer.flush()), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big") for name, data in chunks
    )


def can_be_decoded(content: bytes) -> bool:
    """Whether Pillow, asked directly, decodes it to the end as a format that training reads."""
    if content.startswith(b"\x89PNG") and int.from_bytes(content[16:20], "big") * int.from_bytes(content[20:24], "big") > 10**8:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=KNOWN) as image:
                image.load()
                image.convert("RGB")
    except Exception:
        return False
    return True


# Where they lie ----------------------------------------------------------------------------------------------------------


def pack(folder: Path, name: str, content: bytes, place: str, random: Random) -> Path:
    """A folder, zip or tar with this file and sound images of two classes; of a damaged one a few bytes are changed."""
    files = {f"{'ab'[i % 2]}/{i}.png": picture("PNG", random) for i in range(SOUND)} | {name: content}
    if place == "folder":
        for inner, data in files.items():
            path = folder / "data" / inner
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder / "data"
    path = folder / ("data.tar" if place.endswith("tar") else "data.zip")
    if place.endswith("tar"):
        with tarfile.open(path, "w") as tar:
            for inner, data in files.items():
                entry = tarfile.TarInfo(inner)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    else:
        method = zipfile.ZIP_DEFLATED if place.startswith("deflated") else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", method) as archive:
            for inner, data in files.items():
                archive.writestr(inner, data)
    if place.startswith("damaged"):
        way = random.choice(WAYS[:2])
        path.write_bytes(spoil(path.read_bytes(), "PNG", way, random))
    return path
