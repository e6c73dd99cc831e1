"""An event loop where one is needed, and none where nothing is waited for: loading ``asyncio`` and the monitor's client
takes as long as a small merge."""

from __future__ import annotations

import sys
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class LoopNeededError(Exception):
    """What is to be waited for outlives one call: the whole work has to be done in an event loop."""


def runs() -> bool:
    """Whether an event loop runs in this thread."""
    if "asyncio" not in sys.modules:
        return False
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def without(work: Coroutine[Any, Any, Result]) -> Result:
    """Carry out a coroutine that waits for nothing by itself.

    :raise LoopNeededError: it says so.
    """
    try:
        work.send(None)
    except StopIteration as ended:
        result: Result = ended.value
        return result
    work.close()
    raise RuntimeError("waited for something without an event loop")


async def within(work: Coroutine[Any, Any, Result]) -> Result:
    """Carry out a coroutine that waits: in the loop that runs, or in one of its own."""
    if runs():
        return await work
    import asyncio

    return asyncio.run(work)


async def rest(seconds: float) -> None:
    """Wait so long: with the loop that runs, or without one."""
    if runs():
        import asyncio

        await asyncio.sleep(seconds)
    else:
        time.sleep(seconds)
