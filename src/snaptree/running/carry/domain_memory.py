"""What libvirt does with a domain's memory: saving it together with the disks, and loading it into the domain.

libvirt has one QEMU for a domain. The one of now is ended before the memory is loaded, so that all that can be looked
at is looked at before; where loading fails all the same the domain goes on from the memory that was saved, and what was
to be given up is started anew.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from snaptree.errors import BusyError, CancelledError, SnaptreeError, ToolError, UnhealthyError
from snaptree.images import durable, save_image
from snaptree.images.facts import read_facts
from snaptree.model.live import OFF, PAUSED
from snaptree.model.memory import LIBVIRT
from snaptree.planning.domain_memory_steps import DomainGoOn, DomainGoOver, DomainSaveMemory
from snaptree.planning.live_steps import Kept
from snaptree.planning.memory_steps import Save
from snaptree.running import loops
from snaptree.running.carry import firmware
from snaptree.running.carry import memory as saving
from snaptree.running.carry.domain_jobs import are_tips
from snaptree.running.carry.making import unmake
from snaptree.running.context import Context
from snaptree.running.guard import PIVOT
from snaptree.store import trees
from snaptree.store.libvirt import applying
from snaptree.store.libvirt.calls import DomainHandle
from snaptree.store.libvirt.memory import DomainMemory

POLL_SECONDS = 0.01
EARLY_SECONDS = 0.2
"""libvirt 11.3 answers nobody to the end who asks how far it is, or tells it to stop, before it has begun to save: so
long after it has stopped the guest it is left alone."""
LAST_WRITES_SECONDS = 5.0
"""So long after its memory has been saved a QEMU that ends may still write to its images what it has kept."""
_BEFORE = "the domain was"


# ---- saving -------------------------------------------------------------------------------------------------------


async def save(step: DomainSaveMemory, domain: DomainHandle | None, context: Context) -> None:
    """Have libvirt freeze the disks and save the memory, of one instant: it freezes them when all is saved."""
    if not was_saved(step, domain):
        if domain is None or domain.state() == OFF:
            raise ToolError(f"the domain stopped before its memory was saved in {step.path}", "start it, and try again")
        calls = DomainMemory(domain)
        overlays = {cut.disk: cut.overlay for cut in step.cuts}
        _make_file(step.path, step.like, context)
        keeping = _Keeping(step.firmware, calls, context, always=domain.state() == PAUSED)
        begun = time.monotonic()
        await _waited_for(lambda: calls.save(step.name, step.path, overlays), calls, step.used, context, keeping)
        context.paused = time.monotonic() - begun
        keeping.tell()
        if not was_saved(step, domain):
            raise ToolError(f"libvirt reported success, but {step.cuts[0].overlay} is not what the guest writes to now")
    save_image.put_form_right(step.path)
    if broken := save_image.problem_of(step.path):
        # It may be elsewhere: libvirt does not see what was mounted since it was started. The guest is in its overlays.
        unmake(step.path, context)
        firmware.forget(step.firmware)
        if domain is not None:
            domain.forget_record(step.name)
        hint = "the snapshot was not taken; look for it where libvirt sees that path, and choose another place"
        context.failed = UnhealthyError(f"libvirt reported success, but {broken}", hint)
        return
    _finish_file(step.path, context)


def was_saved(step: DomainSaveMemory, domain: DomainHandle | None) -> bool:
    """Whether it has happened: the guest writes to the overlays, or did when it stopped, and the memory is whole."""
    return are_tips(step.cuts, domain)


def unsave(step: DomainSaveMemory, context: Context) -> None:
    """Take everything back: libvirt has let the guest go on in the tips that it has."""
    unmake(step.path, context)


def _make_file(path: str, like: str, context: Context) -> None:
    """Make the file that libvirt fills: for us only, for it has keys in it."""
    os.close(saving.new_file(path, like, context))
    durable.publish(durable.temporary_path(path, context.token), path)


def _finish_file(path: str, context: Context) -> None:
    durable.sync_file(path)
    durable.sync_folder(path)
    saving.note_form(path, LIBVIRT, context)


class _Keeping:
    """Copies of firmware state, which are brought up to date while libvirt has the guest stand still.

    :param always: it stands still all the while.
    """

    def __init__(self, copies: tuple[Kept, ...], calls: DomainMemory, context: Context, *, always: bool) -> None:
        self._copies = copies
        self._calls = calls
        self._context = context
        self._done = False
        if always:
            firmware.renew(copies, context)
            self._done = True

    def look(self) -> None:
        """Copy, if the guest stands still now, and still does when that is done."""
        if self._copies and not self._done and self._calls.stands_for_snapshot():
            firmware.renew(self._copies, self._context)
            self._done = self._calls.stands_for_snapshot()

    def tell(self) -> None:
        """Say so, where the copies may be of another moment than the memory, which has this state in it as well."""
        if self._copies and not self._done and firmware.changed(self._copies):
            self._context.said.append("firmware state that is put back without the memory is of a moment before it")


async def _waited_for(
    call: Callable[[], None], calls: DomainMemory, used: int, context: Context, keeping: _Keeping | None = None
) -> None:
    """Carry out a call that lasts, and tell how far it is; when the operation is stopped, it is ended.

    :raise CancelledError: it was.
    """
    failed: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:
            failed.append(error)

    thread, stopped = threading.Thread(target=work), False
    thread.start()
    saving_since: float | None = None
    try:
        while thread.is_alive():
            if keeping is not None:
                keeping.look()
            if used and saving_since is None and calls.stands_still():
                saving_since = time.monotonic()
            if saving_since is not None and time.monotonic() > saving_since + EARLY_SECONDS:
                if context.cancelled.is_set():
                    calls.cancel()
                    stopped = True
                elif (written := calls.written()) is not None:
                    context.moved(written, max(written, used))
            await loops.rest(POLL_SECONDS)
    finally:
        thread.join()
    if failed and stopped:
        raise CancelledError("stopped while the memory was saved: the machine is as it was")
    if failed:
        raise failed[0]


# ---- going over ---------------------------------------------------------------------------------------------------


async def go_over(step: DomainGoOver, domain: DomainHandle | None, context: Context) -> None:
    """Have the domain go on from another memory, standing still as yet; or turn it off."""
    if domain is None:
        raise ToolError("libvirt does not know the domain any more", "see 'virsh list --all'")
    calls = DomainMemory(domain)
    if context.journal.noted(step.uuid) == PIVOT:
        await _load_again(step, domain, calls, context)
    elif not _is_there(step, domain):
        await _go_over(step, domain, calls, context)
    _note_looks(step, context)
    context.journal.note(step.uuid, PIVOT)
    firmware.settle(step.pieces, context)


async def _go_over(step: DomainGoOver, domain: DomainHandle, calls: DomainMemory, context: Context) -> None:
    text = calls.definition(step.memory, step.disks) if step.memory is not None else ""
    before = domain.state()
    context.journal.note(_BEFORE, before)
    begun = time.monotonic()
    if before != OFF and step.save is not None:
        await _park(step.save, step.parks, calls, context)
    elif before != OFF:
        domain.stop()
    if domain.state() != OFF:
        raise ToolError("the domain has been started by somebody else meanwhile", "see what did it, and try again")
    firmware.renew(step.firmware, context)
    if context.cancelled.is_set():
        raise CancelledError("stopped: the machine goes on as it was")
    if step.memory is not None:
        await _load(step, step.memory, text, domain, calls, context)
    if before != OFF:
        context.paused = time.monotonic() - begun


async def _park(save: Save, name: str, calls: DomainMemory, context: Context) -> None:
    _make_file(save.path, save.like, context)
    await _waited_for(lambda: calls.park(name, save.path), calls, save.used, context)
    save_image.put_form_right(save.path)
    _finish_file(save.path, context)


async def _load(
    step: DomainGoOver, memory: str, text: str, domain: DomainHandle, calls: DomainMemory, context: Context
) -> None:
    firmware.bring(step.pieces, context)
    await _waited_for(lambda: calls.restore(memory, text, PAUSED), calls, 0, context)
    if not _is_there(step, domain):
        raise ToolError(f"libvirt reported success, but the domain does not run on its new disks from {memory}")


def _is_there(step: DomainGoOver, domain: DomainHandle) -> bool:
    """Whether the domain runs, or stands still, on the disks that belong to the memory that is loaded."""
    if step.memory is None or domain.state() == OFF:
        return False
    chains = domain.chains()
    return all(chains.get(disk, ("",))[0] == path for disk, (path, _) in step.disks.items())


def has_gone(step: DomainGoOver, domain: DomainHandle | None, context: Context) -> bool:
    """Whether the domain has gone over.

    :raise BusyError: somebody has started it on the disks of before since, and both those and the new ones are written.
    """
    if context.journal.noted(step.uuid) != PIVOT:
        return domain is not None and _is_there(step, domain)
    if domain is None or domain.state() == OFF or _is_there(step, domain):
        return True
    # libvirt has not been told yet with what to start it.
    if any(_was_written(*file, context) for file in _tips(step)):
        hint = "'virsh destroy' it, and run 'snaptree recover' again"
        raise BusyError(f"domain {domain.name} was started on disks that it had gone over from", hint)
    return False


async def _load_again(step: DomainGoOver, domain: DomainHandle, calls: DomainMemory, context: Context) -> None:
    """Load once more what has died, after a kill, before it has written anything."""
    if step.memory is None or domain.state() != OFF or any(_was_written(*file, context) for file in _tips(step)):
        return
    text = calls.definition(step.memory, step.disks)
    await _load(step, step.memory, text, domain, calls, context)


def _tips(step: DomainGoOver) -> list[tuple[str, str]]:
    return list(step.disks.values())


def _was_written(path: str, image_format: str, context: Context) -> bool:
    """Whether a tip has been written to since the memory was loaded."""
    return context.journal.recall(_looks_of(path)) != _looks(path) and read_facts(path, image_format).written


def _note_looks(step: DomainGoOver, context: Context) -> None:
    for path, _ in _tips(step) if context.journal.noted(step.uuid) != PIVOT else ():
        context.journal.note(_looks_of(path), _looks(path))


def _looks_of(path: str) -> str:
    return f"looks {path}"


def _looks(path: str) -> str:
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


async def ungo(step: DomainGoOver, domain: DomainHandle | None, context: Context) -> None:
    """Let the domain go on as before: from the memory that was saved, or started anew."""
    if domain is not None:
        calls = DomainMemory(domain)
        firmware.give_back(step.pieces, context)
        before = context.journal.recall(_BEFORE)
        if before not in (None, OFF) and domain.state() == OFF:
            await _go_back(step, before or OFF, domain, calls, context)
        if step.parks and step.parks in domain.records():
            domain.forget_record(step.parks)
            # While it was current libvirt took what it goes back by from the one before.
            applying.apply(domain, trees.load_tree(context.journal.database, context.journal.machine), known=())
    if step.save is not None:
        unmake(step.save.path, context)


async def _go_back(
    step: DomainGoOver, before: str, domain: DomainHandle, calls: DomainMemory, context: Context
) -> None:
    if step.save is not None and _fits(step.save.path, domain, calls):
        path = step.save.path
        text = calls.definition(path)
        try:
            await _waited_for(lambda: calls.restore(path, text, before), calls, 0, context)
        except SnaptreeError as error:
            error.hint = f"its memory is in {path}; 'virsh start {domain.name}' gives that up"
            raise
        return
    domain.start(paused=before == PAUSED)
    context.said.append("the domain was started anew on the disks of before: of its memory nothing was saved")


def _fits(path: str, domain: DomainHandle, calls: DomainMemory) -> bool:
    """Whether the memory that was saved is whole, and the disks are those of its instant still."""
    save_image.put_form_right(path)
    if save_image.problem_of(path):
        return False
    tips = [chain[0] for chain in domain.chains().values() if chain and os.path.exists(chain[0])]
    saved, latest = os.stat(path).st_mtime, max(os.stat(tip).st_mtime for tip in tips)
    if latest <= saved and all(map(os.path.isfile, tips)):
        return True
    return latest <= saved + LAST_WRITES_SECONDS and not calls.may_have_run()


def go_on(step: DomainGoOn, domain: DomainHandle | None, context: Context) -> None:
    """Let the guest go on whose memory was loaded."""
    if domain is None or domain.state() == OFF:
        context.said.append("the machine died when it had just gone over, and is off")
        return
    chains = domain.chains()
    if all(chains.get(disk, ("",))[0] == path for disk, (path, _) in step.disks.items()):
        domain.go_on()
