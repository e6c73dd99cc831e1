"""What libvirt does with the disks of a domain that runs: freezing them under overlays, and merging their layers.

libvirt's own view says how far it has come: where the domain runs the chain of each disk, where it has stopped since
the definition, which libvirt changes with it, and the headers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from snaptree.errors import BusyError, CancelledError, NoSpaceError, SnaptreeError, ToolError
from snaptree.images import durable, write_back
from snaptree.images.facts import read_facts
from snaptree.images.measure import holds
from snaptree.model.live import OFF, RUNNING
from snaptree.model.sizes import readable
from snaptree.planning.domain_steps import DomainForget, DomainMerge, DomainSnapshot
from snaptree.planning.live_steps import Cut, LiveJob
from snaptree.planning.steps import DeleteInternal, MakeInternal, Move
from snaptree.running import loops
from snaptree.running.carry import firmware, internals, moving
from snaptree.running.carry.finishing import finish, has_written, header_says, holds_all, move_job, moved_of
from snaptree.running.context import Context
from snaptree.store.libvirt.calls import COMMIT, BlockJob, DomainHandle
from snaptree.store.libvirt.memory import DomainMemory

POLL_SECONDS, SHORTEST = 0.02, 0.002
"""How often libvirt is asked how far it is: first after a moment, since there may be little to merge."""
SETTLE_SECONDS = 10.0
"""So long libvirt's view may lag behind a job that has ended."""
STANDS, GOES_ON = "stands still", "goes on"
GUEST, OVER = "the guest", "gone over"
HELD = 1
"""Bytes a second while nothing is to move: libvirt knows no slower."""


# ---- snapshots ----------------------------------------------------------------------------------------------------


def snapshot(step: DomainSnapshot, domain: DomainHandle | None, context: Context) -> None:
    """Let the guest go on in the overlays. Where the domain has stopped they show what the tips show, or are tips."""
    if domain is None or domain.state() == OFF:
        if step.marks and not was_taken(step, domain):
            raise ToolError(f"the domain stopped before {step.marks[0].tag!r} was there", "take the snapshot again")
        return
    if step.marks:
        if not was_taken(step, domain):
            begun = time.monotonic()
            DomainMemory(domain).mark(step.marks[0].tag, [mark.disk for mark in step.marks])
            context.paused = time.monotonic() - begun
        return
    if not are_tips(step.cuts, domain):
        _cut(step, domain, context)
    if not are_tips(step.cuts, domain):
        raise ToolError(f"libvirt reported success, but {step.cuts[0].overlay} is not what the guest writes to now")
    _go_on(step.about, domain, context)


def _cut(step: DomainSnapshot, domain: DomainHandle, context: Context) -> None:
    overlays = {cut.disk: cut.overlay for cut in step.cuts}
    # Where the file systems are to be frozen the guest's agent has to answer: the guest runs.
    stands = bool(step.firmware) and not step.quiesce and domain.state() == RUNNING
    if not stands:
        domain.cut(overlays, quiesce=step.quiesce)
        if firmware.changed(step.firmware):
            context.said.append("firmware state is of a moment before the disks': the guest changed it meanwhile")
        return
    with _standing_still(step.about, domain, context):
        firmware.renew(step.firmware, context)
        domain.cut(overlays, quiesce=False)


@contextmanager
def _standing_still(about: str, domain: DomainHandle, context: Context) -> Iterator[None]:
    """Let a guest that runs stand still in the block, and go on afterwards, even where we are killed in it; for how
    long is told. As it stops QEMU brings to disk all that it keeps.

    :param about: what the journal's notes of it are about.
    """
    begun = time.monotonic()
    if domain.state() == RUNNING:
        context.journal.note(about, STANDS)
        domain.stand_still()
    try:
        yield
    finally:
        _go_on(about, domain, context)
    context.paused = max(context.paused or 0.0, time.monotonic() - begun)


def _go_on(about: str, domain: DomainHandle, context: Context) -> None:
    """Let the guest go on that we have stopped."""
    if context.journal.noted(about) == STANDS:
        domain.go_on()
        context.journal.note(about, GOES_ON)


def unsnapshot(step: DomainSnapshot, domain: DomainHandle | None, context: Context) -> None:
    """Take back what is not done yet: the guest goes on in its tips."""
    if domain is not None:
        _go_on(step.about, domain, context)
    if domain is None or domain.state() == OFF:
        for mark in step.marks:
            internals.unmake(MakeInternal(mark.path, mark.tag), context)


def forget(step: DomainForget, domain: DomainHandle | None, context: Context) -> None:
    """Have an internal snapshot deleted; where the domain has stopped it is done without libvirt."""
    if domain is not None and domain.state() != OFF:
        DomainMemory(domain).delete_snapshot(step.name)
        return
    for path in step.paths:
        internals.delete(DeleteInternal(path, step.name), context)


