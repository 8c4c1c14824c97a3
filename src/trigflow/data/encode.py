"""A folder or zip of images to a zip of latents, in the layout of EDM2: one `.npy` an image and a `dataset.json`.

The zip grows entry by entry and can be taken up again after a kill. Entries are stored uncompressed, in a fixed order, with
fixed dates, so that the same entries give the same file, bit for bit, however often its writing was interrupted. Each carries
the fingerprint of what it was made from in an extra field, which other programs pass over.
"""

from __future__ import annotations

import functools
import io
import json
import os
import posixpath
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trigflow.codecs.vae import DEFAULT_VAE, VAE, PixelRange, VAESource
from trigflow.data.caption_files import TABLES, find_captions
from trigflow.data.decode import CorruptImageError, sizes_differ
from trigflow.data.labels import LABEL_FILE, find_labels
from trigflow.data.loader import in_order
from trigflow.data.rows import Decoder
from trigflow.data.sources.files import Files
from trigflow.data.sources.folder import image_files
from trigflow.data.sources.opening import list_files
from trigflow.data.sources.zips import SIGNATURE
from trigflow.migrations import FORMATS
from trigflow.runtime.errors import UserError, first_line
from trigflow.runtime.files import ensure_folder, is_owned, owned
from trigflow.runtime.places import check_place

LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
EXTRA = struct.Struct("<HHIQ")
EXTRA_ID = 0x6674
"""Of our extra field: CRC and length of the source of an entry."""


@dataclass(frozen=True)
class Fingerprint:
    """CRC-32 and length of some bytes."""

    crc: int
    length: int

    @classmethod
    def of(cls, data: bytes) -> Fingerprint:
        """That of these bytes."""
        return cls(zlib.crc32(data), len(data))


@dataclass(frozen=True)
class Entry:
    """A whole entry of the file: what the zip's index needs to know of it, and what it was made from."""

    info: zipfile.ZipInfo
    source: Fingerprint
    end: int
    """Where the next entry begins."""


