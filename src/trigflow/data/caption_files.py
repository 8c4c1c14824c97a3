"""What is written of each picture: in a table `metadata.jsonl` or `metadata.csv`, or in a file beside it.

The first of these that says something of a picture decides, in folders, zips and tar shards alike::

    metadata.jsonl     in any folder, as the datasets library has them: `file_name`, relative to that folder, and a caption;
    metadata.csv       a picture of several rows has several captions
    a.png, a.json      belong together as a picture and its label do (see `trigflow.data.labels`)
    a.png, a.txt       the same; the whole file is one caption
    a.png, a.caption   the same

Tables and JSON have it under the first of `trigflow.data.captions.KEYS` that there is: a text, or a list of several (in a .csv
written as JSON). Those without any, and files that belong to no picture, are passed over. Pictures without a caption have the
empty one. Anything ambiguous is an error that names both files. Endings count in capitals or not.
"""

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from trigflow.data.captions import Captions, captions_in, no_caption, said
from trigflow.data.decode import CorruptImageError
from trigflow.data.labels import LABEL_FILE, first_part, pair
from trigflow.data.sources.files import Files
from trigflow.data.sources.hub import HubFiles
from trigflow.runtime.errors import UserError

TABLES = ("metadata.jsonl", "metadata.csv")
BESIDE = (".json", ".txt", ".caption")
MOST_LETTERS = 1 << 20
"""In a file that is one caption."""


class Written(NamedTuple):
    """What is written of a picture, in plain form, none where it is empty; and the file that says it."""

    texts: tuple[str, ...]
    source: str


def find_captions(files: Files, images: Sequence[str]) -> Captions | None:
    """The captions of these images, or None if not one has any; see `read_captions`."""
    found = read_captions(files, images)
    texts = [found[name].texts if name in found else () for name in images]
    return Captions(texts) if any(texts) else None


def read_captions(files: Files, images: Sequence[str]) -> dict[str, Written]:
    """What is written of the images, by the names of those of which something is, be it empty; the module says where.

    Args:
        files: the folder, zip, tar shards or data set of the Hugging Face hub, which has captions in a column.
        images: names of the images in it.

    Raises:
        UserError: naming a file that is no text, or two of which it cannot be told which belongs to an image; or for a table
            that names an image which is not there.
    """
    if isinstance(files, HubFiles):
        values = zip(files.names, files.captions(), strict=False)
        return {n: Written(captions_in(v, f"{n} of {files.where!r}"), n) for n, v in values if v is not None}
    likely = [(index, name) for index, name in enumerate(files.names) if name.lower().endswith((*TABLES, *BESIDE))]
    if not likely:
        return {}
    images = list(images)
    found = _from_tables(files, likely, set(images))
    beside: dict[str, dict[str, tuple[str, ...]]] = {ending: {} for ending in BESIDE}
    parts = {first_part(image) for image in images}
    for index, name in likely:
        ending, belongs = posixpath.splitext(name)[1].lower(), first_part(name) in parts and name.lower() != LABEL_FILE
        if ending in beside and belongs and (texts := _beside(files, index, ending)) is not None:
            beside[ending][name] = texts
    for ending, texts_of in beside.items():
        for image, name in pair(images, [*texts_of], files.where, "captions", ending).items() if texts_of else ():
            found.setdefault(image, Written(texts_of[name], name))
    return found


def _beside(files: Files, index: int, ending: str) -> tuple[str, ...] | None:
    """The captions in a file beside an image; None for JSON that has none."""
    where = f"{files.names[index]!r} in {files.where!r}"
    value: Any = _text(files, index)
    if ending == ".json":
        value = said(content) if isinstance(content := _parsed(value, where), dict) else None
    elif len(value) > MOST_LETTERS:
        raise no_caption(where, f"has {len(value)} letters", f"at most {MOST_LETTERS}")
    return None if value is None else captions_in(value, where)


def _from_tables(files: Files, likely: Sequence[tuple[int, str]], images: set[str]) -> dict[str, Written]:
    found: dict[str, Written] = {}
    for index, table in likely:
        folder, _, last = table.rpartition("/")
        for number, row in _rows(files, index) if last.lower() in TABLES else ():
            where = f"row {number} of {table!r} in {files.where!r}"
            if (value := said(row)) is None:
                continue
            name = row.get("file_name")
            name = posixpath.normpath(posixpath.join(folder, name.replace("\\", "/"))) if isinstance(name, str) else None
            if name is None or files.find(name) is None:
                raise no_caption(where, f"is of {name!r}, which is not there", 'a path relative to the table as "file_name"')
            if name not in images:
                continue
            before = found.get(name, Written((), table))
            if before.source != table:
                raise UserError(
                    f"{before.source!r} and {table!r} in {files.where!r} both have captions of {name!r}; expected one table "
                    "an image; remove one of the two"
                )
            found[name] = Written(before.texts + captions_in(value, where), table)
    return found


def _rows(files: Files, index: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table with their numbers, from 1."""
    name, text = files.names[index], _text(files, index)
    if name.lower().endswith(".csv"):
        try:
            for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), 1):
                yield number, {key: _listed(value) for key, value in row.items()}
        except csv.Error as error:
            raise no_caption(f"{name!r} in {files.where!r}", f"cannot be read ({error})", "a table in CSV") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = _parsed(line, where := f"row {number} of {name!r} in {files.where!r}")
            if not isinstance(row, dict):
                raise no_caption(where, "cannot be read", "an object in JSON on each line")
            yield number, row


def _listed(value: Any) -> Any:
    """The list that a field of a .csv holds as JSON, or the field as it is."""
    try:
        return json.loads(value) if isinstance(value, str) and value.startswith('["') else value
    except ValueError:
        return value


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise no_caption(where, "cannot be read", "JSON") from None


def _text(files: Files, index: int) -> str:
    try:
        return files.read(index).decode("utf-8-sig")
    except (UnicodeDecodeError, CorruptImageError):
        raise no_caption(f"{files.names[index]!r} in {files.where!r}", "is no text", "UTF-8 in a whole file") from None