def was_taken(step: DomainSnapshot, domain: DomainHandle | None) -> bool:
    """Whether the guest writes to the overlays, or did when it stopped; or the internal snapshot is there."""
    if not step.marks:
        return are_tips(step.cuts, domain)
    return domain is not None and step.marks[0].tag in domain.records()


def are_tips(cuts: Iterable[Cut], domain: DomainHandle | None) -> bool:
    """Whether the guest writes to the overlays, or did when it stopped."""
    chains = domain.chains() if domain is not None else {}
    if not chains:
        return has_written(cuts)
    return all(chains.get(cut.disk, ("",))[0] == cut.overlay for cut in cuts)


# ---- merges -------------------------------------------------------------------------------------------------------


async def merge(step: DomainMerge, domain: DomainHandle | None, context: Context) -> None:
    """Have libvirt merge, and see that it has; where the domain has stopped, the rest is done without it."""
    if domain is None or domain.state() == OFF:
        await _without_domain(step, domain, context)
        return
    _note_over(step.jobs, domain, context)
    _go_on(GUEST, domain, context)
    jobs = [job for job in step.jobs if not _is_merged(job, domain)]
    known = {job.disk for job in jobs if domain.block_job(job.disk) is not None}
    goes_on = context.recovering or domain.state() == RUNNING
    try:
        for number, job in enumerate(jobs):
            # One after the other: QEMU 10.0.2 dies of a stream that begins while another one ends.
            if job.disk not in known:
                _begin(job, domain, context)
            else:
                # Who had it begin may have been told another limit.
                domain.limit(job.disk, int(_speed(context)))
            await _follow(step, job, sum(each.bytes for each in jobs[number:]), domain, context)
    except BaseException:
        for job in jobs:
            domain.abort(job.disk)
        if goes_on:
            _go_on_without(domain)
        raise
    for job in jobs:
        context.journal.moved += job.bytes
    if goes_on:
        _go_on_without(domain)
    await _bring_to_disk(step, domain, context)
    for job in step.jobs:
        for path, _ in (job.target, *([job.child] if job.child is not None else [])):
            durable.sync_file(path)


def _go_on_without(domain: DomainHandle) -> None:
    """Let a guest go on that QEMU has stopped, there having been no room for what a pull writes as the guest reads: its
    request is tried once more.
    """
    with suppress(SnaptreeError):
        if domain.stands_for_error():
            domain.go_on()


def _begin(job: LiveJob, domain: DomainHandle, context: Context) -> None:
    speed = int(context.limiter.speed)
    if job.way == "pull":
        domain.pull(job.disk, job.below[0][0] if job.below else None, speed)
        return
    above = job.child[0] if job.child is not None else None
    name = read_facts(above, "qcow2").backing if above is not None else None
    relative = name is not None and not name.startswith("/")
    domain.commit(job.disk, job.row[0][0], job.row[-1][0], speed, active=job.active, relative=relative)


async def _follow(step: DomainMerge, job: LiveJob, left: int, domain: DomainHandle, context: Context) -> None:
    """Wait until the job has ended; the guest goes over to what its tip has been merged into.

    :param left: how many bytes it and the jobs after it move.
    """
    total = sum(each.bytes for each in step.jobs)
    done = total - left
    speed, pause = context.limiter.speed, SHORTEST
    while True:
        if context.cancelled.is_set():
            raise CancelledError(f"stopped: {step.summary}")
        state = domain.block_job(job.disk)
        if state is None:
            await _require_merged(job, domain)
            context.moved(min(done + job.bytes, total), total)
            return
        now = _speed(context)
        if now != speed:
            domain.limit(job.disk, int(now))
            speed = now
        # QEMU leaves what it copies in the page cache; all of it would be waited for at the end.
        write_back.begin_file(job.target[0])
        if job.active and state.kind == COMMIT and state.ready:
            _let_over(job, domain, context)
        context.moved(min(done + _moved(job, state), total), total)
        await loops.rest(pause)
        pause = min(2 * pause, POLL_SECONDS)


def _speed(context: Context) -> float:
    """How many bytes a second may be moved; 0 is as fast as it can."""
    return float(HELD) if context.limiter.held else context.limiter.speed


def _let_over(job: LiveJob, domain: DomainHandle, context: Context) -> None:
    """Let the guest go over to what its tip has been merged into.

    Once a transient domain has ended nobody knows to which of the two files its guest wrote last: it stands still until
    that is noted.
    """
    if domain.is_persistent():
        domain.pivot(job.disk)
        return
    with _standing_still(GUEST, domain, context):
        domain.pivot(job.disk)
        _note_over([job], domain, context)


