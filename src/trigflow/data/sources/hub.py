"""Data sets of the Hugging Face hub, or of its `datasets` library on disk, by an address such as

    hf:uoft-cs/cifar10?split=test
    hf:/data/my_set                         what `save_to_disk` wrote, or a folder that `load_dataset` understands
    hf:org/name?stream=1&window=4096        read over the network as training asks, nothing kept on disk

with, after `?` and joined by `&`: `split` (train), `config`, `revision`, `image` and `label` (the columns; found by their types
when there is one of each), `caption` (the column; the first of `trigflow.data.captions.KEYS` that holds texts), `stream` and
`window` (see `trigflow.data.stream`). Parquet files are opened by their path or that of their folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt

from trigflow.data.captions import KEYS
from trigflow.data.dataset import number_classes
from trigflow.data.decode import CorruptImageError
from trigflow.data.sources.files import Files, Names, read_file
from trigflow.runtime.errors import MissingExtraError, UserError, on_one_line

PREFIX = "hf:"
PARQUET = ".parquet"
SETTINGS = {
    "split": "train", "config": "", "revision": "", "image": "", "label": "", "caption": "", "stream": "0", "window": "1024",
}  # fmt: skip
EXAMPLE = "hf:org/name?split=train&image=image&label=label"


@dataclass(frozen=True)
class Address:
    """What an address says. `settings` are all of `SETTINGS`, as given or as they are by default."""

    text: str
    name: str
    settings: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Address:
        """Take an address apart. Raises a UserError if it is none."""
        name, _, query = text.removeprefix(PREFIX).partition("?")
        try:
            given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True)) if query else {}
        except ValueError:
            given = {query: ""}
        unknown = sorted(given.keys() - SETTINGS.keys())
        if not name or unknown:
            wrong = f"sets {unknown[0]!r}" if unknown else "names no data set"
            raise UserError(
                f"{text!r} {wrong}; expected an address like {EXAMPLE}, with any of {', '.join(SETTINGS)}; correct it"
            )
        return cls(text, os.path.expanduser(name), {**SETTINGS, **given})

    @property
    def streams(self) -> bool:
        """Whether the data are to be read over the network as training asks."""
        return self.settings["stream"] not in ("0", "")

    @property
    def window(self) -> int:
        """Samples that are shuffled with each other in a stream. Raises a UserError if it is no number from 1."""
        text = self.settings["window"]
        if not text.isdecimal() or not 1 <= int(text) <= 1_000_000:
            raise UserError(f"window={text} in {self.text!r}; expected a number from 1 to 1000000; correct it")
        return int(text)


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table that hold images, labels and captions, None for none, and of its classes."""

    image: str
    label: str | None
    class_names: tuple[str, ...]
    caption: str | None


@dataclass(frozen=True, eq=False)
class HubFiles(Files):
    """The images of a table, encoded, by row.

    Attributes:
        names: "row 0", "row 1", ...
        table: a `datasets.Dataset` with one column of undecoded images.
        column: its name.
        rows: which row each image is, int64, shape `(n,)`.
        labels: of each image, int64, shape `(n,)`; or None.
        class_names: one a class.
        texts: a `datasets.Dataset` with one column of captions; or None.
    """

    table: Any
    column: str
    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None
    class_names: tuple[str, ...]
    texts: Any

    @classmethod
    def of(cls, text: str) -> HubFiles:
        """Open the data set of this address, downloading it where it is not on disk.

        Raises:
            MissingExtraError: without `datasets`.
            UserError: if there is no such data set, or it holds no images.
        """
        address = Address.parse(text)
        table, _ = load_table(address)
        columns = find_columns(address, table.features)
        labels, class_names = check_labels_of(address, columns, table[columns.label][:] if columns.label else [])
        images = undecoded(table.select_columns([columns.image]), columns.image)
        texts = None if columns.caption is None else table.select_columns([columns.caption])
        count = len(images)
        names = Names(f"row {row}" for row in range(count))
        return cls(text, names, images, columns.image, np.arange(count), labels, class_names, texts)

    def read(self, index: int) -> bytes:
        return encoded_image(self.table[int(self.rows[index])][self.column], self.names[index])

    def only(self, indices: Sequence[int]) -> HubFiles:
        chosen = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[chosen]
        return replace(super().only(indices), rows=self.rows[chosen], labels=labels)

    def images(self) -> Sequence[int]:
        return range(len(self))

    def captions(self) -> list[Any]:
        """What the column of captions holds of each image; nothing without one."""
        if self.texts is None:
            return []
        values = self.texts[self.texts.column_names[0]][:]
        return [values[row] for row in self.rows.tolist()]

    def identity(self) -> list[Any]:
        return [self.where, str(self.table._fingerprint)]


