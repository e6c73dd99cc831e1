"""A guest that stands still for a step, and goes on afterwards however that ends."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

from snaptree.errors import SnaptreeError, ToolError
from snaptree.model.live import RUNNING
from snaptree.planning.live_steps import Kept
from snaptree.qemu import memory
from snaptree.qemu.running import RunningQemu
from snaptree.running.carry import firmware
from snaptree.running.context import Context
from snaptree.running.guard import PIVOT, Guard, Orders

CONT: tuple[str, dict[str, Any]] = ("cont", {})
GO_ON: list[tuple[str, dict[str, Any]]] = [("migrate_cancel", {}), CONT]
"""What lets a guest go on that waits until it is saved."""


@asynccontextmanager
async def standing_still(qemu: RunningQemu, about: str, context: Context, *, saves: bool) -> AsyncIterator[None]:
    """Let the guest stand still in the block, and go on afterwards, however that ends; how long it did is told.

    :param about: what the journal's notes of it are about.
    :param saves: its memory is being saved, which is cancelled when something fails.
    """
    running = await qemu.state() == RUNNING
    if running:
        remember_stop(about, qemu, context)
    begun = time.monotonic()
    if running:
        await qemu.qmp.execute("stop")
    try:
        yield
    except BaseException:
        with suppress(SnaptreeError):
            async with answering(qemu) as now:
                if saves:
                    await memory.abandon(now.qmp)
                await go_on(now, running=running)
        raise
    await go_on(qemu, running=running)
    if running:
        context.paused = time.monotonic() - begun


@asynccontextmanager
async def with_firmware(qemu: RunningQemu, copies: Iterable[Kept], about: str, context: Context) -> AsyncIterator[None]:
    """The copies of firmware state are of the instant of the block, for which the guest stands still.

    Without copies it does not.
    """
    copies = tuple(copies)
    if not copies:
        yield
        return
    orders = Orders(qemu.descriptor, [CONT] if await qemu.state() == RUNNING else [])
    with Guard(context.journal, about, go=Orders(qemu.descriptor), stay=orders):
        async with standing_still(qemu, about, context, saves=False):
            firmware.renew(copies, context)
            yield
        context.journal.note(about, PIVOT)


@asynccontextmanager
async def answering(qemu: RunningQemu) -> AsyncIterator[RunningQemu]:
    """A session with the same QEMU: another one, where that has hung up and lives on.

    :raise ToolError: there is none.
    """
    if await qemu.answers():
        yield qemu
        return
    again = await RunningQemu.attach(qemu.path)
    if again is None:
        raise ToolError(f"{qemu.qmp.name} went away")
    async with again:
        yield again


async def words_to_go_on(qemu: RunningQemu, *, running: bool) -> list[tuple[str, dict[str, Any]]]:
    """What lets a guest go on that waits until it is saved; a paused one stays so, with its disks in use again."""
    if running:
        return GO_ON
    known = "blockdev-set-active" in await qemu.commands()
    return [*GO_ON[:1], *([("blockdev-set-active", {"active": True})] if known else [])]


async def go_on(qemu: RunningQemu, *, running: bool) -> None:
    """Let the guest go on; a paused one stays so, with its disks in use again."""
    if running:
        await qemu.qmp.execute("cont")
    elif await qemu.run_state() == "postmigrate" and "blockdev-set-active" in await qemu.commands():
        await qemu.qmp.execute("blockdev-set-active", active=True)


def remember_stop(about: str, qemu: RunningQemu, context: Context) -> None:
    """Keep that we are about to stop the guest."""
    context.journal.note(_stopped(about), str(qemu.pid))


async def go_on_after_kill(about: str, qemu: RunningQemu, context: Context) -> None:
    """Let a guest go on that we had stopped when we were killed, unless it has gone on since."""
    stopped = context.journal.recall(_stopped(about)) == str(qemu.pid) and context.journal.noted(about) != PIVOT
    if stopped and await qemu.run_state() in ("paused", "postmigrate"):
        await qemu.qmp.execute("cont")


def _stopped(about: str) -> str:
    return f"stopped {about}"