def _note_over(jobs: Iterable[LiveJob], domain: DomainHandle, context: Context) -> None:
    """Note of which disks the guest has gone over."""
    for job in jobs:
        if job.active and _is_merged(job, domain):
            context.journal.note(f"{OVER} {job.disk}", job.row[0][0])


def _moved(job: LiveJob, state: BlockJob) -> int:
    return moved_of(move_job(job), state.current, state.total)


def _is_merged(job: LiveJob, domain: DomainHandle) -> bool:
    """Whether the domain has what was merged in its chain no more."""
    chain = domain.chains().get(job.disk, ())
    return job.target[0] in chain and not any(path in chain for path, _ in job.gone)


async def _require_merged(job: LiveJob, domain: DomainHandle) -> None:
    """See that a job that has ended has done its work.

    :raise NoSpaceError: there is less room than it needed.
    :raise ToolError: it was ended by somebody, or has failed.
    """
    for _ in range(int(SETTLE_SECONDS / POLL_SECONDS)):
        if domain.state() == OFF or _is_merged(job, domain):
            return
        await loops.rest(POLL_SECONDS)
    there = os.statvfs(os.path.dirname(job.target[0]))
    if (free := there.f_bavail * there.f_frsize) < job.bytes:
        raise NoSpaceError(
            f"libvirt has ended the {job.way} of {job.disk}: its file system has {readable(free)} of room",
            "free some room, then go on with 'snaptree gc'",
        )
    raise ToolError(
        f"libvirt has ended the {job.way} of {job.disk}, and {job.row[-1][0]} has not been merged",
        "see libvirtd's log and 'virsh domblkerror', then go on with 'snaptree gc'",
    )


async def _bring_to_disk(step: DomainMerge, domain: DomainHandle, context: Context) -> None:
    """Have QEMU bring to disk the tables that say what it has merged, before anything that it was merged from goes.

    It writes the header first, and keeps the tables until somebody flushes: it does when it stops the guest.

    :raise BusyError: the guest stands still: who has stopped it did not want it to run for a moment.
    :raise ToolError: they are not there.
    """
    for job in step.jobs:
        if job.active or await holds_all(job):
            continue
        if runs := domain.state() == RUNNING:
            with _standing_still(GUEST, domain, context):
                pass
        if not await holds_all(job):
            if not runs:
                raise BusyError(
                    f"somebody has stopped {domain.name}, and only while it runs {job.target[0]} gets on disk all that "
                    "was merged into it",
                    f"let it run, or shut it down, then run 'snaptree recover {domain.name}'",
                )
            raise ToolError(
                f"{job.target[0]} has not all on disk that was merged into it",
                "let the domain run, or shut it down, then run 'snaptree recover'",
            )


def went_on(step: DomainMerge, domain: DomainHandle | None, context: Context) -> bool:
    """Whether a merge that was left has come so far that it is finished, not undone: its jobs run, or one has ended."""
    if domain is None or domain.state() == OFF:
        return any(_was_merged(job, domain, context) for job in step.jobs)
    return any(_is_merged(job, domain) or domain.block_job(job.disk) is not None for job in step.jobs)


def _was_merged(job: LiveJob, domain: DomainHandle | None, context: Context) -> bool:
    """Whether a job had come to its end when the domain stopped: its definition says it, or the header; of a domain
    that libvirt does not know any more what was noted."""
    if job.active:
        chains = domain.chains() if domain is not None else {}
        tip = chains.get(job.disk, ("",))[0] if chains else context.journal.recall(f"{OVER} {job.disk}")
        return tip == job.row[0][0]
    return header_says(job) and not _lacks(job)


def _lacks(job: LiveJob) -> bool:
    """Whether the target lacks some of what was merged: QEMU may have been killed before it had brought it to disk."""
    return all(os.path.exists(path) for path, _ in job.gone) and not holds(job.target, job.gone)


async def _without_domain(step: DomainMerge, domain: DomainHandle | None, context: Context) -> None:
    """Finish what a domain that has stopped has left: by the mover, or what that cannot do by a storage daemon."""
    await finish([job for job in step.jobs if not _was_merged(job, domain, context)], context)


def unmerge(step: DomainMerge, domain: DomainHandle | None, context: Context) -> None:
    """End what goes on. What was written stays: it shows the same, or is read only through what is above."""
    if domain is None or domain.state() == OFF:
        moving.unmove(Move(tuple(move_job(job) for job in step.jobs)), context)
        return
    for job in step.jobs:
        domain.abort(job.disk)
    _go_on(GUEST, domain, context)
    _go_on_without(domain)
