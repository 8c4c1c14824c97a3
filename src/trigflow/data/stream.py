"""A data set of the Hugging Face hub that is read over the network as training asks for it, and kept nowhere.

A stream is made of shards (files on the hub), each of which can only be read from its beginning. One pass before training
finds how many images each holds, looks for faults and reads the labels; the user's cache folder keeps that. Training then goes
through the shards in a random order and shuffles the samples within windows (`trigflow.data.order`). Which sample comes when
is still a function of the step alone: a resumed run opens the shard that it stopped in, passes over what it had taken, and goes
on.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from trigflow.codecs.pixels import count_values
from trigflow.data.cache import Arrays, remembered
from trigflow.data.captions import Captions, captions_in, no_caption
from trigflow.data.dataset import ImageDataset, digest_of
from trigflow.data.decode import CorruptImageError, decode
from trigflow.data.loader import in_order
from trigflow.data.sources.hub import (
    Address,
    Columns,
    check_labels_of,
    encoded_image,
    find_columns,
    load_table,
    undecoded,
    wrong_label,
)
from trigflow.runtime.errors import UserError, on_one_line

NO_LABEL = -1


@dataclass(frozen=True)
class Shards:
    """The encoded images of a stream, shard by shard, and how to decode them. The table is a `datasets.IterableDataset` of
    undecoded images; the settings are those of `trigflow.data.decode.decode`."""

    table: Any
    columns: Columns
    where: str
    channels: int | None
    resize: int | None
    crop: bool

    def __len__(self) -> int:
        return int(self.table.num_shards)

    def read(self, shard: int) -> Iterator[dict[str, Any]]:
        """The rows of a shard, from its beginning. Raises a UserError if it cannot be read, with what the library says about
        it."""
        try:
            yield from self.table.shard(num_shards=len(self), index=shard)
        except (MemoryError, UserError):
            raise
        except Exception as error:  # the library has no base class for what can go wrong between here and the hub
            raise UserError(
                f"shard {shard} of {self.where!r} cannot be read ({on_one_line(error)}); expected a stream that stays within "
                "reach; check the network and go on with --resume"
            ) from error

    def decode(self, row: dict[str, Any], name: str) -> Tensor:
        """The image of a row, uint8, shape `(c, h, w)`; errors as `trigflow.data.decode.decode`."""
        content = encoded_image(row[self.columns.image], name)
        return decode(content, name, channels=self.channels, resize=self.resize, crop=self.crop)

    def examine(self, shard: int) -> tuple[list[tuple[tuple[int, ...], int, Any, int]], npt.NDArray[np.int64]]:
        """Of every image of a shard shape (0 for the corrupt), label, caption and CRC-32, and the counts of all of them, as
        `trigflow.data.rows.Scan` has them. Raises a UserError as `read`, and for a label that is no integer."""
        rows: list[tuple[tuple[int, ...], int, Any, int]] = []
        counts = np.zeros((4, 256), dtype=np.int64)
        for row in self.read(shard):
            name = f"row {len(rows)} of shard {shard}"
            label = None if self.columns.label is None else row[self.columns.label]
            if label is not None and type(label) is not int:
                raise wrong_label(f"{name} of {self.where!r}", label)
            caption = None if self.columns.caption is None else row[self.columns.caption]
            shape: tuple[int, ...] = (0, 0, 0)
            checksum = 0
            with suppress(CorruptImageError):
                checksum = zlib.crc32(encoded_image(row[self.columns.image], name))
                image = self.decode(row, name)
                shape = tuple(image.shape)
                counts[slice(1) if len(image) == 1 else slice(1, 4)] += count_values(image[None]).numpy()
            rows.append((shape, NO_LABEL if label is None else label, caption, checksum))
        return rows, counts


@dataclass(frozen=True, eq=False)
class StreamRows:
    """The images of a stream, to be asked for in the order of `trigflow.data.order.stream_order`; any other order is slow.

    Attributes:
        source: the stream.
        shape: `(c, h, w)` of one image.
        positions: of each image within its shard, int64, shape `(n,)`.
        shards: how many images each shard holds.
        window: see `trigflow.data.order.stream_order`.
    """

    source: Shards
    shape: tuple[int, int, int]
    positions: Tensor
    shards: tuple[int, ...]
    window: int
    state: _Reading = field(default_factory=lambda: _Reading())

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The images at these indices `(b,)`, uint8 `(b, c, h, w)`. Raises a UserError if the stream cannot be read, or is not
        as it was when it was indexed."""
        images = torch.empty(len(indices), *self.shape, dtype=torch.uint8)
        begins = np.cumsum([0, *self.shards])
        for image, index in zip(images, indices.tolist(), strict=True):
            shard = int(np.searchsorted(begins, index, side="right")) - 1
            begin = int(begins[shard])
            first = begin + (index - begin) // self.window * self.window
            rows = self._window(shard, first, min(first + self.window, int(begins[shard + 1])))
            name = f"row {int(self.positions[index])} of shard {shard}"
            try:
                decoded = self.source.decode(rows[index - first], name)
            except CorruptImageError as error:
                raise self._changed(name, error.reason) from error
            if decoded.shape != image.shape:
                raise self._changed(name, f"it is now {decoded.shape[2]}x{decoded.shape[1]}")
            image.copy_(decoded)
        return images

    def only(self, indices: Tensor) -> StreamRows:
        """These images alone, in the order of the stream. Raises a UserError if the indices do not rise."""
        if bool((indices[1:] <= indices[:-1]).any()):
            raise UserError(
                f"images of the stream {self.source.where!r} in an order of their own; expected rising indices; sort them, or "
                "open the data without stream=1"
            )
        ends = torch.tensor(self.shards).cumsum(0)
        shards = torch.bincount(torch.searchsorted(ends, indices, right=True), minlength=len(ends))
        return replace(self, positions=self.positions[indices], shards=tuple(shards.tolist()), state=_Reading())

    def _window(self, shard: int, first: int, end: int) -> list[dict[str, Any]]:
        """The rows of the images `first ... end - 1`, all of one window. The two windows asked for last are kept."""
        windows, positions = self.state.windows, self.positions[first:end].tolist()
        if first not in windows:
            if len(windows) > 1:
                del windows[next(iter(windows))]
            windows[first] = self.state.take(self.source, shard, positions)
            if len(windows[first]) != len(positions):
                raise self._changed(f"shard {shard}", "it is shorter")
        return windows[first]

    def _changed(self, name: str, reason: str) -> UserError:
        return UserError(
            f"{name} of {self.source.where!r} has changed since it was indexed ({reason}); expected the data that were there; "
            "name the revision (revision=), and start a new run"
        )


