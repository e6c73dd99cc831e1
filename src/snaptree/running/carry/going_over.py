"""The step in which a QEMU that has loaded a memory takes over from the one that runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from contextlib import AsyncExitStack, suppress

from snaptree.errors import CancelledError, RefusedError, SnaptreeError, ToolError, UnhealthyError
from snaptree.images import durable, memory_file
from snaptree.images.facts import open_to_read, read_facts
from snaptree.model.live import RUNNING
from snaptree.planning.live_steps import Kept
from snaptree.planning.memory_steps import GoOver, Load, Save
from snaptree.qemu import describing, ending, launching, memory, sockets
from snaptree.qemu.running import RunningQemu
from snaptree.running.carry import firmware, standing
from snaptree.running.carry import memory as saving
from snaptree.running.carry.making import unmake
from snaptree.running.carry.nodes import inode_at
from snaptree.running.context import Context
from snaptree.running.guard import PIVOT, STAY, Orders

_SOCKETS = "sockets"


async def go_over(step: GoOver, context: Context) -> None:
    """Load, let the old guest stand still, and let the new one go on; before that whatever fails leaves the old one."""
    if context.journal.noted(step.monitor) == PIVOT:
        await _finish(step, context, await _survivor(step, context))
        return
    _keep_sockets(context)
    new: RunningQemu | None = None
    try:
        if step.load is not None:
            firmware.bring(step.load.firmware, context)
            new = await _loaded(step.load, context)
        if step.load is not None and new is not None and context.qemu is not None:
            await _hold(new, step.load.firmware)
            firmware.give_names_back(step.load.firmware, context)
    except BaseException:
        if new is not None:
            await _drop(new)
        _as_before(step, context)
        raise
    try:
        if context.cancelled.is_set():
            raise CancelledError("stopped when the memory had been loaded: the machine is as it was")
        if context.qemu is not None:
            await _take_over(step, context, context.qemu, new)
        else:
            await _begin(step, context, new)
    except BaseException:
        if context.journal.noted(step.monitor) != PIVOT:
            if new is not None:
                await _drop(new)
            _as_before(step, context)
        elif new is not None:
            # For recovery: it serves one client.
            await new.close()
        raise
    await _finish(step, context, new)


def _as_before(step: GoOver, context: Context) -> None:
    """Let the old QEMU's sockets and files of firmware state have their names again."""
    _give_sockets_back(context)
    if step.load is not None:
        firmware.give_back(step.load.firmware, context)


def _keep_sockets(context: Context) -> None:
    """Keep the sockets of the old QEMU reachable: a second one takes over their names as soon as it is started."""
    paths = sockets.listening(context.qemu.pid) if context.qemu is not None else ()
    context.journal.note(_SOCKETS, json.dumps(paths))
    for path in paths:
        with suppress(SnaptreeError):
            durable.keep_name(path, context.token)


def _give_sockets_back(context: Context, *, back: bool = True) -> None:
    """Let the old QEMU's sockets have their names again, or forget them."""
    for path in json.loads(context.journal.recall(_SOCKETS) or "[]"):
        kept = durable.temporary_path(path, context.token)
        if back and os.path.lexists(kept):
            durable.replace(kept, path)
        durable.remove_small(kept)


# ---- loading ------------------------------------------------------------------------------------------------------


async def _loaded(load: Load, context: Context) -> RunningQemu:
    """A QEMU that has loaded the memory and waits; nothing of the machine that runs is touched.

    :raise RefusedError: it is not like the machine whose memory it is.
    :raise ToolError: it does not start, or cannot load.
    """
    words = launching.command_line(load.command, load.disks, context.token, context.keys, loads=True)
    log = load.monitor.removesuffix(".sock") + ".log"
    try:
        new = await launching.launch(words, load.monitor, load.folder, log, loads=True)
    except ToolError as error:
        if context.qemu is not None:
            hint = "if both cannot run at once (a port, a file that one of them holds), 'snaptree stop' it first"
            error.hint = f"{error.hint}; {hint}" if error.hint else hint
        raise
    try:
        require_alike(load, await describing.describe(new))
        descriptor = open_to_read(load.memory.path)
        try:
            _require_still(load, descriptor)
            known = memory.forms_known(await memory.settings(new.qmp))
            lent = await memory.lend(new, descriptor, known)
            await memory.load(new.qmp, lent.uri, load.memory.form)
            await lent.take_back()
            for chain in load.disks.values():
                context.journal.note(_looks_of(chain[0][1]), _looks(chain[0][1]))
        finally:
            os.close(descriptor)
    except BaseException as error:
        await _drop(new)
        if isinstance(error, ToolError) and not error.hint:
            error.hint = f"QEMU said: {said}" if (said := launching.words_of(log)) else "is the memory file whole?"
        raise
    return new