def load_table(address: Address) -> tuple[Any, str]:
    """The `datasets.Dataset`, or with `stream=1` the `datasets.IterableDataset`, of an address; and of the latter what differs
    when its files do: a path with a digest of their places and commits, or times of the last change.

    Raises:
        MissingExtraError: without `datasets`.
        UserError: if it cannot be had, with what the library says about it.
    """
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(f"the data {address.text!r}", "datasets", "hf") from error
    given = address.settings
    saved = [file for file in ("state.json", "dataset_dict.json") if os.path.isfile(os.path.join(address.name, file))]
    try:
        if saved and not address.streams:
            found = datasets.load_from_disk(address.name)
            if saved != ["state.json"]:
                return found[given["split"]], ""
            if given["split"] not in (SETTINGS["split"], str(found.split)):
                raise UserError(
                    f"{address.text!r} names a split of a single table, saved as {found.split}; expected a folder of "
                    "several splits; leave split= out"
                )
            return found, ""
        parquet = address.name.lower().endswith(PARQUET) and os.path.isfile(address.name)
        place = ("parquet",) if parquet else (address.name, given["config"] or None)
        options = {"data_files": address.name if parquet else None, "revision": given["revision"] or None}
        if address.streams:
            builder = datasets.load_dataset_builder(*place, **options)
            return builder.as_streaming_dataset(split=given["split"]), str(builder.cache_dir)
        return datasets.load_dataset(*place, split=given["split"], **options), ""
    except (MemoryError, UserError):
        raise
    except Exception as error:  # the library has no base class for what can go wrong between here and the hub
        raise UserError(
            f"{address.text!r} cannot be opened ({on_one_line(error)}); expected a data set that datasets.load_dataset opens; "
            "check its name, split and config, and the network"
        ) from error


def find_columns(address: Address, features: Any) -> Columns:
    """The columns that the address names, or the only ones of their types. Raises a UserError if there is no such column, or
    more than one."""
    kinds = {name: type(kind).__name__ for name, kind in (features or {}).items()}
    image = _column(address, "image", kinds, [name for name, kind in kinds.items() if kind == "Image"])
    if image is None:
        raise UserError(
            f"{address.text!r} has no column of images among {', '.join(kinds) or 'none'}; expected one; name it with image="
        )
    label = _column(address, "label", kinds, [name for name, kind in kinds.items() if kind == "ClassLabel"])
    names = getattr(features[label], "names", None) if label is not None else None
    written = [name for name in KEYS if name in kinds and _is_text(features[name])]
    return Columns(image, label, tuple(names or ()), _column(address, "caption", kinds, written[:1]))


def _is_text(feature: Any) -> bool:
    """Whether a column holds a text in each row, or a list of them."""
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    return getattr(inner, "dtype", None) in ("string", "large_string")


def undecoded(table: Any, column: str) -> Any:
    """The table with the files of its images instead of their pixels. Raises a UserError if the column can hold none."""
    import datasets

    try:
        return table.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"the column {column!r} holds no images ({on_one_line(error)}); expected image files; choose another with image="
        ) from None


def encoded_image(value: Any, name: str) -> bytes:
    """The file of an undecoded image: held in the table, or at a path.

    Raises:
        CorruptImageError: if there is none.
        UserError: if a path cannot be read.
    """
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, None)
    if content is not None:
        return bytes(content)
    if path is None:
        raise CorruptImageError(name, "there is no image in this row")
    return read_file(path)


def check_labels_of(
    address: Address, columns: Columns, labels: Sequence[Any]
) -> tuple[npt.NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels as integers, and the names of their classes; None without any, and if all are -1, as in test sets whose labels are
    kept secret. Raises a UserError if some are missing, or no integers."""
    values, class_names = list(labels), columns.class_names
    if all(value == -1 for value in values):
        return None, ()
    wrong = next((i for i, v in enumerate(values) if type(v) is not int or not 0 <= v < (len(class_names) or 1_000_000)), None)
    if wrong is not None:
        raise wrong_label(f"row {wrong} of {address.text!r}", values[wrong])
    return np.array(values, dtype=np.int64), class_names or number_classes(values)


def wrong_label(where: str, label: object) -> UserError:
    """The error for a label that names no class."""
    return UserError(
        f"{where} has the label {label!r}; expected an integer that names a class; choose another column with label="
    )


def _column(address: Address, what: str, kinds: dict[str, str], fitting: list[str]) -> str | None:
    named = address.settings[what]
    if named and named not in kinds:
        raise UserError(f"{address.text!r} has no column {named!r}; expected one of {', '.join(kinds)}; correct {what}=")
    if named:
        return named
    if len(fitting) > 1:
        raise UserError(
            f"{address.text!r} has {len(fitting)} columns that may be the {what}: {', '.join(fitting)}; expected one; choose "
            f"with {what}="
        )
    return fitting[0] if fitting else None
