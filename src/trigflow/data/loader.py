"""Reading and decoding in worker processes, ahead of the one that asks, with the same results in the same order.

Workers are processes of `torch.utils.data.DataLoader`, not threads: Pillow lets go of the interpreter's lock only while it
decodes, which for small images is about half of the work. Which samples a step takes is decided in the asking process; a
worker is told their indices and sends back bytes. So neither the number of workers nor their speed has a say in what is
trained on.
"""

import functools
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from trigflow.data.dataset import Dataset, Rows
from trigflow.runtime.errors import UserError, on_one_line

T = TypeVar("T")
R = TypeVar("R")
Indices = npt.NDArray[np.int64]


def in_order(function: Callable[[T], R], items: Sequence[T], workers: int = 0) -> Iterator[R]:
    """`map(function, items)`, computed by worker processes, a few items ahead of what has been asked for.

    Args:
        function: has to be picklable where processes are not forked.
        items: anything picklable.
        workers: processes; 0 computes each result when it is asked for, in this process.

    Raises:
        UserError: as the function does, at the item it does it; or if a worker process dies.
    """
    if workers < 1:
        yield from map(function, items)
        return
    results = _begin(_processes(function, items, min(workers, max(len(items), 1))))
    try:
        for _ in items:
            yield _take(results)
    finally:
        _end(results)


class Loader:
    """Hands out what is stored of the samples of each step, read ahead by worker processes where it is not in memory.

    Args:
        dataset: images or latents.
        plan: which samples a step takes, int64, shape `(b,)`; asked for steps that are yet to come.
        steps: number of steps; none is read ahead beyond the last.
        workers: processes that read and decode; 0 reads in this process when asked. A stream takes one at most.
        ahead: steps that each worker is ahead.
        device: where images are sent, as bytes; from pinned memory if it is a CUDA device. Latents stay on the CPU.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Callable[[int], Tensor],
        steps: int,
        *,
        workers: int = 0,
        ahead: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        if workers < 0 or ahead < 1:
            raise UserError(f"{workers} workers, {ahead} steps ahead; expected 0 or more, and at least 1; change data.workers")
        self.dataset = dataset
        streams = dataset.rows is not None and dataset.rows.shards is not None
        self.workers = 0 if dataset.rows is None else min(workers, 1) if streams else workers
        self.device = torch.device(device)
        self._steps = _Steps(plan, steps)
        self._ahead = ahead
        self._loader: DataLoader[Any] | None = None
        self._coming: Iterator[Any] | None = None
        self._next = -1
        self._latest: tuple[int, Tensor, Tensor] | None = None
        self._waited = 0.0

    def read(self, step: int, indices: Tensor) -> Tensor:
        """`dataset.stored(indices)`, for `dataset.batch(indices, stored=...)`; not to be changed in place.

        It has been read ahead if steps are asked for one after another and `indices` is `plan(step)`. Any others are read too,
        only not ahead: a run may start anywhere, go back, and change its plan. Raises a UserError if a file cannot be read or
        decoded any more, or a worker process died.
        """
        began = time.perf_counter()
        latest = self._latest
        if latest is None or latest[0] != step or not torch.equal(latest[1], indices):
            stored = self._read(step, indices)
            if not stored.is_floating_point():
                stored = stored.to(self.device, non_blocking=True)
            self._latest = latest = (step, indices, stored)
        self._waited += time.perf_counter() - began
        return latest[2]

    def waited(self) -> float:
        """Seconds spent in `read` since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """End the worker processes; they start again when they are needed."""
        coming, self._loader, self._coming = self._coming, None, None
        if coming is not None:
            _end(coming)

    def _read(self, step: int, indices: Tensor) -> Tensor:
        if self.workers == 0 or step >= self._steps.end:
            return self.dataset.stored(indices)
        if self._coming is None or self._next != step:
            self._start(step)
        planned, stored = self._take()
        if not torch.equal(planned, indices):  # the plan has changed since this was read
            self._start(step)
            planned, stored = self._take()
        return stored if torch.equal(planned, indices) else self.dataset.stored(indices)

    def _start(self, step: int) -> None:
        """Begin to read ahead from this step."""
        self._steps.start = self._next = step
        if self._loader is None:
            read = functools.partial(_stored, self.dataset.rows)  # type: ignore[arg-type] # without rows there are no workers
            self._loader = _processes(read, self._steps, self.workers, self._ahead, self.device.type == "cuda")
        self._coming = _begin(self._loader)

    def _take(self) -> tuple[Tensor, Tensor]:
        self._next += 1
        planned, stored = _take(self._coming)
        return torch.from_numpy(planned), stored


