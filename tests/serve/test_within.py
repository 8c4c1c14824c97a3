"""A time limit, and a cancellation that comes in the moment the work is done."""

from __future__ import annotations

import asyncio

import pytest

from trigflow.serve.service import within


async def value(delay: float) -> int:
    await asyncio.sleep(delay)
    return 5


def test_result_and_time_limit() -> None:
    assert asyncio.run(within(10, value(0))) == 5
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(within(0.01, value(10)))


def test_errors_come_through() -> None:
    async def fails() -> None:
        raise KeyError("no")

    with pytest.raises(KeyError):
        asyncio.run(within(10, fails()))


def test_a_cancellation_is_never_lost() -> None:
    async def main() -> bool:
        ready = asyncio.get_running_loop().create_future()

        async def work() -> None:
            await ready

        task = asyncio.ensure_future(within(10, work()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        ready.set_result(None)
        await asyncio.sleep(0)  # the work is done, and whoever waits for it has not been told
        task.cancel()
        await asyncio.wait({task})
        return task.cancelled()

    assert asyncio.run(main())
