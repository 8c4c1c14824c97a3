"""Which class each image belongs to: from `dataset.json`, from the `.cls` file beside it, or from the folder that it is in.

The first of these that there is decides, in folders, zips and tar shards alike, but that folders in tar shards are no classes::

    dataset.json       at the root, in the convention of EDM and StyleGAN: every image and its number
    a.png, a.cls       belong together, having one name before the last ending; where an image has no such label, also those
                       that have one name before the first dot (a.rgb.png, a.cls), if no other image or label has it
    cat/a.png          the first-level folders are the classes, whatever lies deeper inside them

Anything ambiguous is an error that names both files. Endings count in capitals or not.
"""

import json
import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Sequence

from trigflow.conditions import check_class_names, printable
from trigflow.data.dataset import number_classes
from trigflow.data.decode import CorruptImageError
from trigflow.data.sources.files import Files, FolderFiles
from trigflow.data.sources.hub import HubFiles
from trigflow.data.sources.tars import SPLITS, TarFiles
from trigflow.runtime.errors import UserError

LABEL_FILE = "dataset.json"
LABEL_FORMAT = '{"labels": [["path/img.png", 3], ...]} or {"labels": null}'
CLASS_ENDING = ".cls"
MAX_CLASSES = 1_000_000


def find_labels(files: Files, images: Sequence[str]) -> tuple[list[int] | None, tuple[str, ...]]:
    """One label an image, or None, and the class names.

    The module says where they are from. With a `dataset.json` or `.cls` files, which hold the label in digits, the classes are
    called "0", "1", ... up to the largest. Folders that are classes are in the order of their names, by value where all of
    them are numbers (1, 2, 10). Images that all lie in the root, and those of tar shards, have no labels without such files.
    A data set of the Hugging Face hub has its labels in a column.

    Args:
        files: the folder, zip or tar shards.
        images: names of the images in it.

    Raises:
        UserError: if some images lie in the root and others in sub-folders; the sub-folders are the splits of a data set;
            `dataset.json` is malformed, names a file that is not there, or leaves an image out; some images have a `.cls` and
            others not, or one holds something else; or a folder that is a class has a name that cannot be printed.
    """
    if isinstance(files, HubFiles):
        check_class_names(files.class_names, f"{files.where!r}")
        return None if files.labels is None else files.labels.tolist(), files.class_names
    if not isinstance(files, TarFiles) and label_file(files) is not None:
        return _labels_from_json(files, images)
    if labels := label_files(files):
        return _labels_beside(files, images, labels)
    if isinstance(files, TarFiles):
        return None, ()
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
    ordered = class_order(set(folders))
    check_class_names(ordered, f"{files.where!r}")
    class_names = tuple(map(printable, ordered))
    _check_no_splits(files, class_names, nested=any(name.count("/") > 1 for name in images))
    number = {folder: label for label, folder in enumerate(ordered)}
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
        wrong = f"names {len(absent)} image(s) not there, such as {absent[0]!r}"
        raise _bad_json(files, wrong, "paths relative to its own folder", "add the images or remove their entries")
    unlisted = [name for name in images if name not in labels]
    if unlisted:
        wrong = f"leaves out {len(unlisted)} image(s), such as {unlisted[0]!r}"
        raise _bad_json(files, wrong, "one entry an image", "add entries for them or remove the images")
    return [labels[name] for name in images], number_classes(labels.values())


def _check_no_splits(files: Files, folders: Sequence[str], nested: bool) -> None:
    if {folder.lower() for folder in folders}.issubset(SPLITS) and (nested or len(folders) > 1):
        where = os.path.join(files.where, next((name for name in folders if name.lower().startswith("train")), folders[0]))
        remedy = f"name the split: --data {where}" if isinstance(files, FolderFiles) else "unpack it, and name the split"
        raise UserError(
            f"{files.where!r} holds parts of a data set ({', '.join(folders)}), not classes; expected one of them; {remedy}"
        )


def _labels_beside(files: Files, images: Sequence[str], labels: Sequence[int]) -> tuple[list[int], tuple[str, ...]]:
    found = pair(images, [files.names[index] for index in labels], files.where)
    unlabelled = [name for name in images if name not in found]
    if unlabelled:
        raise UserError(
            f"{len(unlabelled)} image(s) in {files.where!r} have no label, such as {unlabelled[0]!r}; expected a "
            f"{CLASS_ENDING} file beside every image or beside none; add the missing ones"
        )
    place = {files.names[index]: index for index in labels}
    numbers = [_parse_class(files, place[found[name]]) for name in images]
    return numbers, number_classes(numbers)


def pair(
    images: Sequence[str], labels: Sequence[str], where: str, kind: str = "labels", ending: str = CLASS_ENDING
) -> dict[str, str]:
    """The label of each image that has one, by names: equal before the last ending, or else, alone so, before the first dot.

    Files of another `kind` and `ending` than labels are found in the same way. Raises a UserError for two images or two labels
    of which it cannot be told what belongs to which, naming both.
    """
    of_stem: dict[str, str] = {}
    for label in labels:
        if (stem := posixpath.splitext(label)[0]) in of_stem:
            raise _ambiguous(kind, of_stem[stem], label, where, kind, ending)
        of_stem[stem] = label
    found: dict[str, str] = {}
    owner: dict[str, str] = {}
    rest = []
    for image in images:
        label = of_stem.get(posixpath.splitext(image)[0], "")
        if label in owner:
            raise _ambiguous("images", owner[label], image, where, kind, ending)
        if label:
            found[image], owner[label] = label, image
        else:
            rest.append(image)
    free = {label for label in labels if label not in owner}
    if rest and free:
        images_of, labels_of = _by_first_part(images), _by_first_part(labels)
        for image in rest:
            same = images_of[first_part(image)], labels_of.get(first_part(image), [])
            if free.isdisjoint(same[1]):
                continue
            for what, names in zip(("images", kind), same, strict=True):
                if len(names) > 1:
                    raise _ambiguous(what, names[0], names[1], where, kind, ending)
            found[image] = same[1][0]
    return found


def first_part(name: str) -> str:
    """A path up to the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".", 1)[0]


def _by_first_part(names: Iterable[str]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for name in names:
        groups[first_part(name)].append(name)
    return groups


def _ambiguous(what: str, one: str, other: str, where: str, kind: str, ending: str) -> UserError:
    return UserError(
        f"the {what} {one!r} and {other!r} in {where!r} are named alike, so that {kind} cannot be told apart; expected one "
        f"image and one {ending} of a name; rename one of the two"
    )


def label_files(files: Files) -> list[int]:
    """Numbers of the files that hold the label of one image."""
    return [index for index, name in enumerate(files.names) if name.lower().endswith(CLASS_ENDING)]


def label_file(files: Files) -> str | None:
    """Name of the `dataset.json` at the root, or None."""
    if files.find(LABEL_FILE) is not None:
        return LABEL_FILE
    return next((name for name in files.names if name.lower() == LABEL_FILE), None)


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
    """The bytes of the file of this name; empty where there is none; errors as `Files.read`."""
    index = files.find(name)
    return b"" if index is None else files.read(index)


def _read_entries(files: Files) -> list[tuple[str, int]] | None:
    """The `[path, label]` pairs of `dataset.json`, or None where it says that there are no labels."""
    try:
        content = json.loads(read_named(files, label_file(files) or LABEL_FILE))
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
