"""A time limit that never swallows a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


async def within(seconds: float, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled after this time.

    `asyncio.wait_for` of Python 3.11 and before returns the result when it is cancelled in the moment the work is done, and
    the task goes on as if nobody had cancelled it.

    Raises:
        TimeoutError: `asyncio.TimeoutError`, when the time is over.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    finally:
        task.cancel()
    if not done:
        raise asyncio.TimeoutError
    return task.result()
