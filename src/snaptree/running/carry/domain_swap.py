"""The step in which a running domain goes over to merged files that were built beside: a block copy of libvirt's.

The guest writes to an overlay with little in it, which libvirt copies into another one. Just before the guest goes over
the merged file and the one whose place it takes change names: libvirt opens what the other overlay stands on when it
does, and by name, while what is open already stays what it was. Until then all can be taken back; afterwards the old
files go. Nothing else may open anything by these names between: a job would mix the two (``docs/libvirt.md``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from snaptree.errors import BusyError, CancelledError, SnaptreeError, ToolError
from snaptree.images import durable
from snaptree.images.facts import read_facts
from snaptree.images.inode import is_still
from snaptree.images.locks import open_in, users_of
from snaptree.model.live import OFF
from snaptree.planning.domain_steps import DomainSwap, Over
from snaptree.planning.steps import MakeOverlay
from snaptree.running import loops
from snaptree.running.carry import making
from snaptree.running.context import Context
from snaptree.store import operations
from snaptree.store.libvirt.calls import DomainHandle

POLL_SECONDS, SHORTEST = 0.02, 0.002
"""How often it is asked how far a copy is: first after a moment, since there is little to copy."""
CONVERGE_SECONDS = 60.0
"""So long it may take until all is copied but what the guest writes meanwhile."""
SETTLE_SECONDS = 10.0
"""So long libvirt's view may lag behind a job that has ended."""
DYING_SECONDS = 1.0
"""So long it may take until libvirt says of a domain that has just died that it is off."""


async def swap(step: DomainSwap, domain: DomainHandle | None, context: Context) -> None:
    """Have the guest go over; of a domain that has stopped the overlay that it wrote to gets the other one's name."""
    waiting = [each for each in step.overs if not _is_over(each, domain)]
    if waiting and domain is not None and domain.state() != OFF:
        try:
            await _go_over(waiting, domain, context)
        except CancelledError:
            raise
        except SnaptreeError:
            if not await _has_died(domain):
                raise
        waiting = [each for each in step.overs if not _is_over(each, domain)]
    for each in waiting:
        _require_begun(each, domain)
        _without_domain(each, context)
    for each in step.overs:
        # What it was built of: by now it has the hidden name.
        durable.discard_temporary(each.upper, context.token)


async def _go_over(overs: Sequence[Over], domain: DomainHandle, context: Context) -> None:
    for each in overs:
        _require_begun(each, domain)
        if domain.block_job(each.disk) is None:
            _renew_overlay(each, context)
            domain.copy(each.disk, each.after, each.chain)
        elif domain.mirror(each.disk) != each.after:
            hint = f"see 'virsh blockjob {domain.name} {each.disk}'; wait for its end, or abort it"
            raise BusyError(f"libvirt is at work on {each.disk} of domain {domain.name}", hint)
    await _until_ready(overs, domain, context)
    for each in overs:
        _put_in_place(each, context)
    for each in overs:
        await _pivot(each, domain)


def _require_begun(each: Over, domain: DomainHandle | None) -> None:
    """See that the guest writes to the overlay that it was given for this.

    :raise BusyError: somebody has changed the disk since.
    """
    top = domain.chains().get(each.disk, ("",))[0] if domain is not None else each.before
    if top != each.before:
        hint = f"undo what was done to it meanwhile, with virsh; {each.before} has what its guest wrote before"
        raise BusyError(f"{each.disk} is {top or 'gone'} by now, which somebody else has made so", hint)


def _renew_overlay(each: Over, context: Context) -> None:
    """Have the overlay empty again that an earlier copy has written to."""
    if not context.recovering or not read_facts(each.after, "qcow2").written:
        return
    steps = operations.steps_of(context.journal.database, context.journal.operation)
    for step in steps:
        if isinstance(step, MakeOverlay) and step.path == each.after:
            making.unmake(each.after, context)
            making.make_overlay(step, context)