class _Steps:
    """The indices of one step after another, as arrays: a tensor would be handed over through shared memory, from a thread of
    this process, which is loud about a worker that ends meanwhile."""

    def __init__(self, plan: Callable[[int], Tensor], end: int) -> None:
        self.plan, self.start, self.end = plan, 0, end

    def __iter__(self) -> Iterator[Indices]:
        return (self.plan(step).numpy() for step in range(self.start, self.end))

    def __len__(self) -> int:
        return self.end - self.start


def _stored(rows: Rows, indices: Indices) -> tuple[Indices, Tensor]:
    return indices, rows[torch.from_numpy(indices)]


class _Results(TorchDataset[Any], Generic[T, R]):
    """The function as something that a DataLoader can index: with its result, or with what went wrong.

    Nothing of the function's is raised in a worker, so that whatever a DataLoader raises says that a worker is lost.
    """

    def __init__(self, function: Callable[[T], R]) -> None:
        self.function = function

    def __getitem__(self, item: T) -> tuple[R | None, Exception | None]:
        try:
            return self.function(item), None
        except UserError as error:
            return None, UserError(str(error))
        except Exception:
            return None, RuntimeError(f"reading has failed in a worker process:\n{traceback.format_exc()}")


def _processes(function: Callable[[T], R], items: Any, workers: int, ahead: int = 2, pin: bool = False) -> DataLoader[Any]:
    return DataLoader(
        _Results(function),
        sampler=items,
        batch_size=None,  # an item is a batch already
        collate_fn=tuple,  # which it is: nothing is converted
        num_workers=workers,
        prefetch_factor=ahead,
        persistent_workers=True,
        pin_memory=pin,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # of the seeds of the workers, which draw nothing; torch's own is left alone
    )


def _begin(loader: DataLoader[Any]) -> Iterator[Any]:
    """`iter(loader)` without its handler of a child's end, which raises wherever the program happens to be: `_take` notices."""
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    results = iter(loader)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return results


def _end(results: Any) -> None:
    """Tell the worker processes to end, and wait for it.

    Letting go of the iterator does that too, but an error that broke off the training may still hold it. The processes would
    then be ended at exit, by signals: two that come as one are one that a worker outlasts, and it would be waited for forever.
    """
    results._shutdown_workers()


def _begin_worker(worker: int) -> None:
    """Have a worker outlast Ctrl-C and the first SIGTERM, which reach every process of a job: training still asks for data,
    until the step after which it saves and ends its workers.

    And have it leave quietly where a signal breaks off the training while it is being handed a tensor: the worker's thread that
    does so would print a traceback.
    """
    loud = sys.excepthook

    def unless_left_alone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            loud(kind, error, trace)

    sys.excepthook = unless_left_alone

    def once(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, once)


def _take(results: Any) -> Any:
    try:
        value, problem = next(results)
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        # The second to fourth: while a tensor was being handed over.
        raise UserError(
            f"a process that reads data has died ({on_one_line(error)}); expected it to live; make memory (and "
            "/dev/shm) free, or lower the number of workers"
        ) from error
    if problem is not None:
        try:
            raise problem
        finally:  # or the error, which knows this frame, would keep the worker processes until garbage is collected
            del problem, results
    return value