def entry_info(name: str, source: Fingerprint) -> zipfile.ZipInfo:
    """The header of an entry, the same whenever and wherever it is written."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = 0o644 << 16
    info.extra = EXTRA.pack(EXTRA_ID, EXTRA.size - 4, source.crc, source.length)
    return info


def whole_entries(file: BinaryIO) -> Iterator[tuple[Entry, bytes]]:
    """The entries from the beginning of the file and their contents, up to the first that is not whole."""
    start = 0
    while True:
        file.seek(start)
        header = file.read(LOCAL_HEADER.size)
        if len(header) < LOCAL_HEADER.size:
            return
        signature, _, _, method, _, _, crc, packed, size, name_length, extra_length = LOCAL_HEADER.unpack(header)
        rest = file.read(name_length + extra_length)
        name, extra = rest[:name_length], rest[name_length:]
        data = file.read(size)
        if signature != SIGNATURE or method != zipfile.ZIP_STORED or packed != size or len(extra) != EXTRA.size:
            return
        extra_id, _, source_crc, source_length = EXTRA.unpack(extra)
        if extra_id != EXTRA_ID or len(data) != size or zlib.crc32(data) != crc:
            return
        source = Fingerprint(source_crc, source_length)
        try:
            info = entry_info(name.decode(), source)
        except UnicodeDecodeError:
            return
        info.CRC, info.compress_size, info.file_size, info.header_offset = crc, size, size, start
        start = file.tell()
        yield Entry(info, source, start), data


PARTIAL = ".partial"
"""Added to the name of the zip until it is whole."""


@contextmanager
def appending(path: Path, entries: list[Entry]) -> Iterator[Callable[[str, Fingerprint, bytes], None]]:
    """A function that adds an entry (name, source, data) behind these, which `PATH.partial` begins with; the rest of it is cut
    off.

    When the block ends the file is a zip of all entries, and is called `path`. Raises a UserError if it cannot be written, or
    another process is writing it.
    """
    partial, end = path.with_name(path.name + PARTIAL), entries[-1].end if entries else 0
    if partial.exists() and is_owned(partial):
        raise UserError(f"another process writes '{partial}'; expected one at a time; wait for it, or choose another --out")
    try:
        with open(partial, "r+b" if entries else "wb") as file, owned(partial):
            file.truncate(end)
            file.seek(end)
            with zipfile.ZipFile(file, "w") as archive:
                archive.infolist().extend(entry.info for entry in entries)
                yield lambda name, source, data: archive.writestr(entry_info(name, source), data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write '{partial}' ({error.strerror or error}); expected a file that can be written, with space left; "
            "choose another --out, or make room and run the same command again"
        ) from None


def encode_images(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    vae: str | VAESource = DEFAULT_VAE,
    pixels: PixelRange = "unit",
    resize: int | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: bool = False,
    captions: bool = True,
    shape: tuple[int, ...] | None = None,
) -> int:
    """Write mean and standard deviation of the latents of every image to a zip; how many there are.

    The zip holds for every image a float32 array of shape `(8, h / 8, w / 8)`, named like the image but for the ending
    `.npy`, and `dataset.json` with the labels and what is needed to decode the latents. Captions come last, as a
    `metadata.jsonl` (see `trigflow.data.caption_files`). Nothing is drawn at random. While it is written it is called
    `OUT.partial`; an interrupted encoding goes on from the last finished batch and gives the same file, bit for bit.

    Args:
        source: folder or zip of images, as for training.
        out: the zip to write.
        vae: the autoencoder: an id of the Hugging Face hub or a folder that diffusers wrote; or a source, which says more.
        pixels: range of the pixels given to it: `unit` [0, 1], as EDM2, or `symmetric` [-1, 1].
        resize: side of the square to make of every image: the short side is scaled to it and the centre kept.
        batch_size: images at once.
        device: where the autoencoder runs.
        workers: processes that read and decode images, ahead of the autoencoder; 0 for this one alone.
        progress: draw a progress bar on stderr.
        captions: False takes none along.
        shape: of one latent as the model has it, where that has axes of length 1 between, as a video of one frame.

    Raises:
        MissingExtraError: without diffusers.
        UserError: for images, labels or an autoencoder that cannot be used, a file that cannot be written, or an unfinished
            encoding of other images or with other settings.
    """
    path, device = check_place(out, "file"), torch.device(device)
    if path.suffix.lower() != ".zip":
        raise UserError(f"cannot write latents to '{path}'; expected the name of a .zip; change --out")
    if path.exists():
        raise UserError(f"'{path}' already exists; expected a new file; choose another --out, or delete it")
    partial = check_place(path.with_name(path.name + PARTIAL), "file")
    if batch_size < 1 or (resize is not None and resize < 1):
        raise UserError(f"batch size {batch_size} and resize {resize}; expected at least 1; change --batch-size or --resize")
    images = _Images.find(list_files(os.fspath(source)), resize, captions)
    if isinstance(vae, str):
        name = os.path.abspath(os.path.expanduser(vae)) if os.path.isdir(os.path.expanduser(vae)) else vae
        vae = VAESource(name, pixels)
    encoder = VAE(vae, batch_size)
    encoder.load(device)
    first, _ = images.read(0)
    encoder.check_images(first[None])
    latents = {
        "format": FORMATS["latents"],
        "vae": replace(vae, digest=encoder.digest()).state(),
        "class_names": list(images.class_names),
        "size": list(first.shape[1:]),
        "batch_size": batch_size,
        "device": device.type,
    }
    description = json.dumps({"labels": images.labels, "latents": latents}).encode()
    ensure_folder(path.parent)
    entries = _finished(partial, images, description, batch_size)
    total, done = len(images.files), max(len(entries) - 1, 0)
    bar = tqdm(total=total, initial=done, desc="encoding", unit="img", disable=not progress)
    try:
        with bar, appending(path, entries) as add:
            if not entries:
                add(LABEL_FILE, Fingerprint.of(description), description)
            pieces = [range(start, min(start + batch_size, total)) for start in range(done, total, batch_size)]
            read = functools.partial(images.batch, (first.shape[1], first.shape[2]))
            for indices, (batch, sources) in zip(pieces, in_order(read, pieces, workers), strict=True):
                moments = encoder.encode(batch.to(device)).cpu()
                moments = moments if shape is None else moments.unflatten(2, (*shape[1:-2], -1))
                for index, fingerprint, moment in zip(indices, sources, moments, strict=True):
                    add(latent_name(images.files.names[index]), fingerprint, to_npy(moment))
                done += len(indices)
                bar.update(len(indices))
            if images.table:
                add(TABLES[0], Fingerprint.of(images.table), images.table)
    except UserError:
        if done == 0 and partial.exists() and not is_owned(partial):
            partial.unlink()
        raise
    return total


def latent_name(name: str) -> str:
    """Name of the latent of an image: the image's with another ending."""
    return posixpath.splitext(name)[0] + ".npy"


