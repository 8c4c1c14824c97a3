"""Reference statistics of a data set of any size: its images are read, looked at and let go."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from trigflow.data import open_dataset
from trigflow.data.decode import sizes_differ
from trigflow.data.rows import Decoder
from trigflow.data.sources.folder import image_files
from trigflow.data.sources.opening import EMBEDDED, list_files
from trigflow.evaluation import (
    GaussianStatistics,
    Processes,
    ReferenceStatistics,
    RunningStatistics,
    default_features,
    feature_extractor,
    frechet_distance,
    stream_features,
)
from trigflow.evaluation.features.extractors import DOWNLOADED
from trigflow.evaluation.manifold import NEIGHBOURS
from trigflow.evaluation.streaming import Images
from trigflow.runtime.errors import UserError

THREADS = 8
"""Images decoded at a time."""


def measure_reference(
    data: str,
    *,
    features: str = "auto",
    weights: str | None = None,
    keep: int = 0,
    num: int | None = None,
    resize: int | None = None,
    crop: bool = True,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> ReferenceStatistics:
    """What `evaluate_model` needs to know of a data set, for `write_reference`.

    With the features `inception` and `dinov2` a folder or zip is read a batch at a time, images as RGB; other features, and the
    data sets that come with packages, are read into memory as by `open_dataset`. All the processes of `torch.distributed` share
    the work, and each gets the same result.

    Args:
        data: digits, mnist, or the path of a folder or zip of images.
        features: see `feature_extractor`; `auto` takes the network shipped for the data set, else `inception`.
        weights: a local copy of the weights of `inception` or `dinov2`.
        keep: of how many images, evenly spaced, to keep the features too, for precision and recall, which take at least four.
        num: look at this many images only, the first in the order of their names; None for all.
        resize: side of the square to make of every image.
        crop: False scales both sides to `resize` instead of keeping the centre.
        batch_size: images read and looked at together.
        seed: of the random halving behind `fd_real`: unlike that of `Scores`, it is of one halving.
        device: where the features are computed.
        progress: show a bar.

    Raises:
        UserError: for data that cannot be read, images of different sizes without `resize`, numbers out of range, or fewer than
            four images.
        MissingExtraError: for features or data whose package is not installed.
    """
    if keep < 0 or 0 < keep <= NEIGHBOURS or (num is not None and num < 4):
        raise UserError(
            f"{keep} features to keep of {num} images; expected 0 or more than {NEIGHBOURS}, of 4 or more; correct --keep or "
            "--num"
        )
    processes = Processes.present()
    name = features
    if features == "auto":
        name = default_features(data) if data in EMBEDDED else "inception"
    show = progress and processes.rank == 0
    extractor = processes.one_first(lambda: feature_extractor(name, weights, show).to(device))
    with ThreadPoolExecutor(THREADS) as pool:
        count, read = _images(data, name, resize, crop, show, processes, pool)
        total = count if num is None else min(num, count)
        if total < 4:
            raise UserError(f"{total} images in {data!r}; expected at least 4; add images")
        batches = stream_features(
            read, total, extractor, batch_size=batch_size, processes=processes,
            progress="features" if progress else None,
        )  # fmt: skip
        statistics, kept, fd_real = _gather(batches, total, min(keep, total), seed)
    return ReferenceStatistics(statistics, kept, fd_real, name, os.path.basename(os.path.normpath(data)))


def _gather(batches: Iterator[Tensor], total: int, keep: int, seed: int) -> tuple[GaussianStatistics, Tensor | None, float]:
    """Statistics of all features, `keep` evenly spaced ones, and the distance between two random halves."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    in_first = torch.zeros(total, dtype=torch.bool)
    in_first[order[: total // 2]] = True
    wanted = torch.zeros(total, dtype=torch.bool)
    wanted[torch.arange(keep) * total // max(keep, 1)] = True
    first, second, both, kept, start = RunningStatistics(), RunningStatistics(), RunningStatistics(), [], 0
    for features in batches:
        span = slice(start, start + len(features))
        first.update(features[in_first[span]])
        second.update(features[~in_first[span]])
        kept.append(features[wanted[span]])
        start += len(features)
    both.merge(first)
    both.merge(second)
    return (both.result(), torch.cat(kept) if keep else None, frechet_distance(first.result(), second.result()))


def _images(
    data: str, features: str, resize: int | None, crop: bool, progress: bool, processes: Processes, pool: ThreadPoolExecutor
) -> tuple[int, Images]:
    """How many images there are, and a function that gives a range of them."""
    if features not in DOWNLOADED or data in EMBEDDED:
        dataset = processes.agree(lambda: open_dataset(data, resize=resize, crop=crop, progress=progress, captions=False))
        return len(dataset), lambda start, stop: dataset.batch(torch.arange(start, stop))[0]
    files = processes.agree(lambda: image_files(list_files(data)))
    decoder = Decoder(files, 3, resize, crop)

    def read(start: int, stop: int) -> Tensor:
        images = [image for image, _ in pool.map(decoder.whole, range(start, stop))]
        for index, image in enumerate(images, start):
            if image.shape != images[0].shape:
                raise sizes_differ(files.names[start], images[0].shape[1:], files.names[index], image.shape[1:])
        return torch.stack(images)

    return len(files), read