async def _hold(new: RunningQemu, pieces: Iterable[Kept]) -> None:
    """Have a QEMU that has loaded open its firmware state to write, while the names lead to that.

    From version 10 on it would do so when it goes on: until then it has no image open to write.
    """
    if "blockdev-set-active" not in await new.commands():
        return
    graph = await new.graph()
    for each in pieces:
        for node in graph.opened(inode_at(each.live)):
            await new.qmp.execute("blockdev-set-active", node_name=node.name, active=True)


def require_alike(load: Load, now: dict[str, str]) -> None:
    """Refuse a machine that is not like the one whose memory it is to load: QEMU takes some of them without a word.

    :raise RefusedError: names the first difference.
    """
    for aspect, was in load.memory.needs.items():
        if aspect in now and now[aspect] != was:
            shown = (
                "" if aspect in ("processor features", "processors") else f": it had {was}, and has {now[aspect]} now"
            )
            raise RefusedError(
                f"the memory in {load.memory.path} is of a machine with another {aspect}{shown}",
                "set the start command as it was, or go back without the memory (--no-memory)",
            )


def _require_still(load: Load, descriptor: int) -> None:
    looks, kept = memory_file.identity_at(descriptor), load.memory.identity
    if kept is not None and (looks.size, looks.header) != (kept.size, kept.header):
        raise UnhealthyError(f"the memory file {load.memory.path} has changed", "put it back as it was")


async def _drop(new: RunningQemu) -> None:
    """End a QEMU that has not taken over."""
    with suppress(SnaptreeError):
        await ending.end(new, ask=False)
    await new.close()
    durable.remove_small(new.path)


# ---- taking over --------------------------------------------------------------------------------------------------


async def _begin(step: GoOver, context: Context, new: RunningQemu | None) -> None:
    """Let the new one go on where no other runs."""
    context.journal.note(step.monitor, PIVOT)
    try:
        if new is not None and step.after == RUNNING:
            await new.qmp.execute("cont")
    except BaseException:
        context.journal.note(step.monitor, STAY)
        raise


async def _take_over(step: GoOver, context: Context, old: RunningQemu, new: RunningQemu | None) -> None:
    running = await old.state() == RUNNING
    if step.save is not None:
        await memory.quiet(old)
    before = await memory.settings(old.qmp)
    go = Orders((new or old).descriptor, [standing.CONT] if new is not None and step.after == RUNNING else [])
    stay = Orders(old.descriptor, await standing.words_to_go_on(old, running=running))
    saving.remember(step.monitor, before, old, context)
    async with standing.guarded(old, step.monitor, context, go=go, stay=stay) as guard:
        begun = time.monotonic()
        guard.needed = True
        try:
            if running:
                standing.remember_stop(step.monitor, old, context)
                await standing.stop(old)
            firmware.renew(step.firmware, context)
            if step.save is not None:
                await _save(step.save, context, old, before)
            await _begin(step, context, new)
        except BaseException:
            with suppress(SnaptreeError):
                async with standing.answering(old) as now:
                    await standing.set_right(now, guard, running=running, saves=True)
                    await memory.restore(now.qmp, before)
            raise
        if new is not None:
            context.paused = time.monotonic() - begun