@dataclass
class _Reading:
    """How far one process has come in a stream; another begins anew."""

    shard: int = -1
    position: int = 0
    rows: Iterator[dict[str, Any]] = field(default_factory=lambda: iter(()))
    windows: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def take(self, source: Shards, shard: int, positions: Sequence[int]) -> list[dict[str, Any]]:
        """The rows at these rising positions of a shard."""
        if shard != self.shard or positions[0] < self.position:
            self.shard, self.position, self.rows = shard, 0, source.read(shard)
        wanted = set(positions)
        stop = positions[-1] + 1
        passed = enumerate(islice(self.rows, stop - self.position), self.position)
        self.position = stop
        return [row for position, row in passed if position in wanted]

    def __reduce__(self) -> tuple[type[_Reading], tuple[()]]:
        return _Reading, ()


def open_stream(
    address: Address,
    *,
    channels: int | None,
    resize: int | None,
    crop: bool,
    skip_corrupt: bool,
    progress: bool,
    workers: int,
    captions: bool,
) -> ImageDataset:
    """The stream of this address as a data set; the other arguments are those of `trigflow.data.open_dataset`.

    Raises:
        MissingExtraError: without `datasets`.
        UserError: as `trigflow.data.open_dataset`.
    """
    window = address.window
    table, state = load_table(address)
    columns = find_columns(address, table.features)
    table = undecoded(table, columns.image)
    source = Shards(table, columns, address.text, channels, resize, crop)
    subject = ["stream", address.text, channels, resize, crop, columns.caption]
    found = remembered(subject, [len(source), state], lambda: _scan(source, workers, progress))
    shapes, of_channels = found["shapes"], found["shapes"][:, 0]
    whole = of_channels.nonzero()[0]
    if (len(whole) < len(shapes) and not (skip_corrupt and len(whole))) or not len(whole):
        raise UserError(
            f"{len(shapes) - len(whole)} of the {len(shapes)} images of {address.text!r} are corrupt; expected whole PNG, JPEG "
            "or WebP images; choose other data, or leave single ones out with --skip-corrupt"
        )
    if len(np.unique(shapes[whole, 1:], axis=0)) > 1:
        raise UserError(f"images of {address.text!r} differ in size; expected one size; use --resize N")
    labels, class_names = check_labels_of(address, columns, found["labels"].tolist())
    shape = (channels or int(of_channels.max()), *shapes[whole[0], 1:].tolist())
    counts = found["counts"][:1] if shape[0] == 1 else found["counts"][1:] + found["counts"][:1]
    return ImageDataset(
        name=address.name,
        values=torch.empty(0, *shape, dtype=torch.uint8),
        labels=None if labels is None else torch.from_numpy(labels[whole]),
        class_names=class_names,
        captions=_captions(found, address.text, whole) if captions and columns.caption is not None else None,
        skipped=tuple(f"row {row}" for row in np.flatnonzero(of_channels == 0)),
        rows=StreamRows(
            replace(source, channels=shape[0]),
            shape,
            torch.from_numpy(found["positions"][whole]),
            tuple(np.bincount(found["shards"][whole], minlength=len(source)).tolist()),
            window,
        ),
        counts=torch.from_numpy(counts),
        digest=digest_of(torch.from_numpy(found["checksums"])),
    )


