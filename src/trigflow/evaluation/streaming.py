"""Features of more images than fit in memory: made a batch at a time, looked at, and let go.

The images are numbered, and batch j is always images `j batch_size ... (j + 1) batch_size - 1`, whichever process makes it.
So a batch has the same size, and takes the same arithmetic, on one process as on many, and the features come out equal bit for
bit and in the same order (given the same kind of hardware and number of threads).
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from trigflow.evaluation.features.extractors import FeatureExtractor, extract
from trigflow.evaluation.frechet import GaussianStatistics, RunningStatistics, check_features
from trigflow.evaluation.shared_work import ALONE, Processes
from trigflow.runtime.errors import UserError

AT_ONCE = 64
"""Images given to the extractor at a time: the networks behind published figures look at large copies of them."""

Images = Callable[[int, int], Tensor]
"""`images(start, stop)` gives images start ... stop - 1, uint8 `(stop - start, c, h, w)`."""


def stream_features(
    images: Images,
    count: int,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 256,
    processes: Processes = ALONE,
    progress: str | None = None,
) -> Iterator[Tensor]:
    """Features `(b, d)` of images 0 ... count - 1, in this order, a batch at a time, on the CPU.

    The batches go round the processes, and every process gets the features of all. One batch of images is alive in each.

    Args:
        images: gives a range of images; asked for each image once, in one process only.
        count: how many images there are.
        extractor: uint8 images `(b, c, h, w)` to features `(b, d)`.
        batch_size: images made together.
        processes: those that share the work; all of them iterate to the end.
        progress: name of a progress bar on stderr, drawn by the first process; None for no bar.

    Raises:
        UserError: in every process, for what is wrong in one: images that are not uint8 `(b, c, h, w)`, features that are not
            `(b, d)` or not finite.
    """
    if count < 1 or batch_size < 1:
        raise UserError(f"{count} images in batches of {batch_size}; expected at least 1 of each; correct the numbers")
    starts = range(0, count, batch_size)

    def features_of(number: int) -> Tensor | None:
        if number >= len(starts):
            return None
        start = starts[number]
        features = extract(extractor, images(start, min(start + batch_size, count)), AT_ONCE)
        check_features(features)
        return features

    with tqdm(total=count, desc=progress, unit="img", disable=progress is None or processes.rank != 0) as bar:
        for begin in range(0, len(starts), processes.count):
            own = begin + processes.rank
            for features in processes.together(lambda own=own: features_of(own)):  # type: ignore[misc]
                if features is not None:
                    bar.update(len(features))
                    yield features


def gather(batches: Iterable[Tensor], *, keep: bool) -> tuple[GaussianStatistics, Tensor | None]:
    """Statistics of features that arrive in batches `(b, d)`, and with `keep` the features themselves, `(n, d)`.

    Raises:
        UserError: for fewer than two samples, or features that are not finite or of different lengths.
    """
    running, kept = RunningStatistics(), []
    for features in batches:
        running.update(features)
        if keep:
            kept.append(features)
    return running.result(), torch.cat(kept) if keep else None
