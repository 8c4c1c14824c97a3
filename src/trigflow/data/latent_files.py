"""Latents out of files: a folder or zip of `.npy`, one an image, as `trigflow encode` and EDM2 write them.

Every file is read and checked before training starts, as images are. What passes the memory limit is left in its zip, if that
is uncompressed, and read as training asks for it; then only the headers are checked first.
"""

import io
import json
import math
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trigflow.codecs.vae import VAESource
from trigflow.conditions import check_class_names
from trigflow.data.caption_files import find_captions
from trigflow.data.dataset import digest_of
from trigflow.data.decode import CorruptImageError, check_corrupt
from trigflow.data.labels import LABEL_FILE, find_labels, label_file, read_named
from trigflow.data.latents import LatentDataset, LatentRows
from trigflow.data.sources.files import Files
from trigflow.data.sources.zips import ZipFiles
from trigflow.migrations import migrated
from trigflow.runtime.errors import UserError

ENDING = ".npy"
PREFIX_BYTES = 1024
"""Enough for the header of any latent."""


def holds_latents(files: Files) -> bool:
    """Whether this folder or zip holds latents rather than images. Raises a UserError if it holds both."""
    latent = next((name for name in files.names if name.lower().endswith(ENDING)), None)
    image = next((files.names[index] for index in files.images()), None)
    if latent is not None and image is not None:
        raise UserError(
            f"{files.where!r} holds latents ({latent!r}) and images ({image!r}); expected one of the two; move the others away"
        )
    return latent is not None


def read_latents(files: Files, *, skip_corrupt: bool, progress: bool, memory_limit_gib: float, captions: bool) -> LatentDataset:
    """The latents of a folder or zip; the arguments are those of `trigflow.data.open_dataset`.

    `dataset.json` may say under "latents" which autoencoder they are of and what the classes are called; without it they are
    taken to be EDM2's, of `stabilityai/sd-vae-ft-mse` with pixels in [0, 1]. Raises a UserError as for images; also for arrays
    that are not 4 or 8 channels of floats, that are not all of one shape, that hold infinities or negative deviations.
    """
    latents = files.only([index for index, name in enumerate(files.names) if name.lower().endswith(ENDING)])
    names = latents.names
    labels, class_names = find_labels(files, names)
    written = find_captions(files, names) if captions else None
    vae, given_names = describe_latents(files, len(class_names))
    shape = _first_shape(latents, vae.depth)
    gib = len(names) * int(np.prod(shape)) * 4 / 2**30
    rows, kept, corrupt = None, list(range(len(names))), list[str]()
    if gib <= memory_limit_gib:
        images, kept, corrupt, checksums = _read_all(latents, shape, vae.depth, progress)
        check_corrupt("latents", files.where, corrupt, len(names), skip_corrupt)
    else:
        images, rows = torch.empty(0, *shape, dtype=torch.float32), _leave_in_zip(latents, shape, vae.depth, progress)
        if rows is None or not isinstance(latents, ZipFiles):
            raise UserError(
                f"{len(names)} latents of shape {shape} take {gib:.3g} GiB; expected at most {memory_limit_gib:.3g} GiB in "
                "memory, or an uncompressed zip of whole files, which is read in pieces; pack them into one (zip -0)"
            )
        checksums = torch.from_numpy(latents.entries["crc"].astype(np.int64))
    return LatentDataset(
        name=os.path.basename(os.path.abspath(files.where)),
        values=images,
        labels=None if labels is None else torch.tensor([labels[index] for index in kept]),
        class_names=given_names or class_names,
        skipped=tuple(corrupt),
        captions=None if written is None else written.only(torch.tensor(kept)),
        vae=vae,
        rows=rows,
        digest=digest_of(checksums),
    )


# One file ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What the header of a `.npy` file says."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    fortran: bool
    length: int
    """Bytes of the header itself."""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.length + math.prod(self.shape) * self.dtype.itemsize