def _captions(found: Arrays, where: str, whole: npt.NDArray[np.int64]) -> Captions | None:
    """Those of the whole images, as far as one has any."""
    values = json.loads(found["captions"].tobytes())
    texts = [() if (value := values[row]) is None else captions_in(value, f"row {row} of {where!r}") for row in whole.tolist()]
    return Captions(texts) if any(texts) else None


def _scan(source: Shards, workers: int, progress: bool) -> Arrays:
    """Of every image: shape, label, caption (as JSON), and in which shard and where in it; and the counts of all."""
    examined = in_order(source.examine, range(len(source)), workers)
    found = list(tqdm(examined, desc="indexing shards", unit="shard", total=len(source), disable=not progress))
    rows, lengths = [row for rows, _ in found for row in rows], [len(rows) for rows, _ in found]
    try:
        captions = json.dumps([caption for _, _, caption, _ in rows]).encode()
    except TypeError as error:
        raise no_caption(f"a row of {source.where!r}", f"is no text ({error})", "a text or a list of texts") from None
    return {
        "shapes": np.array([shape for shape, *_ in rows], dtype=np.int64).reshape(-1, 3),
        "labels": np.array([label for _, label, *_ in rows], dtype=np.int64),
        "captions": np.frombuffer(captions, np.uint8),
        "checksums": np.array([checksum for *_, checksum in rows], dtype=np.int64),
        "shards": np.repeat(np.arange(len(found)), lengths),
        "positions": np.concatenate([np.arange(length) for length in lengths]) if lengths else np.zeros(0, np.int64),
        "counts": np.sum([counts for _, counts in found], axis=0),
    }
