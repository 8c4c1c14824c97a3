"""Reading a whole data set to say what is wrong with it: `trigflow data check`.

Problems are what training would stop at, pass over or learn wrongly. Notes are what it copes with, but its owner may not know.
"""

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from trigflow.codecs import codec_from_state
from trigflow.codecs.vae import CHANNELS
from trigflow.conditions import Conditioner, Text, named
from trigflow.conditions.told import quoted
from trigflow.data.caption_files import read_captions
from trigflow.data.decode import CorruptImageError, decode, is_turned, open_image
from trigflow.data.findings import Report
from trigflow.data.labels import find_labels, label_files, pair
from trigflow.data.latent_files import ENDING as LATENT_ENDING
from trigflow.data.latent_files import describe_latents, parse
from trigflow.data.loader import in_order
from trigflow.data.rows import chunks_of
from trigflow.data.sources.containers import examine_container, note_others
from trigflow.data.sources.files import Files
from trigflow.data.sources.opening import EMBEDDED, check_resize
from trigflow.data.sources.tars import TarFiles
from trigflow.models.model import read_description
from trigflow.runtime.errors import UserError

FLAT = 0.02
"""Standard deviation of pixels in [-1, 1] below which a data set is close to one single colour."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of one file.

    Attributes:
        problem: why it cannot be used; None if it can.
        shape: `(c, h, w)`; empty where there is a problem.
        digest: of the decoded values; two files with the same show the same.
        traits: what is unusual about how they are stored.
    """

    problem: str | None = None
    shape: tuple[int, ...] = ()
    digest: bytes = b""
    traits: tuple[str, ...] = ()


Sums = dict[int, npt.NDArray[np.float64]]
"""Of images of each number of channels: count, sum and sum of squares of the values of each channel, `(3, c)`."""