async def _save(save: Save, context: Context, old: RunningQemu, before: memory.Settings) -> None:
    """Save the memory of the old guest, which stands still: all of it before anything goes on."""
    if not memory.allowed(state := await old.run_state(), save.forms):
        raise saving.not_allowed(state)
    descriptor = saving.new_file(save.path, save.like, context)
    try:
        form = await saving.choose(old, before, save.forms, context)
        saving.note_form(save.path, form, context)
        lent = await memory.lend(old, descriptor, memory.forms_known(before))
        try:
            await old.qmp.execute("migrate", uri=lent.uri)
            await memory.until_done(old.qmp, saving.followed(save.used, context))
        finally:
            await lent.take_back()
    finally:
        os.close(descriptor)
    durable.publish(durable.temporary_path(save.path, context.token), save.path)


async def _finish(step: GoOver, context: Context, new: RunningQemu | None) -> None:
    """End the old QEMU, and let the new one have its place. Where that fails it is given back, for recovery."""
    async with AsyncExitStack() as stack:
        if new is not None and new is not context.qemu:
            stack.push_async_callback(new.close)
        await _take_its_place(step, context, new)
        stack.pop_all()


async def _take_its_place(step: GoOver, context: Context, new: RunningQemu | None) -> None:
    old = context.qemu
    if old is not None and (new is None or old.pid != new.pid):
        if new is not None and "blockdev-set-active" in await old.commands():
            # Its images are closed in order; asked to end it would take away sockets that are the new one's by now.
            with suppress(SnaptreeError):
                await old.qmp.execute("blockdev-set-active", active=False)
        await ending.end(old, ask=new is None)
        await old.close()
    if step.load is not None and os.path.lexists(step.load.monitor):
        durable.replace(step.load.monitor, step.monitor)
    _give_sockets_back(context, back=False)
    if step.load is not None:
        firmware.settle(step.load.firmware, context)
    if new is not None:
        new.path = step.monitor
        if step.after != RUNNING and "blockdev-set-active" in await new.commands():
            # Its images are not in use before it runs (QEMU 10), and nothing could be merged until then.
            with suppress(SnaptreeError):
                await new.qmp.execute("blockdev-set-active", active=True)
    elif step.load is not None or old is not None:
        durable.remove_small(step.monitor)
    context.qemu = new


# ---- after a kill -------------------------------------------------------------------------------------------------


async def _survivor(step: GoOver, context: Context) -> RunningQemu | None:
    """The QEMU that has taken over, if it lives; one that has died before it wrote anything is loaded again."""
    load = step.load
    if load is None:
        return None
    if not os.path.lexists(load.monitor):
        return context.qemu
    new = await RunningQemu.attach(load.monitor)
    if new is None and not any(_was_written(chain[0][1], chain[0][2], context) for chain in load.disks.values()):
        with suppress(SnaptreeError, OSError):
            firmware.settle(load.firmware, context)
            new = await _loaded(load, context)
    if new is None:
        durable.remove_small(load.monitor)
        context.said.append("the machine died when it had just gone over, and is off")
    elif step.after == RUNNING:
        try:
            if await new.run_state() != "running":
                await new.qmp.execute("cont")
        except BaseException:
            await new.close()
            raise
    return new


def _was_written(path: str, image_format: str, context: Context) -> bool:
    """Whether a new tip, empty or made of an internal point, may have been written to since the memory was loaded."""
    return read_facts(path, image_format).written and context.journal.recall(_looks_of(path)) != _looks(path)


def _looks_of(path: str) -> str:
    return f"looks {path}"


def _looks(path: str) -> str:
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


async def went_over(step: GoOver, context: Context) -> bool:
    """Whether the new guest has taken over, or was about to and must."""
    return context.journal.noted(step.monitor) == PIVOT


async def ungo(step: GoOver, context: Context) -> None:
    """End what was started, and let the old guest go on."""
    if step.load is not None and context.recovering:
        new = await RunningQemu.attach(step.load.monitor)
        if new is not None:
            await _drop(new)
        durable.remove_small(step.load.monitor)
        _as_before(step, context)
    if context.qemu is not None and context.recovering:
        await saving.set_right(step.monitor, context, context.qemu)
    if step.save is not None:
        unmake(step.save.path, context)
