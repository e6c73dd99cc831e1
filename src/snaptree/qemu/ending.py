"""Ending a QEMU: asked, or by force."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from contextlib import suppress

from snaptree.errors import SnaptreeError, ToolError
from snaptree.qemu.running import RunningQemu

QUIT_SECONDS = 20.0
"""So long a QEMU may take to end that was told to quit, before it is killed."""


async def has_ended(ended: int, seconds: float) -> bool:
    """Whether a process, given by a descriptor of it, ends within so many seconds."""
    ready, _, _ = await asyncio.to_thread(select.select, [ended], [], [], seconds)
    return bool(ready)


async def end(qemu: RunningQemu, ended: int | None = None, *, ask: bool = True) -> None:
    """End QEMU, by force if need be.

    :param ended: a descriptor of the process; its number may be another process's by now.
    :param ask: without it by force at once: a QEMU that ends by itself removes its sockets' names, be they another's by
        then.
    :raise ToolError: the system holds it.
    """
    try:
        descriptor = ended if ended is not None else os.pidfd_open(qemu.pid)
    except ProcessLookupError:
        return
    try:
        if ask:
            with suppress(SnaptreeError):
                await qemu.qmp.execute("quit", seconds=QUIT_SECONDS)
            if await has_ended(descriptor, QUIT_SECONDS):
                return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        if not await has_ended(descriptor, QUIT_SECONDS):
            hint = "look at the kernel's log for the device"
            raise ToolError(f"QEMU (process {qemu.pid}) cannot be killed: the system does not let go of it", hint)
    finally:
        if ended is None:
            os.close(descriptor)
