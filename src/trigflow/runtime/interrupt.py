"""Signals that ask a program to end: Ctrl-C (SIGINT), and SIGTERM, which schedulers send before they take a machine away.

A training run saves what it has reached and ends with an exception of its own for each, which the command line turns into exit
codes. A second signal is not waited for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
ECHO = 3.0
"""Seconds after a signal in which torchrun may pass it on to a process that has had it already from the scheduler."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Whoever clears up after Ctrl-C does so after this too."""


def stop_for(number: int) -> KeyboardInterrupt:
    """The exception that stands for a signal."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # Python delivers signals to it alone


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` for SIGTERM while the block lasts, as Python raises KeyboardInterrupt for Ctrl-C."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise stop_for(number)

    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold both signals back until the block has ended, so that what it changes is changed as a whole or not at all."""
    if not _in_main_thread():
        yield
        return
    held: list[int] = []
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in previous.items():
        if handler is not None:
            signal.signal(number, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        for number, handler in previous.items():
            if handler is not None:
                signal.signal(number, handler)
    for number in held:
        signal.raise_signal(number)


class Stops:
    """What becomes of the two signals while a run trains; a context manager.

    In a single process the first one raises KeyboardInterrupt or `Terminated` wherever the program is, but for blocks that are
    `deferred`. Of several processes, which have to agree on the step after which they stop, each only takes notice of it. A
    second one ends a single process with the same exceptions, and one of several at once. Signals that are ignored, as
    Ctrl-C is by programs in the background of a script, stay so.

    Args:
        several: whether this is one of several processes.

    Attributes:
        received: the first of the signals that has come; 0 before.
        agreed: the one that has come to any process, as they have told each other; 0 before.
    """

    def __init__(self, several: bool = False) -> None:
        self.several = several
        self.received = self.agreed = 0
        self._when = 0.0
        self._deferring = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stops:
        self.received = self.agreed = 0
        for number in SIGNALS if _in_main_thread() else ():
            handler = signal.getsignal(number)
            if handler is not None and handler is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def tell(self) -> dict[str, float]:
        """What the processes have to agree on after each step, as numbers whose means go to `hear`."""
        return {signal.Signals(number).name: float(self.received == number) for number in SIGNALS}

    def hear(self, means: dict[str, float]) -> None:
        """Take in the means over the processes of what they tell; SIGTERM comes first."""
        for number in SIGNALS:
            if means[signal.Signals(number).name] > 0:
                self.agreed = number

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that the first signal does not break off: it is raised at the end."""
        before, self._deferring = self.received, True
        try:
            yield
        finally:
            self._deferring = False
        if self.received and not before and not self.several:
            raise stop_for(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._when = number, time.monotonic()
            if not self.several and not self._deferring:
                raise stop_for(number)
        elif not (number == self.received and "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() < self._when + ECHO):
            if not self.several:
                raise stop_for(number)
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
