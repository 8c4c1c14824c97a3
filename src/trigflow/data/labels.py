"""Which class each image belongs to: from the folder names, from `dataset.json`, or from the `.cls` files of tar shards."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Sequence

from trigflow.data.dataset import number_classes
from trigflow.data.decode import CorruptImageError
from trigflow.data.sources.files import Files
from trigflow.data.sources.hub import HubFiles
from trigflow.data.sources.tars import TarFiles, sample_key
from trigflow.runtime.errors import UserError

LABEL_FILE = "dataset.json"
LABEL_FORMAT = '{"labels": [["path/img.png", 3], ...]} or {"labels": null}'
CLASS_ENDING = ".cls"
MAX_CLASSES = 1_000_000


def find_labels(files: Files, images: Sequence[str]) -> tuple[list[int] | None, tuple[str, ...]]:
    """One label an image, or None, and the class names.

    With a `dataset.json` at the root, in the convention of EDM and StyleGAN, the labels are those it lists and the class
    names "0", "1", ... up to the largest. Otherwise the first-level sub-folders that hold images are the classes, whatever lies
    deeper inside them, in the order of their names, by value where all of them are numbers (1, 2, 10); and images that all lie
    in the root have no labels.

    A data set of the Hugging Face hub has its labels in a column.

    In tar shards the file that is named as the image but ends in `.cls` holds the label in digits; without such files there
    are no labels. Classes are called as with a `dataset.json`.

    Args:
        files: the folder, zip or tar shards.
        images: names of the images in it.

    Raises:
        UserError: if some images lie in the root and others in sub-folders; `dataset.json` is malformed, names a file that
            is not there, or leaves an image out; or some images have a `.cls` and others not, or one holds something else.
    """
    if isinstance(files, HubFiles):
        return None if files.labels is None else files.labels.tolist(), files.class_names
    if isinstance(files, TarFiles):
        return _labels_from_tars(files, images)
    if files.find(LABEL_FILE) is not None:
        return _labels_from_json(files, images)
    flat = [name for name in images if "/" not in name]
    if len(flat) == len(images):
        return None, ()
    if flat:
        nested = next(name for name in images if "/" in name)
        raise UserError(
            f"{files.where!r} holds images both in its root ({flat[0]!r}) and in sub-folders ({nested!r}); expected either "
            f"one sub-folder a class or no sub-folders; move the {len(flat)} root images, or add a {LABEL_FILE}"
        )
    folders = [name.split("/", 1)[0] for name in images]
    class_names = class_order(set(folders))
    number = {folder: label for label, folder in enumerate(class_names)}
    return [number[folder] for folder in folders], class_names


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in the order of their numbers: by value where all of them are numbers, else as text."""
    found = sorted(names)
    return tuple(sorted(found, key=int) if all(name.isdecimal() for name in found) else found)


def _labels_from_json(files: Files, images: Sequence[str]) -> tuple[list[int] | None, tuple[str, ...]]:
    entries = _read_entries(files)
    if entries is None:
        return None, ()
    labels: dict[str, int] = {}
    for name, label in entries:
        if name in labels:
            raise _bad_json(files, f"lists {name!r} twice", "one entry an image", "remove one of the two")
        labels[name] = label
    absent = sorted(labels.keys() - set(images))
    if absent:
        raise _bad_json(
            files,
            f"names {len(absent)} image(s) not there, such as {absent[0]!r}",
            "paths relative to its own folder",
            "add the images or remove their entries",
        )
    unlisted = [name for name in images if name not in labels]
    if unlisted:
        raise _bad_json(
            files,
            f"leaves out {len(unlisted)} image(s), such as {unlisted[0]!r}",
            "one entry an image",
            "add entries for them or remove the images",
        )
    return [labels[name] for name in images], number_classes(labels.values())


def _labels_from_tars(files: TarFiles, images: Sequence[str]) -> tuple[list[int] | None, tuple[str, ...]]:
    indices = {sample_key(name): index for index, name in enumerate(files.names) if name.endswith(CLASS_ENDING)}
    if not indices:
        return None, ()
    keys = [sample_key(name) for name in images]
    unlabelled = [name for name, key in zip(images, keys, strict=True) if key not in indices]
    if unlabelled:
        raise UserError(
            f"{len(unlabelled)} image(s) in {files.where!r} have no label, such as {unlabelled[0]!r}; expected a "
            f"{CLASS_ENDING} file beside every image or beside none; add the missing ones"
        )
    labels = [_parse_class(files, indices[key]) for key in keys]
    return labels, number_classes(labels)


def _parse_class(files: Files, index: int) -> int:
    try:
        text = files.read(index)
    except CorruptImageError:
        text = b""
    if not (text.strip().isdigit() and len(text) < 20 and int(text) < MAX_CLASSES):
        shown = text[:40].decode("utf-8", "replace")
        raise UserError(
            f"{files.names[index]!r} in {files.where!r} holds {shown!r}; expected an integer from 0 to {MAX_CLASSES - 1}; "
            "correct the label"
        )
    return int(text)


def read_named(files: Files, name: str) -> bytes:
    """The bytes of the file of this name; empty where there is none.

    Raises:
        UserError, CorruptImageError: as `Files.read`.
    """
    index = files.find(name)
    return b"" if index is None else files.read(index)


def _read_entries(files: Files) -> list[tuple[str, int]] | None:
    """The `[path, label]` pairs of `dataset.json`, or None where it says that there are no labels."""
    try:
        content = json.loads(read_named(files, LABEL_FILE))
    except (ValueError, RecursionError, CorruptImageError) as error:
        raise _bad_json(files, "is not valid JSON", LABEL_FORMAT, "correct the file") from error
    if not isinstance(content, dict) or "labels" not in content:
        raise _bad_json(files, 'has no "labels"', LABEL_FORMAT, "correct the file")
    entries = content["labels"]
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise _bad_json(files, 'has "labels" that are not a list', LABEL_FORMAT, "correct the file")
    return [_check_entry(files, entry) for entry in entries]


def _check_entry(files: Files, entry: object) -> tuple[str, int]:
    if isinstance(entry, list) and len(entry) == 2:
        name, label = entry
        # type(...) is int, because True is an int too.
        if isinstance(name, str) and type(label) is int and 0 <= label < MAX_CLASSES:
            return posixpath.normpath(name.replace("\\", "/")), label
    shown = json.dumps(entry)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    expected = f"a path and an integer from 0 to {MAX_CLASSES - 1}"
    raise _bad_json(files, f"has the entry {shown}", expected, "correct the entry")


def _bad_json(files: Files, wrong: str, expected: str, remedy: str) -> UserError:
    return UserError(f"{LABEL_FILE} in {files.where!r} {wrong}; expected {expected}; {remedy}")
