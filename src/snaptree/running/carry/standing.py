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
from snaptree.qemu.jobs import FLUSH_SECONDS
from snaptree.qemu.running import RunningQemu
from snaptree.running.carry import firmware
from snaptree.running.context import Context
from snaptree.running.guard import PIVOT, Guard, Orders

CONT: tuple[str, dict[str, Any]] = ("cont", {})
GO_ON: list[tuple[str, dict[str, Any]]] = [("migrate_cancel", {}), CONT]
"""What lets a guest go on that waits until it is saved."""


@asynccontextmanager
async def guarded(qemu: RunningQemu, about: str, context: Context, *, go: Orders, stay: Orders) -> AsyncIterator[Guard]:
    """A guard stands by in the block. It ends what is pending also when the block fails and QEMU, which lives, says
    nothing any more: nobody knows when it will.

    :param about: what the journal's notes of it are about.
    """
    guard = Guard(context.journal, about, go=go, stay=stay)
    with guard:
        try:
            yield guard
        except BaseException:
            if guard.needed and qemu.qmp.connected:
                guard.left = context.left = True
                # What QEMU says from now on is for the guard to hear.
                await qemu.close()
            raise


@asynccontextmanager
async def standing_still(
    qemu: RunningQemu, guard: Guard, about: str, context: Context, *, saves: bool
) -> AsyncIterator[None]:
    """Let the guest stand still in the block, and go on afterwards, however that ends; how long it did is told.

    :param about: what the journal's notes of it are about.
    :param saves: its memory is being saved, which is cancelled when something fails.
    """
    running = await qemu.state() == RUNNING
    if running:
        remember_stop(about, qemu, context)
    begun = time.monotonic()
    guard.needed = running or saves
    try:
        if running:
            await stop(qemu)
        yield
        await go_on(qemu, running=running)
    except BaseException:
        await set_right(qemu, guard, running=running, saves=saves)
        raise
    guard.needed = False
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
    async with guarded(qemu, about, context, go=Orders(qemu.descriptor), stay=orders) as guard:
        async with standing_still(qemu, guard, about, context, saves=False):
            firmware.renew(copies, context)
            yield
        context.journal.note(about, PIVOT)


@asynccontextmanager
async def answering(qemu: RunningQemu) -> AsyncIterator[RunningQemu]:
    """A session with the same QEMU: another one, where that has come apart and QEMU lives on.

    :raise ToolError: there is none.
    """
    if await qemu.answers():
        yield qemu
        return
    if qemu.qmp.connected:
        raise ToolError(f"{qemu.qmp.name} does not answer")
    await qemu.hang_up()
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


async def stop(qemu: RunningQemu) -> None:
    """Let the guest stand still: QEMU brings to disk all that it has written."""
    await qemu.qmp.execute("stop", seconds=FLUSH_SECONDS)


async def set_right(qemu: RunningQemu, guard: Guard, *, running: bool, saves: bool) -> None:
    """Let the guest go on, something having failed; the guard is needed for it where QEMU does not answer.

    :param saves: its memory may be being saved, which is cancelled.
    """
    with suppress(SnaptreeError):
        async with answering(qemu) as now:
            ended = not saves or await memory.abandon(now.qmp)
            try:
                await go_on(now, running=running)
            finally:
                # QEMU does in its turn what it is told: what it was told before it has done, or refused.
                guard.needed = not (ended and await now.answers())


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