def parse_header(data: bytes, name: str) -> Header:
    """The header at the beginning of a `.npy` file. Nothing in it is executed, and no pickled object is ever read. Raises a
    CorruptImageError if it is none, or one of objects."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:  # damaged headers end in all kinds of exceptions
        raise CorruptImageError(name) from error
    if dtype.hasobject or any(side < 0 for side in shape):
        raise CorruptImageError(name)
    return Header(dtype, shape, fortran, file.tell())


def parse(data: bytes, name: str, channels: int) -> Tensor:
    """The latent in a `.npy` file, float32, shape `(c or 2 c, h, w)`, of a video with frames before h.

    Raises:
        CorruptImageError: if it is no whole array.
        UserError: if it is an array of another shape or type, or its numbers are none that an autoencoder gives.
    """
    header = parse_header(data, name)
    if header.size != len(data):
        raise CorruptImageError(name)
    _check_shape(header, name, channels)
    flat = np.frombuffer(data, header.dtype, offset=header.length)
    array = flat.reshape(header.shape[::-1]).transpose() if header.fortran else flat.reshape(header.shape)
    latent = torch.from_numpy(array.astype(np.float32, order="C"))
    if not bool(latent.isfinite().all()):
        raise UserError(f"latent {name!r} holds values that are not finite; expected numbers; encode the image again")
    if bool((latent[channels:] < 0).any()):
        raise UserError(
            f"latent {name!r} holds negative standard deviations; expected {channels} channels of means, then deviations; "
            "encode the image again"
        )
    return latent


def _check_shape(header: Header, name: str, channels: int) -> None:
    shape = header.shape
    if header.dtype.kind != "f" or len(shape) not in (3, 4) or shape[0] not in (channels, 2 * channels) or 0 in shape:
        raise UserError(
            f"{name!r} is an array of type {header.dtype} and shape {shape}; expected floats of shape ({channels}, h, w), or "
            f"({2 * channels}, h, w) with deviations; encode the images with: trigflow encode"
        )


# All files -----------------------------------------------------------------------------------------------------------


def _first_shape(files: Files, channels: int) -> tuple[int, ...]:
    """Shape of the first latent that is whole."""
    for index, name in enumerate(files.names):
        with suppress(CorruptImageError):
            return tuple(parse(files.read(index), name, channels).shape)
    check_corrupt("latents", files.where, files.names, len(files))
    raise AssertionError


def _read_all(
    files: Files, shape: tuple[int, ...], channels: int, progress: bool
) -> tuple[Tensor, list[int], list[str], Tensor]:
    """The latents, the indices of those that are whole, the names of the others, and the CRC-32 of every file."""
    names = files.names
    latents = torch.empty(len(names), *shape, dtype=torch.float32)
    kept: list[int] = []
    corrupt: list[str] = []
    checksums = torch.zeros(len(names), dtype=torch.int64)
    for index, name in enumerate(tqdm(names, desc="reading latents", unit="image", disable=not progress)):
        try:
            content = files.read(index)
            checksums[index] = zlib.crc32(content)
            latent = parse(content, name, channels)
        except CorruptImageError:
            corrupt.append(name)
            continue
        _check_same(names[kept[0]] if kept else name, shape, name, tuple(latent.shape))
        latents[len(kept)] = latent
        kept.append(index)
    return latents[: len(kept)], kept, corrupt, checksums


def _leave_in_zip(files: Files, shape: tuple[int, ...], channels: int, progress: bool) -> LatentRows | None:
    """Where each latent lies in an uncompressed zip; None if it is none, or its files are not whole and alike."""
    names = files.names
    spans = files.stored_spans() if isinstance(files, ZipFiles) else None
    if spans is None:
        return None
    with open(files.where, "rb") as file:
        first, beginning = None, b""
        for name, (offset, size) in zip(
            names, tqdm(spans, desc="checking latents", unit="image", disable=not progress), strict=True
        ):
            file.seek(offset)
            data = file.read(min(size, PREFIX_BYTES))
            if first is None or not data.startswith(beginning):
                try:
                    header = parse_header(data, name)
                except CorruptImageError:
                    return None
                _check_shape(header, name, channels)
                _check_same(names[0], shape, name, header.shape)
                if first is not None or header.fortran:
                    return None
                first, beginning = header, data[: header.length]
            if size != first.size:
                return None
    if first is None:
        return None
    return LatentRows(files.where, torch.tensor(spans)[:, 0] + first.length, shape, first.dtype.str)


def _check_same(first: str, expected: tuple[int, ...], name: str, shape: tuple[int, ...]) -> None:
    if shape != expected:
        raise UserError(
            f"latents differ in shape: {first!r} is {expected} and {name!r} is {shape}; expected one shape; "
            "encode the images with one --resize N"
        )


def describe_latents(files: Files, num_classes: int = 0) -> tuple[VAESource, tuple[str, ...]]:
    """The autoencoder and, for labels of so many classes, their names that `dataset.json` has under "latents"; empty for no
    names. Raises a UserError if there is something else, or too few names."""
    name = label_file(files)
    if name is None:
        return VAESource(), ()
    try:
        content = json.loads(read_named(files, name)).get("latents")
    except (ValueError, RecursionError, AttributeError, CorruptImageError):
        content = None  # a damaged file has been refused by find_labels
    if content is None:
        return VAESource(), ()
    names = content.get("class_names", []) if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f'{LABEL_FILE} in {files.where!r} has "latents" that are none; expected "vae" and a list "class_names"; '
            "take the file as trigflow encode wrote it"
        )
    content = migrated("latents", content, f"{LABEL_FILE} in {files.where!r}")
    if len(names) < num_classes:
        raise UserError(
            f"{LABEL_FILE} in {files.where!r} names {len(names)} classes and has labels up to {num_classes - 1}; expected one "
            "name a class; take the file as trigflow encode wrote it"
        )
    check_class_names(names, f"{LABEL_FILE} in {files.where!r}")
    return VAESource.from_state(content.get("vae")), tuple(names) if num_classes else ()
