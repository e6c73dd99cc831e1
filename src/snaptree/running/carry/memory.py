"""The step in which a running machine's memory is saved together with its disks."""

from __future__ import annotations

import os
from contextlib import suppress

from msgspec import Struct

from snaptree.errors import SnaptreeError, ToolError
from snaptree.images import durable
from snaptree.images.inode import inode_of, is_still
from snaptree.images.rights import keep_private
from snaptree.model.live import PAUSED, RUNNING
from snaptree.model.memory import BACKGROUND, PLAIN, SLEEPING
from snaptree.planning.memory_steps import SaveMemory
from snaptree.qemu import memory
from snaptree.qemu.jobs import FLUSH_SECONDS
from snaptree.qemu.memory import Followed, Settings
from snaptree.qemu.running import RunningQemu
from snaptree.running.carry import firmware, live, live_internals
from snaptree.running.carry.making import unmake
from snaptree.running.carry.standing import go_on, go_on_after_kill, guarded, standing_still, words_to_go_on
from snaptree.running.context import Context
from snaptree.running.guard import PIVOT, Orders


def is_whole(path: str, context: Context) -> bool:
    """Whether the memory file is there: it has its name only when all of it is on disk."""
    return os.path.exists(path) and any(
        is_still(path, each.generation, each.inode) for each in context.journal.claims(path)
    )


async def save(step: SaveMemory, context: Context) -> None:
    """Freeze the disks and save the memory, of one instant.

    When the memory cannot be saved and the disks are frozen already, the operation goes on without: ``context.failed``
    says why.
    """
    if is_whole(step.path, context):
        return
    try:
        if context.qemu is None:
            live.require_dead(step.cuts, context)
            raise ToolError(f"QEMU died before the memory was saved in {step.path}", "take the snapshot again")
        if context.recovering:
            await _resume(step, context, context.qemu)
        else:
            await _begin(step, context, context.qemu)
    except (SnaptreeError, OSError) as error:
        if context.left or not await live.was_frozen(step, context):
            raise
        unmake(step.path, context)
        await live_internals.unmark(step.marks, context)
        firmware.forget(step.firmware)
        shown = durable.explain(error, step.path, "write") if isinstance(error, OSError) else error
        shown.hint = shown.hint or "the snapshot was not taken"
        context.failed = shown


async def _begin(step: SaveMemory, context: Context, qemu: RunningQemu) -> None:
    await memory.quiet(qemu)
    before = await memory.settings(qemu.qmp)
    remember(step.path, before, qemu, context)
    descriptor = new_file(step.path, step.like, context)
    try:
        actions = await live.prepared(qemu, step, context)
        form = await choose(qemu, before, step.forms, context)
        lent = await memory.lend(qemu, descriptor, memory.forms_known(before))
        told = followed(step.used, context)
        try:
            stay = Orders(qemu.descriptor, await words_to_go_on(qemu, running=await qemu.state() == RUNNING))
            async with guarded(qemu, step.path, context, go=Orders(qemu.descriptor), stay=stay) as guard:
                async with standing_still(qemu, guard, step.path, context, saves=True):
                    firmware.renew(step.firmware, context)
                    saving = _Saving(qemu, before, lent.uri, descriptor, told, context)
                    form = await saving.in_background(form, step.forms)
                    await qemu.qmp.execute("transaction", actions=actions, seconds=FLUSH_SECONDS)
                    if form != BACKGROUND:
                        await saving.begin(form)
                context.journal.note(step.path, PIVOT)
            note_form(step.path, form, context)
            await live.require_frozen(qemu, step)
            await memory.until_done(qemu.qmp, told)
            if form == BACKGROUND:
                firmware.require_unchanged(step.firmware)
        except BaseException:
            await memory.abandon(qemu.qmp)
            raise
        finally:
            await lent.take_back()
    finally:
        os.close(descriptor)
        with suppress(SnaptreeError):
            await memory.restore(qemu.qmp, before)
    durable.publish(durable.temporary_path(step.path, context.token), step.path)


def new_file(path: str, like: str, context: Context) -> int:
    """Make the hidden file that the memory is written to, for its owner only; open for QEMU to write."""
    temporary = durable.prepare_file(path, like, context.token, (), 0)
    context.journal.claim(path, *inode_of(temporary))
    with durable.explained(path, "open"):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    # Whoever may read the disk may not read the keys that are in memory.
    keep_private(descriptor)
    return descriptor


async def choose(qemu: RunningQemu, before: Settings, forms: tuple[str, ...], context: Context) -> str:
    """The first form that QEMU can save in here, with everything set for it: that it cannot shows only when it is set.

    :raise ToolError: it can save in none.
    """
    known = memory.forms_known(before)
    why: SnaptreeError | None = None
    for form in forms:
        if form not in known:
            continue
        try:
            await memory.use(qemu.qmp, before, form, int(context.limiter.speed))
        except ToolError as error:
            why = error
            continue
        if why is not None:
            context.said.append(f"the memory was saved while the guest waited: {why.message}")
        return form
    raise why or ToolError(f"{qemu.qmp.name} cannot save its memory", "take the snapshot without --memory")