def check_data(
    source: str,
    *,
    resize: int | None = None,
    like: str | os.PathLike[str] | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Report:
    """Read and decode all that there is in a data set of any kind, and report on it.

    Args:
        source: path of a folder, zip, tar or folder of tars, of images or latents; or the address of a Hugging Face data set.
        resize: as for training: images may then be of any size.
        like: folder of a finished run whose data these are to resemble: in size, classes, mean and deviation.
        workers: processes that read and decode; 0 for this one alone.
        progress: draw a progress bar on stderr.

    Raises:
        UserError: if there is no such data, it cannot be read at all, or `resize` is out of range.
        MissingExtraError: for a Hugging Face data set, without `datasets`.
    """
    check_resize(resize)
    model = None if like is None else read_description(Path(like) / "model.json")
    if source in EMBEDDED:
        raise UserError(f"{source!r} comes with a package; expected data of your own to check; pass a path")
    files, report = examine_container(source)
    latents = [index for index, name in enumerate(files.names) if name.lower().endswith(LATENT_ENDING)]
    images = files.images()
    if latents and len(images):
        report.problem("mixture", files.names[latents[0]], f"is a latent beside images such as {files.names[images[0]]!r}")
    chosen = files.only(latents if latents and not len(images) else images)
    if len(chosen) == 0:
        raise UserError(f"no images or latents in {source!r}; expected some; check the path or convert the images")
    report.of = "latents" if latents and not len(images) else "images"
    report.images = len(chosen)
    names, labels, channels = _labels(files, chosen, report)
    note_others(files, _captions(files, chosen, report), report)
    see_latent, see_image = functools.partial(_see_latent, channels=channels), functools.partial(_see_image, resize=resize)
    examine = functools.partial(_examine, chosen, see_latent if report.of == "latents" else see_image)
    seen, sums = list[Seen](), Sums()
    with tqdm(total=len(chosen), desc="checking", unit="image", disable=not progress) as bar:
        for part, found in in_order(examine, chunks_of(len(chosen)), workers):
            seen += part
            sums |= {channels: sums.get(channels, 0) + more for channels, more in found.items()}
            bar.update(len(part))
    for name, one in zip(chosen.names, seen, strict=True):
        if one.problem is not None:
            report.problem("corrupt", name, one.problem)
    _compare_sizes(chosen, seen, report)
    _find_duplicates(chosen, seen, names, labels, report)
    _count_traits(chosen, seen, report)
    _measure(sums, report)
    if model is not None:
        _compare_with(model, os.fspath(like or ""), seen, names, report)
    return report


# One file ------------------------------------------------------------------------------------------------------------


See = Callable[[bytes, str], tuple[Tensor, tuple[str, ...]]]
"""Gives the values in a file (content, name), and what is unusual about how they are stored."""


def _examine(files: Files, see: See, indices: Sequence[int]) -> tuple[list[Seen], Sums]:
    sums = Sums()
    return [_examine_one(files, see, index, sums) for index in indices], sums


def _examine_one(files: Files, see: See, index: int, sums: Sums) -> Seen:
    try:
        values, traits = see(files.read(index), files.names[index])
    except CorruptImageError as error:
        return Seen(error.reason)
    except UserError as error:
        return Seen(str(error).split(";")[0])
    flat = values.flatten(1).double()
    rows = torch.stack([torch.ones_like(flat).sum(dim=1), flat.sum(dim=1), flat.square().sum(dim=1)])
    sums[len(flat)] = sums.get(len(flat), 0) + rows.numpy()
    return Seen(None, tuple(values.shape), _digest(values), traits)


def _see_image(content: bytes, name: str, resize: int | None) -> tuple[Tensor, tuple[str, ...]]:
    image = decode(content, name, channels=None, resize=resize, crop=True).contiguous()
    return image, _traits(content, name)


def _see_latent(content: bytes, name: str, channels: int) -> tuple[Tensor, tuple[str, ...]]:
    return parse(content, name, channels), ()


def _digest(values: Tensor) -> bytes:
    return hashlib.blake2b(values.numpy().tobytes(), digest_size=16, salt=repr(tuple(values.shape)).encode()[:16]).digest()


def _traits(content: bytes, name: str) -> tuple[str, ...]:
    """What is unusual about how an image is stored, of an image that can be decoded."""
    with open_image(content, name) as image:
        found = {
            "is CMYK, and becomes RGB": image.mode == "CMYK",
            "has a palette, and becomes RGB": image.mode == "P",
            "has 16 bits, of which the high 8 are kept": image.mode.startswith("I"),
            "is an animation, of which the first frame is taken": getattr(image, "n_frames", 1) > 1,
            "is transparent, and is laid on white": "A" in image.getbands() or "transparency" in image.info,
            "is turned as its EXIF data say": is_turned(image),
        }
    return tuple(trait for trait, there in found.items() if there)


# All of them ---------------------------------------------------------------------------------------------------------


def _labels(files: Files, chosen: Files, report: Report) -> tuple[tuple[str, ...], list[int] | None, int]:
    """Class names and labels, and how many channels latents are said to have; a problem where they contradict themselves."""
    channels = CHANNELS
    try:
        if report.of == "latents":
            channels = describe_latents(files)[0].depth
        labels, names = find_labels(files, chosen.names)
        if report.of == "latents":
            names = describe_latents(files, len(names))[1] or names
    except UserError as error:
        report.problem("labels", report.source, str(error).split(";")[0])
        return (), None, channels
    beside = [files.names[index] for index in label_files(files)]
    if labels is not None and beside:
        of_images = {*pair(chosen.names, beside, files.where).values()}
        for name in beside:
            if name not in of_images:
                report.problem("labels", name, "is the label of no image")
    if labels is None and isinstance(files, TarFiles):
        folders = {name.split("/", 2)[1] for name in chosen.names if name.count("/") > 1}
        if len(folders) > 1:
            report.note("classes", min(folders), f"and {len(folders) - 1} other folders in tar shards are no classes")
    if labels is not None:
        counts = Counter(labels)
        report.classes = {name: counts[label] for label, name in enumerate(names)}
        empty = [name for name, count in report.classes.items() if count == 0]
        if empty:
            report.note("classes", empty[0], f"and {len(empty) - 1} other classes have no {report.of}")
        if len(counts) == 1:
            report.problem("labels", names[labels[0]], "is the only class; training by class needs two")
    return names, labels, channels


def _captions(files: Files, chosen: Files, report: Report) -> set[str]:
    """Notes on what is written of the images, where something is; the names of the files that say it."""
    try:
        found = read_captions(files, chosen.names)
    except UserError as error:
        report.problem("captions", report.source, str(error).split(";")[0])
        return set()
    if not found:
        return set()
    report.captions = sum(bool(written.texts) for written in found.values())
    missing = [name for name in chosen.names if name not in found]
    empty = [name for name in chosen.names if name in found and not found[name].texts]
    for names, what in ((missing, "no caption"), (empty, "an empty caption")):
        if names:
            report.note("captions", names[0], f"has {what}, and is learned without words; {len(names)} such {report.of}")
    names_of: dict[str, list[str]] = {}
    for name in chosen.names:
        for text in dict.fromkeys(found[name].texts if name in found else ()):
            names_of.setdefault(text, []).append(name)
    repeated = [text for text, names in names_of.items() if len(names) > 1]
    if repeated:
        most = max(repeated, key=lambda text: len(names_of[text]))
        first, second, *rest = names_of[most]
        what = f"has the caption {quoted(most)}, and so have {second!r} and {len(rest)} others; {len(repeated)} such captions"
        report.note("captions", first, what)
    limit = Text().length - 1
    long = {text: length for text in names_of if (length := len(text.encode())) > limit}
    if long:
        longest = max(long, key=lambda text: long[text])
        what = f"has a caption of {long[longest]} bytes; {len(long)} are cut at the {limit} that networks read by default"
        report.note("captions", names_of[longest][0], what)
    return {written.source for written in found.values()}


def _compare_sizes(files: Files, seen: Sequence[Seen], report: Report) -> None:
    found = [(name, one.shape) for name, one in zip(files.names, seen, strict=True) if one.shape]
    counts = Counter(shape for _, shape in found)
    report.sizes = {_describe(shape, report.of): count for shape, count in counts.most_common()}
    if not counts:
        return
    compared = 0 if report.of == "latents" else 1  # images may be gray among RGB
    usual: tuple[int, ...] = Counter(shape[compared:] for _, shape in found).most_common(1)[0][0]
    expected = f"{usual[1]}x{usual[0]}" if compared else _describe(usual, "latents")
    if compared and len({shape[0] for shape in counts}) > 1:
        grays = sum(count for shape, count in counts.items() if shape[0] == 1)
        report.note("channels", report.source, f"has {grays} grayscale images among RGB; all become RGB")
    for name, shape in found:
        if shape[compared:] != usual:
            report.problem("size", name, f"is {_describe(shape, report.of)}, most others are {expected}")


def _describe(shape: Sequence[int], of: str) -> str:
    if of == "latents":
        return f"{shape[0]} channels of {'x'.join(map(str, shape[:0:-1]))}"
    return f"{shape[2]}x{shape[1]} {'gray' if shape[0] == 1 else 'RGB'}"


def _find_duplicates(
    files: Files, seen: Sequence[Seen], class_names: Sequence[str], labels: Sequence[int] | None, report: Report
) -> None:
    first: dict[bytes, int] = {}
    for index, one in enumerate(seen):
        if not one.digest:
            continue
        other = first.setdefault(one.digest, index)
        if other != index:
            what = f"shows the same as {files.names[other]!r}"
            if labels is not None and labels[index] != labels[other]:
                what += f", though of class {class_names[labels[index]]!r} and not {class_names[labels[other]]!r}"
            report.problem("duplicate", files.names[index], what)


def _count_traits(files: Files, seen: Sequence[Seen], report: Report) -> None:
    counts: Counter[str] = Counter(trait for one in seen for trait in one.traits)
    for trait, count in counts.items():
        first = next(name for name, one in zip(files.names, seen, strict=True) if trait in one.traits)
        report.note("converted", first, f"{trait}; {count} such image{'' if count == 1 else 's'}")


def _measure(sums: Sums, report: Report) -> None:
    """Mean and deviation of each channel; those of one channel count for all where there are more."""
    if not sums:
        return
    most = max(sums)
    count, total, squares = sum((found for channels, found in sums.items() if channels in (1, most)), np.zeros((3, most)))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    if report.of == "images":
        mean, std = mean / 127.5 - 1, std / 127.5
    report.mean, report.std = mean.tolist(), std.tolist()
    if report.of == "images" and float(std.max()) < FLAT:
        report.problem("contrast", report.source, f"has a deviation of {std.max():.3f}: nearly one single colour")


def _compare_with(model: Any, run: str, seen: Sequence[Seen], class_names: Sequence[str], report: Report) -> None:
    """Problems where the data are not like those that a model was trained on.

    Normalized as those were, they are to have a mean of 0 and a deviation of sigma_data. A mean off by more than a fifth of
    sigma_data, or a deviation by more than a quarter, is a problem. Where the normalization was not measured, nothing is known.
    Raises a UserError if the description of the model cannot be read.
    """
    try:
        codec, classes = codec_from_state(model["codec"]), Conditioner.from_state(model["conditioner"]).classes
    except (KeyError, TypeError) as error:
        raise UserError(
            f"'{run}' holds a model.json without {error}; expected a finished run; choose another with --like"
        ) from None
    found = Counter(one.shape for one in seen if one.shape)
    if codec.kind != {"images": "pixels"}.get(report.of, report.of):
        expected = {"pixels": "images"}.get(codec.kind, codec.kind)
        report.problem("unlike", report.source, f"holds {report.of} where {run!r} was trained on {expected}")
        return
    if found:
        most, depth = max(one[0] for one in found), codec.shape[0]
        channels = most if codec.pictured or most != 2 * depth else depth  # latents may have deviations beside the means
        shapes = {(channels, *one[1:]) for one in found}
        if shapes != {codec.shape}:
            other = next(iter(shapes - {codec.shape}))
            report.problem("unlike", report.source, f"has the shape {other} where {run!r} was trained on {codec.shape}")
    names = () if classes is None else classes.names
    odd = sorted({*class_names} ^ {*names}) if named(class_names) and named(names) else []
    if odd or len(class_names) != len(names):
        report.problem(
            "unlike",
            report.source,
            f"has {len(class_names)} classes where {run!r} has {len(names)}" + (f"; {odd[0]!r} is not in both" if odd else ""),
        )
    for name, mean, std in codec.normalized(report.mean, report.std):
        sd = codec.sigma_data
        if abs(mean) > sd / 5 or not 0.75 * sd <= std <= 1.25 * sd:
            what = f"has mean {mean:.3f} and deviation {std:.3f} as {run!r} normalizes; expected 0 and {sd:g}"
            report.problem("unlike", name or report.source, what)
