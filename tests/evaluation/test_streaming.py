"""Features in a stream: their order, their statistics, and how many images are alive at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trigflow.evaluation import PixelFeatures, Processes, extract, gather, gaussian_statistics, stream_features
from trigflow.evaluation.shared_work import ALONE
from trigflow.runtime.errors import UserError


def image(number: int) -> Tensor:
    return torch.randint(0, 256, (1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def images(start: int, stop: int) -> Tensor:
    return torch.stack([image(number) for number in range(start, stop)])


@pytest.mark.parametrize("batch_size", [1, 7, 64, 200])
def test_features_come_in_order_whatever_the_batch_size(batch_size: int) -> None:
    extractor = PixelFeatures()
    batches = list(stream_features(images, 100, extractor, batch_size=batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert torch.equal(torch.cat(batches), extract(extractor, images(0, 100)))


def test_statistics_are_those_of_all_features_at_once() -> None:
    extractor = PixelFeatures()
    features = extract(extractor, images(0, 100))
    statistics, kept = gather(stream_features(images, 100, extractor, batch_size=9), keep=True)
    expected = gaussian_statistics(features)
    torch.testing.assert_close(statistics.mean, expected.mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(statistics.covariance, expected.covariance, rtol=0, atol=1e-14)
    assert kept is not None
    assert torch.equal(kept, features)
    assert gather(stream_features(images, 100, extractor), keep=False)[1] is None


def test_each_image_is_asked_for_once_and_only_one_batch_is_alive() -> None:
    asked: list[int] = []
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def counted(start: int, stop: int) -> Tensor:
        nonlocal most
        asked.extend(range(start, stop))
        made = images(start, stop)
        alive.add(made)
        most = max(most, sum(len(batch) for batch in alive))
        return made

    gather(stream_features(counted, 100, PixelFeatures(), batch_size=8), keep=True)
    assert asked == list(range(100))
    assert most == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda start, stop: images(start, stop).float(), "expected uint8 of shape"),
        (lambda start, stop: images(start, stop)[0], "expected uint8 of shape"),
    ],
)
def test_what_is_no_image(make: Callable[[int, int], Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(stream_features(make, 10, PixelFeatures()))


def test_features_that_are_not_finite() -> None:
    with pytest.raises(UserError, match="features of 5 of 10 samples are not finite"):
        list(stream_features(images, 10, lambda x: torch.where(torch.arange(len(x)) < 5, 1.0, torch.nan)[:, None]))


@pytest.mark.parametrize(("count", "batch_size"), [(0, 4), (4, 0)])
def test_nothing_to_do(count: int, batch_size: int) -> None:
    with pytest.raises(UserError, match="expected at least 1 of each"):
        list(stream_features(images, count, PixelFeatures(), batch_size=batch_size))


def test_one_process_alone() -> None:
    assert Processes.present() == ALONE == Processes(rank=0, count=1)
    assert ALONE.together(lambda: 3) == [3]
    assert ALONE.agree(lambda: 4) == ALONE.one_first(lambda: 4) == 4
    with pytest.raises(KeyError):
        ALONE.agree(lambda: {}["absent"])