def not_allowed(state: str) -> ToolError:
    """The error of a machine that has come into a run state in which it cannot be saved."""
    return ToolError(f"the memory cannot be saved: {memory.obstacle(state)}", "take it when the guest runs")


class _Saving(Struct):
    """The part of the saving for which the guest stands still."""

    qemu: RunningQemu
    before: Settings
    uri: str
    descriptor: int
    followed: Followed
    context: Context

    async def in_background(self, form: str, forms: tuple[str, ...]) -> str:
        """Begin to save in the background, if that is the form, before the disks are frozen.

        When a device is in the way all is as it was. The form that is left to be saved in, when that one fails.

        :raise ToolError: QEMU refuses: a device is in the way.
        """
        state = await self.qemu.run_state()
        forms = memory.allowed(state, forms)
        if form != BACKGROUND and form in forms:
            return form
        # From any other state, as one that has never run, QEMU 10.0.2 ends itself: "invalid runstate transition".
        if form == BACKGROUND and state in (PAUSED, SLEEPING):
            await self.qemu.qmp.execute("migrate", uri=self.uri)
            try:
                await memory.until_instant(self.qemu.qmp, form, self.followed)
                return form
            except ToolError as error:
                await memory.abandon(self.qemu.qmp)
                await memory.quiet(self.qemu)
                if state == SLEEPING:
                    raise
                self.context.said.append(f"the memory was saved while the guest waited: {error.message}")
            durable.set_length(self.descriptor, 0, "the memory file")
            os.lseek(self.descriptor, 0, os.SEEK_SET)
        left = tuple(each for each in forms if each != BACKGROUND)
        if not left:
            raise not_allowed(state)
        return await choose(self.qemu, self.before, left, self.context)

    async def begin(self, form: str) -> None:
        """Save in another form, with the disks frozen: when all is saved QEMU has closed them."""
        await self.qemu.qmp.execute("migrate", uri=self.uri)
        await memory.until_instant(self.qemu.qmp, form, self.followed)


def followed(used: int, context: Context) -> Followed:
    """What the waiting for a memory is told by, and tells."""
    return Followed(lambda written: context.moved(written, max(written, used)), context.cancelled.is_set)


# ---- after a kill -------------------------------------------------------------------------------------------------


async def _resume(step: SaveMemory, context: Context, qemu: RunningQemu) -> None:
    """Wait for what QEMU goes on saving, if the guest ran again when snaptree was killed: it is of one instant then."""
    try:
        pid = (context.journal.recall(_settings(step.path)) or "").partition(" ")[0]
        form = context.journal.recall(_form(step.path))
        if context.journal.noted(step.path) != PIVOT or form is None:
            raise ToolError("snaptree was killed before the guest's memory was saved", "take the snapshot again")
        if pid != str(qemu.pid):
            raise ToolError("QEMU died before the memory was saved", "take the snapshot again")
        await memory.until_done(qemu.qmp, followed(step.used, context))
        if form == BACKGROUND:
            firmware.require_unchanged(step.firmware)
    finally:
        await set_right(step.path, context, qemu)
    durable.publish(durable.temporary_path(step.path, context.token), step.path)


async def set_right(about: str, context: Context, qemu: RunningQemu) -> None:
    """End what is still being saved, let the guest go on that we have stopped, and set all as its user had it."""
    pid, _, text = (context.journal.recall(_settings(about)) or "").partition(" ")
    if pid != str(qemu.pid):
        return
    await memory.abandon(qemu.qmp)
    await go_on_after_kill(about, qemu, context)
    await go_on(qemu, running=False)
    with suppress(SnaptreeError):
        await memory.restore(qemu.qmp, Settings.parse(text))


async def unsave(step: SaveMemory, context: Context) -> None:
    """Take everything back: the guest goes on in the tips that it has."""
    if context.qemu is not None and context.recovering:
        await set_right(step.path, context, context.qemu)
    await live.unfreeze(step, context)
    unmake(step.path, context)


def remember(about: str, before: Settings, qemu: RunningQemu, context: Context) -> None:
    """Keep the settings that the user has, and of which process."""
    context.journal.note(_settings(about), f"{qemu.pid} {before.text()}")


def note_form(path: str, form: str, context: Context) -> None:
    """Keep in which form the memory is saved."""
    context.journal.note(_form(path), form)


def form_of(path: str, context: Context) -> str:
    """In which form this operation has saved the memory."""
    return context.journal.recall(_form(path)) or PLAIN


def _form(path: str) -> str:
    return f"form {path}"


def _settings(path: str) -> str:
    return f"settings {path}"
