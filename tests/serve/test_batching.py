"""The queue: what waits together is drawn together, within bounds."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from serve.helpers import wait_for
from trigflow.serve.batching import Batcher, BusyError, ClosedError
from trigflow.serve.drawing import Order
from trigflow.serve.limits import Limits


class Worker:
    """A draw function that writes down its batches and waits while it is held."""

    def __init__(self) -> None:
        self.batches: list[list[Order]] = []
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None

    def __call__(self, orders: Sequence[Order]) -> list[Tensor]:
        self.batches.append(list(orders))
        assert self.go.wait(10)
        if self.error is not None:
            raise self.error
        return [torch.full((len(order), 1, 1, 1), order.seed, dtype=torch.uint8) for order in orders]

    def seeds(self) -> list[list[int]]:
        return [[order.seed for order in batch] for batch in self.batches]


LIMITS = Limits(batch=8, queue=20, window_ms=0, queue_seconds=30)


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def batcher(worker: Worker) -> Iterator[Batcher]:
    made = Batcher([worker], LIMITS)
    made.start()
    yield made
    worker.go.set()
    made.close()
    assert not made.alive


def order(seed: int, count: int = 1, steps: int = 2, guidance: float = 1.0) -> Order:
    return Order(seed, 0, count, None, guidance, steps)


def busy(batcher: Batcher, worker: Worker) -> None:
    """Let the worker be held in a batch of its own, that of seed 99."""
    worker.go.clear()
    batcher.submit(order(99))
    wait_for(lambda: len(worker.batches) == 1)


def test_what_waits_together_is_drawn_together(batcher: Batcher, worker: Worker) -> None:
    busy(batcher, worker)
    jobs = [batcher.submit(order(seed, count=2))[0] for seed in range(3)]
    assert batcher.waiting == 6
    worker.go.set()
    drawn = [job.future.result(10) for job in jobs]
    assert worker.seeds() == [[99], [0, 1, 2]]
    assert [part.images[0].item() for part in drawn] == [0, 1, 2]
    assert all(part.images.shape == (2, 1, 1, 1) and part.queue > 0 for part in drawn)
    assert batcher.waiting == 0


def test_only_orders_of_one_key_and_at_most_a_batch(batcher: Batcher, worker: Worker) -> None:
    busy(batcher, worker)
    jobs = [
        *batcher.submit(order(0, 5)),
        *batcher.submit(order(1, 1, steps=4)),
        *batcher.submit(order(2, 3)),
        *batcher.submit(order(3, 1, guidance=2.0)),
        *batcher.submit(order(4, 1)),
    ]
    worker.go.set()
    for job in jobs:
        job.future.result(10)
    assert worker.seeds() == [[99], [0, 2], [1], [3], [4]]


def test_a_long_order_is_drawn_in_parts(batcher: Batcher, worker: Worker) -> None:
    jobs = batcher.submit(order(5, 19))
    assert sum(len(job.future.result(10).images) for job in jobs) == 19
    parts = [(part.start, part.stop) for batch in worker.batches for part in batch]
    assert parts == [(0, 8), (8, 16), (16, 19)]


def test_a_long_order_lets_others_in_between(worker: Worker) -> None:
    batcher = Batcher([worker], Limits(batch=8, window_ms=0))
    batcher.start()
    busy(batcher, worker)
    jobs = [*batcher.submit(order(0, 24)), *batcher.submit(order(1, 6)), batcher.submit_frame(order(2))]
    worker.go.set()
    for job in jobs:
        job.future.result(10)
    assert worker.seeds() == [[99], [0], [1, 2], [0], [0]]
    batcher.close()


def test_a_long_order_is_not_put_off_for_ever(worker: Worker) -> None:
    """However many come, the second part is drawn before those that came after two more batches."""
    batcher = Batcher([worker], Limits(batch=8, window_ms=0))
    batcher.start()
    busy(batcher, worker)
    jobs = batcher.submit(order(0, 16))
    for seed in range(1, 6):  # one more is there whenever a batch begins
        jobs += batcher.submit(order(seed, 8))
        drawn = len(worker.batches)
        worker.go.set()
        wait_for(lambda drawn=drawn: len(worker.batches) > drawn)  # type: ignore[misc]
    for job in jobs:
        job.future.result(10)
    seeds = [seed for batch in worker.seeds() for seed in batch]
    assert seeds.index(0, 2) <= 5
    assert len(seeds) == 8
    batcher.close()


def test_a_frame_longer_than_a_batch_is_drawn_in_parts(batcher: Batcher, worker: Worker) -> None:
    drawn = batcher.submit_frame(order(5, 19)).future.result(10)
    assert drawn.images.shape == (19, 1, 1, 1)
    parts = [(part.start, part.stop) for batch in worker.batches for part in batch]
    assert parts == [(0, 8), (8, 16), (16, 19)]


def test_a_full_queue_refuses_whole_orders(batcher: Batcher, worker: Worker) -> None:
    busy(batcher, worker)
    batcher.submit(order(0, 15))
    with pytest.raises(BusyError) as caught:
        batcher.submit(order(1, 6))
    assert caught.value.retry_after >= 1
    assert batcher.waiting == 15
    batcher.submit(order(2, 5))


def test_an_order_longer_than_the_queue_is_taken_when_nothing_waits(batcher: Batcher) -> None:
    jobs = batcher.submit(order(0, 30))
    assert sum(len(job.future.result(10).images) for job in jobs) == 30


def test_a_window_lets_orders_meet() -> None:
    worker = Worker()
    batcher = Batcher([worker], Limits(batch=4, window_ms=60_000))
    batcher.start()
    jobs = [batcher.submit(order(seed))[0] for seed in range(4)]  # drawn when the batch is full, not after a minute
    assert [job.future.result(10).images.item() for job in jobs] == [0, 1, 2, 3]
    waiting = batcher.submit(order(4))
    frame = batcher.submit_frame(order(5))  # a frame does not wait, and takes along what does
    assert frame.future.result(10).images.item() == 5
    assert waiting[0].future.result(10).images.item() == 4
    assert worker.seeds() == [[0, 1, 2, 3], [4, 5]]
    batcher.close()


def test_who_waits_too_long_is_told() -> None:
    worker = Worker()
    batcher = Batcher([worker], LIMITS)
    batcher.start()
    busy(batcher, worker)
    late, frame = batcher.submit(order(1))[0], batcher.submit_frame(order(2))
    for job in (late, frame):
        job.entered -= LIMITS.queue_seconds
    worker.go.set()
    for job in (late, frame):
        with pytest.raises(BusyError, match="in the queue"):
            job.future.result(10)
    batcher.close()


def test_withdrawn_work_is_not_done(batcher: Batcher, worker: Worker) -> None:
    busy(batcher, worker)
    gone, stays = batcher.submit(order(1, 12)), batcher.submit(order(2))
    assert batcher.withdraw(gone) == 2
    assert batcher.withdraw(gone) == 0
    assert batcher.waiting == 1
    worker.go.set()
    stays[0].future.result(10)
    assert worker.seeds() == [[99], [2]]
    assert all(job.future.cancelled() for job in gone)


def test_cancelled_futures_are_not_drawn(batcher: Batcher, worker: Worker) -> None:
    busy(batcher, worker)
    gone, stays = batcher.submit(order(1))[0], batcher.submit(order(2))[0]
    assert gone.future.cancel()
    worker.go.set()
    assert stays.future.result(10).images.item() == 2
    assert [99] in worker.seeds()
    assert batcher.waiting == 0


def test_a_newer_order_takes_the_place_of_an_older(batcher: Batcher, worker: Worker) -> None:
    busy(batcher, worker)
    job, other = batcher.submit_frame(order(1)), batcher.submit_frame(order(2))
    assert batcher.replace(job, order(7))
    worker.go.set()
    assert job.future.result(10).images.item() == 7
    other.future.result(10)
    assert worker.seeds() == [[99], [7, 2]]
    assert not batcher.replace(job, order(8))


def test_a_failed_batch_harms_nobody_else(batcher: Batcher, worker: Worker) -> None:
    worker.error = RuntimeError("no memory")
    with pytest.raises(RuntimeError, match="no memory"):
        batcher.submit(order(1))[0].future.result(10)
    worker.error = None
    assert batcher.submit(order(2))[0].future.result(10).images.item() == 2
    assert batcher.alive


def close(batcher: Batcher, worker: Worker) -> None:
    """Close it while its worker is held, and let that go."""
    closing = threading.Thread(target=batcher.close)
    closing.start()
    wait_for(lambda: batcher._closing)
    worker.go.set()
    closing.join(10)


def test_closing_gives_up_what_waits() -> None:
    worker = Worker()
    batcher = Batcher([worker], LIMITS)
    batcher.start()
    busy(batcher, worker)
    job = batcher.submit(order(1))[0]
    close(batcher, worker)
    with pytest.raises(ClosedError):
        job.future.result(10)
    with pytest.raises(ClosedError):
        batcher.submit(order(2))
    batcher.start()  # and it can be opened again
    assert batcher.submit(order(3))[0].future.result(10).images.item() == 3
    batcher.close()


def test_closing_tells_the_others_of_one_that_was_cancelled(worker: Worker) -> None:
    batcher = Batcher([worker], LIMITS)
    batcher.start()
    busy(batcher, worker)
    gone, told = batcher.submit(order(1))[0], batcher.submit(order(2))[0]
    assert gone.future.cancel()
    close(batcher, worker)
    with pytest.raises(ClosedError):
        told.future.result(1)


def test_the_parts_of_a_long_order_are_drawn_at_the_same_time() -> None:
    workers = [Worker(), Worker()]
    for one in workers:
        one.go.clear()
    batcher = Batcher(workers, LIMITS)
    batcher.start()
    jobs = batcher.submit(order(0, 16))
    try:
        wait_for(lambda: all(one.batches for one in workers))
    finally:
        for one in workers:
            one.go.set()
        for job in jobs:
            job.future.result(10)
        batcher.close()


def test_workers_draw_at_the_same_time() -> None:
    workers = [Worker(), Worker()]
    for one in workers:
        one.go.clear()
    batcher = Batcher(workers, LIMITS)
    batcher.start()
    assert batcher.alive
    jobs = [batcher.submit(order(0))[0]]
    wait_for(lambda: any(one.batches for one in workers))
    jobs += batcher.submit(order(1))
    wait_for(lambda: all(one.batches for one in workers))
    jobs += batcher.submit(order(2))
    assert batcher.waiting == 1
    for one in workers:
        one.go.set()
    assert [int(job.future.result(10).images.max()) for job in jobs] == [0, 1, 2]
    batcher.close()
    assert not batcher.alive
    assert sorted(seed for one in workers for batch in one.seeds() for seed in batch) == [0, 1, 2]