async def _until_ready(overs: Sequence[Over], domain: DomainHandle, context: Context) -> None:
    """Wait until nothing is left to be copied but what is written meanwhile.

    :raise ToolError: a copy has ended before, or does not come to that.
    """
    waiting, pause, until = list(overs), SHORTEST, time.monotonic() + CONVERGE_SECONDS
    while True:
        if context.cancelled.is_set():
            raise CancelledError("stopped before the guest went over: it writes to where it did")
        for each in list(waiting):
            state = domain.block_job(each.disk)
            if state is None:
                raise ToolError(
                    f"libvirt has ended the copy of {each.disk}, and the guest has not gone over",
                    "see libvirtd's log and 'virsh domblkerror', then go on with 'snaptree gc'",
                )
            if state.ready:
                waiting.remove(each)
        if not waiting:
            return
        if time.monotonic() > until:
            raise ToolError(
                f"the guest writes to {waiting[0].disk} faster than it is copied", "try again when it writes less"
            )
        await loops.rest(pause)
        pause = min(pause * 2, POLL_SECONDS)


async def _pivot(each: Over, domain: DomainHandle) -> None:
    until = time.monotonic() + SETTLE_SECONDS
    while not _is_over(each, domain):
        if time.monotonic() > until:
            raise ToolError(
                f"libvirt does not let {each.disk} go over to {each.after}",
                "see libvirtd's log, then use 'snaptree gc'",
            )
        if domain.block_job(each.disk) is not None:
            domain.pivot(each.disk)
        else:
            await loops.rest(POLL_SECONDS)


async def _has_died(domain: DomainHandle) -> bool:
    until = time.monotonic() + DYING_SECONDS
    while time.monotonic() < until:
        if domain.state() == OFF:
            return True
        await loops.rest(POLL_SECONDS)
    return False


def _without_domain(each: Over, context: Context) -> None:
    """Let the overlay that has what the guest wrote have the name by which the tree will know it."""
    if os.path.exists(each.before):
        # Nobody may start it on the name that goes.
        context.holding.take_over(each.before)
        _put_in_place(each, context)
        durable.replace(each.before, each.after)


# ---- names --------------------------------------------------------------------------------------------------------


def _is_in_place(each: Over, context: Context) -> bool:
    """Whether the merged file has the name of the one whose place it takes."""
    made = context.journal.claims(each.upper)
    return any(is_still(each.upper, one.generation, one.inode) for one in made)


def _put_in_place(each: Over, context: Context) -> None:
    if _is_in_place(each, context):
        return
    temporary = durable.temporary_path(each.upper, context.token)
    # Nobody may come upon it unlocked: it has the name that others know in the next moment.
    context.lock.extend([temporary])
    durable.exchange(temporary, each.upper)


def _is_read(each: Over, context: Context) -> bool:
    """Whether the QEMU that writes to the overlay has the merged file open, as one has that was started since."""
    if not _is_in_place(each, context):
        return False
    status = os.stat(each.upper)
    return any((status.st_dev, status.st_ino) in open_in(process) for process in users_of(each.before))


# ---- where it stands ----------------------------------------------------------------------------------------------


def _is_over(each: Over, domain: DomainHandle | None) -> bool:
    """Whether the guest writes to the other overlay, or will when it is started next."""
    if not os.path.exists(each.before):
        return os.path.exists(each.after)
    return domain is not None and domain.chains().get(each.disk, ("",))[0] == each.after


async def went_over(step: DomainSwap, domain: DomainHandle | None, context: Context) -> bool:
    """Whether the guest has gone over on any disk, or its QEMU, started since, reads a merged file already.

    A copy that goes on is ended first: only then is it certain.
    """
    await _end_copies(step, domain)
    return any(_is_over(each, domain) or _is_read(each, context) for each in step.overs)


async def unswap(step: DomainSwap, domain: DomainHandle | None, context: Context) -> None:
    """End the copies, and give the files their names back."""
    await _end_copies(step, domain)
    for each in step.overs:
        if _is_over(each, domain):
            raise ToolError(f"the guest has gone over to {each.after} meanwhile", "run 'snaptree recover'")
        if _is_in_place(each, context) and not _is_read(each, context):
            durable.exchange(durable.temporary_path(each.upper, context.token), each.upper)


async def _end_copies(step: DomainSwap, domain: DomainHandle | None) -> None:
    if domain is None or domain.state() == OFF:
        return
    for each in step.overs:
        until = time.monotonic() + SETTLE_SECONDS
        while domain.state() != OFF and domain.mirror(each.disk) == each.after:
            domain.abort(each.disk)
            if time.monotonic() > until:
                raise ToolError(
                    f"libvirt does not end the copy of {each.disk}", f"see 'virsh blockjob {domain.name} {each.disk}'"
                )
            await loops.rest(SHORTEST)