def to_npy(array: Tensor) -> bytes:
    """A tensor as the content of a `.npy` file of float32."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array.float().contiguous().numpy(), version=(1, 0), allow_pickle=False)
    return file.getvalue()


@dataclass(frozen=True)
class _Images:
    """The images to encode."""

    files: Files
    labels: list[tuple[str, int]] | None
    """As `dataset.json` has them: the name of the latent and the class."""
    class_names: tuple[str, ...]
    resize: int | None
    table: bytes
    """The captions as `metadata.jsonl` has them; empty without any."""

    @classmethod
    def find(cls, all_files: Files, resize: int | None, captions: bool) -> _Images:
        files = image_files(all_files)
        seen: dict[str, str] = {}
        for name in files.names:
            other = seen.setdefault(latent_name(name), name)
            if other != name:
                raise UserError(
                    f"{other!r} and {name!r} in {files.where!r} would give one latent of the same name; expected names that "
                    "differ before the ending; rename one of them"
                )
        labels, class_names = find_labels(all_files, files.names)
        listed = None if labels is None else [(latent_name(n), label) for n, label in zip(files.names, labels, strict=True)]
        written = find_captions(all_files, files.names) if captions else None
        rows = zip(files.names, () if written is None else written.texts, strict=written is not None)
        lines = [json.dumps({"file_name": latent_name(n), "captions": texts}) for n, texts in rows if texts]
        return cls(files, listed, class_names, resize, "\n".join(lines).encode())

    def read(self, index: int) -> tuple[Tensor, Fingerprint]:
        """One image, uint8 `(3, h, w)`, and the fingerprint of its file."""
        image, content = Decoder(self.files, 3, self.resize, crop=True).whole(index)
        return image, Fingerprint.of(content)

    def made(self, index: int, entry: Entry) -> bool:
        """Whether an entry is the latent of this image, as its file is now."""
        name = latent_name(self.files.names[index])
        try:
            return (entry.info.filename, entry.source) == (name, Fingerprint.of(self.files.read(index)))
        except CorruptImageError:
            return False

    def batch(self, size: tuple[int, int], indices: Sequence[int]) -> tuple[Tensor, list[Fingerprint]]:
        """Images, which have to be of this height and width, and the fingerprints of their files."""
        images, sources = zip(*map(self.read, indices), strict=True)
        for index, image in zip(indices, images, strict=True):
            if image.shape[1:] != size:
                raise sizes_differ(self.files.names[0], size, self.files.names[index], image.shape[1:])
        return torch.stack(images), list(sources)


def renew_captions(path: Path, source: str, captions: bool) -> None:
    """Give a finished zip the captions that its images have now. Raises a UserError if it is of other images than these."""
    images = _Images.find(list_files(source), None, captions)
    try:
        with zipfile.ZipFile(path) as archive:
            said = json.loads(archive.read(LABEL_FILE))
            before = archive.read(TABLES[0]) if TABLES[0] in archive.NameToInfo else b""
        classes = said["labels"], said["latents"]["class_names"]
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"'{path}' cannot be read ({first_line(error)}); expected the zip that was written; restore it, or delete it to "
            "encode the images again"
        ) from None
    with path.open("rb") as file:
        entries = [entry for entry, _ in whole_entries(file) if entry.info.filename != TABLES[0]]
    labels = None if images.labels is None else [list(row) for row in images.labels]
    wrong = "other classes" if (labels, list(images.class_names)) != classes else ""
    if len(entries) - 1 != len(images.files):
        wrong = f"{len(entries) - 1} images, now {len(images.files)}"
    if not wrong:
        others = (name for index, name in enumerate(images.files.names) if not images.made(index, entries[1 + index]))
        wrong = next((f"another {name!r}" for name in others), "")
    if wrong:
        raise UserError(f"'{path}' was made of {wrong}; expected the same images; restore them, or choose another --out")
    if images.table != before:
        path.replace(path.with_name(path.name + PARTIAL))  # from which `encode_images` goes on
        with appending(path, entries) as add:
            if images.table:
                add(TABLES[0], Fingerprint.of(images.table), images.table)


# Going on ------------------------------------------------------------------------------------------------------------


def _finished(partial: Path, images: _Images, description: bytes, batch_size: int) -> list[Entry]:
    """What an interrupted encoding left: `dataset.json` and the latents of whole batches; empty to begin anew. Raises a
    UserError if it is of other images, or made with other settings."""
    if not partial.exists():
        return []
    with partial.open("rb") as file:
        found = whole_entries(file)
        first = next(found, None)
        if first is None:
            file.seek(0)
            if not SIGNATURE.startswith(file.read(len(SIGNATURE))):
                raise _cannot_go_on(partial, "is no unfinished zip of latents", "one")
            return []
        entry, content = first
        if content != description:
            raise _cannot_go_on(partial, *_difference(content, description))
        entries = [entry]
        for (index, name), (entry, _) in zip(enumerate(images.files.names), found, strict=False):
            if entry.info.filename != latent_name(name):
                break
            if not images.made(index, entry):
                raise _cannot_go_on(partial, f"holds the latent of another image {name!r}", "the same images")
            entries.append(entry)
    done = len(entries) - 1
    return entries if done == len(images.files) else entries[: 1 + done - done % batch_size]


def _difference(old: bytes, new: bytes) -> tuple[str, str]:
    """What differs between two contents of `dataset.json`, and what was expected."""
    try:
        before, now = (_settings(json.loads(content)) for content in (old, new))
    except (ValueError, TypeError, KeyError):
        return "is no unfinished zip of latents", "one"
    for key, value in now.items():
        if before.get(key) != value:
            return f"was begun with {key} {before.get(key)}, now it is {value}", "the same"
    return "was begun with other images or labels", "the same"


def _settings(content: dict[str, Any]) -> dict[str, Any]:
    latents = content["latents"]
    return {**{f"vae {key}": value for key, value in latents["vae"].items()}, **latents, "vae": None}


def _cannot_go_on(partial: Path, wrong: str, expected: str) -> UserError:
    return UserError(f"'{partial}' {wrong}; expected {expected}; restore that, or delete the file to begin anew")
