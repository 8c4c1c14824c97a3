"""A bounded queue and the threads that draw from it: what waits together is drawn together."""

import dataclasses
import math
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trigflow.serve.drawing import Order
from trigflow.serve.limits import Limits

Draw = Callable[[Sequence[Order]], list[Tensor]]
"""The pictures of several orders of one key; `trigflow.serve.drawing.draw_together` with drawer and noise bound."""


class BusyError(Exception):
    """The queue is full, or an order has waited too long. `retry_after`: seconds after which it may be shorter."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class ClosedError(Exception):
    """The server is shutting down, or its workers were never started."""


@dataclass(frozen=True)
class Drawn:
    """Pictures of one order, uint8 `(n, c, h, w)`, with the seconds it waited and those that its batch took to draw."""

    images: Tensor
    queue: float
    network: float


@dataclass(eq=False)
class Job:
    """An order in the queue. `future` can be cancelled until the worker takes the job up.

    Attributes:
        order: may be replaced by a newer one until then, see `Batcher.replace`.
        patience: seconds it waits for company.
        turn: how many batches had been drawn when it came; jobs are drawn in this order.
    """

    order: Order
    patience: float
    turn: int
    entered: float = field(default_factory=time.monotonic)
    future: Future[Drawn] = field(default_factory=Future)


class Batcher:
    """Queue and workers of one model.

    The oldest order decides: with all others of its key, in the order of their coming, up to `limits.batch` pictures, it is
    drawn as soon as one of them has lost its patience or the batch is full. While a batch is drawn the next one gathers, so
    under load batches grow by themselves. Each part of a long order counts as if it had come two batches later than the one
    before, so that the orders of others are drawn in between.

    Args:
        draws: see `Draw`; each is called in a worker thread of its own, so that many batches are drawn at a time.
        limits: `batch`, `queue`, `queue_seconds`, `window_ms`.
        on_batch: called after every batch with the number of its pictures.
    """

    def __init__(self, draws: Sequence[Draw], limits: Limits, on_batch: Callable[[int], None] | None = None) -> None:
        self.limits = limits
        self._draws = tuple(draws)
        self._on_batch = on_batch
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._turn = 0
        self._seconds_per_image = 0.0

    # From any thread -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the workers, unless they run already."""
        if not self.alive:
            self._closing = False
            self._threads = [
                threading.Thread(target=self._work, args=(draw,), name=f"trigflow-worker-{i}", daemon=True)
                for i, draw in enumerate(self._draws)
            ]
            for thread in self._threads:
                thread.start()

    def close(self) -> None:
        """Finish the batches at hand, give up what waits, end the workers."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def alive(self) -> bool:
        """Whether all workers run."""
        return bool(self._threads) and all(thread.is_alive() for thread in self._threads)

    @property
    def waiting(self) -> int:
        """Pictures in the queue."""
        return sum(len(job.order) for job in list(self._waiting))

    def submit(self, order: Order) -> list[Job]:
        """Queue an order, in parts of at most `limits.batch` pictures; all of them or none.

        Raises:
            BusyError: if the queue has no room for it.
        """
        patience, parts = self.limits.window_ms / 1000, self._parts(order)
        with self._changed:
            waiting = self.waiting
            if waiting and waiting + len(order) > self.limits.queue:
                raise BusyError(f"{waiting} images wait already", self._retry_after())
            jobs = [Job(part, patience, self._turn + 2 * i) for i, part in enumerate(parts)]
            self._enter(jobs)
        return jobs

    def submit_frame(self, order: Order) -> Job:
        """Queue the frame of a stream: at once, without waiting for company. One a stream is enough."""
        with self._changed:
            job = Job(order, 0.0, self._turn)
            self._enter([job])
        return job

    def replace(self, job: Job, order: Order) -> bool:
        """Put a newer order in the place of one that still waits; False if that was taken up already."""
        with self._changed:
            if job not in self._waiting:
                return False
            job.order = order
            self._changed.notify()
            return True

    def withdraw(self, jobs: Sequence[Job]) -> int:
        """Take jobs that nobody waits for any more out of the queue; how many were still there."""
        with self._changed:
            found = [job for job in jobs if job in self._waiting]
            for job in found:
                self._waiting.remove(job)
        for job in found:
            job.future.cancel()
        return len(found)

    def _parts(self, order: Order) -> list[Order]:
        size = self.limits.batch
        return [_part(order, first, min(first + size, len(order))) for first in range(0, len(order), size)]

    def _enter(self, jobs: Sequence[Job]) -> None:
        if self._closing:
            raise ClosedError("the server is shutting down")
        if not any(thread.is_alive() for thread in self._threads):
            raise ClosedError("no worker of the server runs")
        for job in jobs:
            insort(self._waiting, job, key=lambda one: one.turn)
        self._changed.notify()

    def _retry_after(self) -> int:
        return min(60, max(1, math.ceil(self.waiting * self._seconds_per_image / len(self._draws))))

    # In the workers --------------------------------------------------------------------------------------------------

    def _work(self, draw: Draw) -> None:
        while (jobs := self._next_batch()) is not None:
            self._draw_batch(draw, jobs)
            del jobs  # else they would stay, with their pictures, until the next ones come

    def _draw_batch(self, draw: Draw, jobs: Sequence[Job]) -> None:
        begun = time.monotonic()
        try:
            if len(jobs) == 1:  # a frame may be longer than a batch
                parts = [torch.cat([draw([part])[0] for part in self._parts(jobs[0].order)])]
            else:
                parts = draw([job.order for job in jobs])
        except Exception as error:  # the clients of this batch are told; the others are served on
            for job in jobs:
                job.future.set_exception(error)
            return
        seconds, pictures = time.monotonic() - begun, sum(len(job.order) for job in jobs)
        self._seconds_per_image += 0.2 * (seconds / pictures - self._seconds_per_image)
        for job, images in zip(jobs, parts, strict=True):
            job.future.set_result(Drawn(images, begun - job.entered, seconds))
        if self._on_batch is not None:
            self._on_batch(pictures)

    def _next_batch(self) -> list[Job] | None:
        """The jobs to draw next; None when the server closes."""
        with self._changed:
            while not self._closing:
                now = time.monotonic()
                self._give_up(now)
                batch, full = self._gather()
                ready = min((job.entered + job.patience for job in batch), default=math.inf)
                if not batch:
                    self._changed.wait()
                elif full or now >= ready:
                    self._turn += 1
                    for job in batch:
                        self._waiting.remove(job)
                    self._changed.notify()  # what is left may be for another worker
                    claimed = [job for job in batch if job.future.set_running_or_notify_cancel()]
                    if claimed:
                        return claimed
                else:
                    self._changed.wait(ready - now)
            for job in list(self._waiting):
                self._refuse(job, ClosedError("the server is shutting down"))
            return None

    def _gather(self) -> tuple[list[Job], bool]:
        """The oldest job and those that can be drawn with it, and whether there is no room for more."""
        batch: list[Job] = []
        room = self.limits.batch
        for job in self._waiting:
            if batch and job.order.key != batch[0].order.key:
                continue
            if batch and len(job.order) > room:
                return batch, True
            batch.append(job)
            room -= len(job.order)
        return batch, room <= 0

    def _give_up(self, now: float) -> None:
        for job in [job for job in self._waiting if now > job.entered + self.limits.queue_seconds]:
            self._refuse(job, BusyError(f"{now - job.entered:.1f} s in the queue", self._retry_after()))

    def _refuse(self, job: Job, error: Exception) -> None:
        self._waiting.remove(job)
        if job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)


def _part(order: Order, first: int, last: int) -> Order:
    """Pictures first ... last - 1 of an order."""
    return dataclasses.replace(
        order, start=order.start + first, stop=order.start + last,
        mixes=None if order.mixes is None else order.mixes[first:last],
        conditions={name: value[first:last] for name, value in order.conditions.items()},
    )  # fmt: skip
