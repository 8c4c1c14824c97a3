"""What worker processes read is what one process reads, in the same order, whatever happens to them."""

from __future__ import annotations

import multiprocessing
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import programs
from trigflow.data import ImageDataset, Loader, Order, open_dataset
from trigflow.data.loader import _begin_worker, in_order
from trigflow.runtime.errors import MissingExtraError, UserError

Save = Callable[..., Path]


def slow_first(item: int) -> int:
    """The first items take longest, so that workers finish out of order."""
    time.sleep(0.02 if item < 2 else 0)
    return item * item


def refuse_five(item: int) -> int:
    if item == 5:
        raise MissingExtraError("five", "a package", "extra")
    return item


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order(workers: int) -> None:
    assert list(in_order(slow_first, range(8), workers)) == [i * i for i in range(8)]
    assert list(in_order(slow_first, [], workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_mistake_comes_at_its_place_in_one_line(workers: int) -> None:
    results = in_order(refuse_five, range(8), workers)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r'^five needs a package, .*"trigflow\[extra\]"$'):
        next(results)


def fail_at_five(item: int) -> int:
    if item == 5:
        raise RuntimeError("DataLoader worker (pid 1) is what this says")
    return item


def test_an_error_in_a_worker_is_not_taken_for_its_death() -> None:
    results = in_order(fail_at_five, range(8), 2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match=r"(?s)failed in a worker process.*in fail_at_five.*is what this says"):
        next(results)


def test_torchs_own_random_numbers_are_left_alone() -> None:
    before = torch.random.get_rng_state()
    assert list(in_order(slow_first, range(3), 1)) == [0, 1, 4]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture
def photos(save: Save) -> Path:
    """30 images of noise, in two classes."""
    rng = np.random.Generator(np.random.PCG64(0))
    for index in range(30):
        save(f"{'cats' if index % 3 else 'dogs'}/{index:02d}.png", rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    return save("cats/99.png", rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).parent.parent


def plans(dataset: ImageDataset) -> Callable[[int], Tensor]:
    return Order(len(dataset), 8, seed=1).indices


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_steps_are_the_same_whatever_the_workers(photos: Path, workers: int) -> None:
    memory, streamed = open_dataset(photos), open_dataset(photos, memory_limit_gib=0, workers=workers)
    assert streamed.rows is not None
    plan = plans(memory)
    loader = Loader(streamed, plan, 9, workers=workers)
    for step in (0, 1, 2, 2, 3, 7, 8, 4, 5):  # with one asked for twice, a leap ahead and a return
        assert torch.equal(loader.read(step, plan(step)), memory.stored(plan(step)))
    assert torch.equal(loader.read(9, plan(9)), memory.stored(plan(9)))  # past the end
    loader.close()
    assert torch.equal(loader.read(5, plan(5)), memory.stored(plan(5)))  # and on again
    loader.close()


def test_workers_end_without_a_signal_whoever_still_holds_them(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an error does that has broken off the training while it waited for data."""
    signalled: list[object] = []
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "terminate", signalled.append)
    dataset = open_dataset(photos, memory_limit_gib=0)
    loader = Loader(dataset, plans(dataset), 100, workers=2)
    loader.read(0, plans(dataset)(0))
    held: Any = loader._coming
    processes = list(held._workers)
    assert [process.is_alive() for process in processes] == [True, True]
    loader.close()
    assert [process.is_alive() for process in processes] == [False, False]
    assert signalled == []


def test_a_plan_that_changes_is_followed(photos: Path) -> None:
    dataset = open_dataset(photos, memory_limit_gib=0)
    shift = 0
    plan = plans(dataset)
    loader = Loader(dataset, lambda step: plan(step + shift), 100, workers=2)
    for step in range(3):
        loader.read(step, plan(step))
    shift = 5  # while steps 3 and 4 have been read ahead by the old plan
    for step in range(3, 6):
        assert torch.equal(loader.read(step, plan(step + 5)), dataset.stored(plan(step + 5)))
    other = torch.tensor([3, 3, 0])
    assert torch.equal(loader.read(6, other), dataset.stored(other))  # what no plan says
    loader.close()


def test_what_is_in_memory_needs_no_workers(photos: Path) -> None:
    dataset = open_dataset(photos)
    loader = Loader(dataset, plans(dataset), 5, workers=4)
    assert loader.workers == 0
    assert torch.equal(loader.read(0, torch.tensor([4])), dataset.images[4:5])


def test_waiting_is_measured(photos: Path) -> None:
    dataset = open_dataset(photos)

    @dataclass
    class Slow:
        shards = None
        window = 1

        def __len__(self) -> int:
            return len(dataset)

        def __getitem__(self, indices: Tensor) -> Tensor:
            time.sleep(0.05)
            return dataset.stored(indices)

        def only(self, indices: Tensor) -> Slow:
            return self

    slow = replace(dataset, values=dataset.values[:0], rows=Slow())
    loader = Loader(slow, plans(slow), 5)
    loader.read(0, torch.tensor([1]))
    assert loader.waited() >= 0.05
    assert loader.waited() == 0.0
    loader.read(0, torch.tensor([1]))  # asked for twice, read once
    assert loader.waited() < 0.05


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_breaks_later_is_named(photos: Path, workers: int) -> None:
    dataset = open_dataset(photos, memory_limit_gib=0)
    path = photos / "cats" / "99.png"
    path.write_bytes(path.read_bytes()[:60])
    loader = Loader(dataset, lambda step: torch.arange(len(dataset)), 2, workers=workers)
    with pytest.raises(UserError, match=r"^image 'cats/99.png' in .* has changed since .*; .*; .*data check$"):
        loader.read(0, torch.arange(len(dataset)))
    loader.close()


DEATH = """
import os, signal, sys, time
import torch
from trigflow.data import Loader, open_dataset
from trigflow.runtime.errors import UserError

dataset = open_dataset(sys.argv[1], memory_limit_gib=0)
loader = Loader(dataset, lambda step: torch.arange(4), 1000, workers=1)
loader.read(0, torch.arange(4))
(worker,) = loader._coming._workers
os.kill(worker.pid, signal.SIGKILL)
time.sleep(0.2)  # anything but reading: nothing is raised here
try:
    for step in range(1, 1000):
        loader.read(step, torch.arange(4))
except UserError as error:
    print(error)
loader.close()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_a_worker_that_dies_is_said_so(photos: Path) -> None:
    """In a process of its own, where no handler is set yet."""
    found = programs.run(["-c", DEATH, photos], timeout=120)
    assert re.match(r"a process that reads data has died .*; expected .*; make memory", found.stdout), found.stderr


@pytest.mark.parametrize(("workers", "ahead"), [(-1, 1), (0, 0)])
def test_numbers_out_of_range_are_refused(photos: Path, workers: int, ahead: int) -> None:
    dataset = open_dataset(photos)
    with pytest.raises(UserError, match="expected 0 or more"):
        Loader(dataset, plans(dataset), 5, workers=workers, ahead=ahead)


def test_a_worker_is_quiet_about_a_training_that_has_gone_and_loud_about_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[type[BaseException]] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: said.append(kind))
    _begin_worker(0)
    for error in (ConnectionResetError(), BrokenPipeError(), EOFError(), OSError(), ValueError()):
        sys.excepthook(type(error), error, None)
    assert said == [OSError, ValueError]
