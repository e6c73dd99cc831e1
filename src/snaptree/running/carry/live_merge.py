"""The step in which the QEMU of a running machine merges layers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

from snaptree.errors import RefusedError, SnaptreeError, ToolError, UnhealthyError
from snaptree.images import durable, gate, write_back
from snaptree.model.live import RUNNING
from snaptree.planning.live_steps import File, LiveJob, LiveMerge
from snaptree.planning.steps import Move
from snaptree.qemu import live_jobs
from snaptree.qemu.graph import BlockGraph
from snaptree.qemu.jobs import PREFIX, JobProgress, Steering, abandon
from snaptree.qemu.live_jobs import Merging
from snaptree.qemu.running import RunningQemu
from snaptree.running.carry import moving
from snaptree.running.carry.by_qemu import bytes_moved
from snaptree.running.carry.finishing import finish, header_says, holds_all, move_job
from snaptree.running.carry.nodes import inode_at, is_top, let_go, node_of
from snaptree.running.carry.standing import answering, guarded
from snaptree.running.context import Context
from snaptree.running.guard import PIVOT, STAY, Orders


async def merge(step: LiveMerge, context: Context) -> None:
    """Have QEMU merge, and see that it has; when it has died, the rest is done without it."""
    if context.qemu is None:
        await _without_qemu(step, context)
        return
    qemu = context.qemu
    if context.recovering:
        await _stay(qemu, step, context)
    known = await live_jobs.living(qemu.qmp, [_id(step, job, context) for job in step.jobs])
    graph = await qemu.graph()
    waiting = [job for job in step.jobs if not is_merged(graph, job)]
    jobs = {job: _merging(graph, job, _id(step, job, context)) for job in waiting}
    steering = Steering(qemu.qmp, context.limiter, len(jobs))
    steering.found_running(known)
    goes_on = context.recovering or await qemu.state() == RUNNING
    try:
        for merging in jobs.values():
            if merging.id not in known:
                await live_jobs.begin(qemu.qmp, merging, steering.first_speed)
        report = _reporter(step, jobs, context)
        await live_jobs.follow(qemu.qmp, list(jobs.values()), report, context.cancelled, steering)
        for job in jobs:
            if not job.active:
                await _flush(qemu, graph, job)
        for job, merging in sorted(jobs.items(), key=lambda each: each[0].active):
            await (_go_over if job.active else _finalize)(qemu, job, merging, context)
            context.journal.moved += job.bytes
    except BaseException:
        # What is not finalized leaves a chain that is right; what is stays so, and the rest is done later.
        await abandon(qemu.qmp, [each.id for each in jobs.values()])
        with suppress(SnaptreeError):
            for job in (each for each in jobs if each.active):
                async with answering(qemu) as now:
                    await _tell(now, job, context)
        if goes_on:
            await _go_on_without(qemu)
        raise
    finally:
        steering.end()
    await _close(qemu, step)
    _sync(step)
    _require_merged(await qemu.graph(), step)
    if goes_on:
        await _go_on_without(qemu)


async def _stay(qemu: RunningQemu, step: LiveMerge, context: Context) -> None:
    """Let a guest that was about to go over stay where it was: it may have been told to, or not, and nobody knows.

    What the journal had been told of it counts no more, and says so before the guest can write again.
    """
    active = {_id(step, job, context): job for job in step.jobs if job.active}
    unclear = await live_jobs.pending(qemu.qmp, list(active))
    for name in unclear:
        context.journal.note(active[name].row[0][0], STAY)
    await abandon(qemu.qmp, unclear)
    for job in active.values():
        # Somebody may have finalized it just then, or cancelled it before.
        await _tell(qemu, job, context)


async def _go_on_without(qemu: RunningQemu) -> None:
    """Let a guest go on that QEMU has stopped, there having been no room: while data is pulled up, what the guest reads
    of it is written to the upper file, too. Its request is tried once more, and needs no room there any more.
    """
    with suppress(SnaptreeError):
        if await qemu.run_state() == "io-error":
            await qemu.qmp.execute("cont")


def _id(step: LiveMerge, job: LiveJob, context: Context) -> str:
    """The job's name in QEMU, by which it is found again."""
    return f"{PREFIX}{context.token}-{step.jobs.index(job)}"


def _reporter(step: LiveMerge, jobs: Mapping[LiveJob, Merging], context: Context) -> live_jobs.Reporter:
    total = sum(job.bytes for job in step.jobs)
    done = sum(job.bytes for job in step.jobs if job not in jobs)

    def report(state: Mapping[str, JobProgress]) -> None:
        for job in jobs:
            # QEMU leaves what it copies in the page cache; all of it would be waited for when it is flushed.
            write_back.begin_file(job.target[0])
        parts = (bytes_moved(move_job(job), state.get(merging.id)) for job, merging in jobs.items())
        context.moved(done + sum(parts), total)

    return report


# ---- where it stands ----------------------------------------------------------------------------------------------


def _stands_on(graph: BlockGraph, above: File, below: File | None) -> bool:
    """Whether the one image stands on the other (or on nothing) in QEMU."""
    found = graph.opened(inode_at(above[0])) if os.path.exists(above[0]) else ()
    if len(found) != 1:
        return False
    node = graph.below(found[0])
    if below is None:
        return node is None
    return node is not None and os.path.exists(below[0]) and graph.file_of(node).inode == inode_at(below[0])


def is_merged(graph: BlockGraph, job: LiveJob) -> bool:
    """Whether QEMU has the merged layers out of its graph."""
    if job.way == "pull":
        return _stands_on(graph, job.row[-1], job.below[0] if job.below else None)
    if job.child is None:
        return is_top(graph, job.row[0][0])
    return _stands_on(graph, job.child, job.row[0])


def _merging(graph: BlockGraph, job: LiveJob, name: str) -> Merging:
    top, lowest = node_of(graph, job.row[-1][0]), node_of(graph, job.row[0][0])
    if job.way == "commit":
        backing = gate.relative_backing_name(job.child[0], job.row[0][0]) if job.child is not None else None
        return Merging(name, "commit", graph.root_of(top).name, top.name, lowest.name, backing, job.active)
    # Another disk may stand on the same file, which is then open more than once.
    below = next((each for each in graph.chain(lowest)[1:]), None) if job.below else None
    if job.below and (below is None or graph.file_of(below).inode != inode_at(job.below[0][0])):
        raise UnhealthyError(f"QEMU has not {job.below[0][0]} beneath {job.row[0][0]}", "see what was done to it")
    backing = gate.relative_backing_name(job.row[-1][0], job.below[0][0]) if job.below else None
    return Merging(name, "pull", graph.root_of(top).name, top.name, below.name if below else None, backing, False)


# ---- the end of each ----------------------------------------------------------------------------------------------


async def _flush(qemu: RunningQemu, graph: BlockGraph, job: LiveJob) -> None:
    """Have the tables on disk that say what was copied, before a header says that nothing else is needed.

    QEMU (10.0.2) writes the header first; killed between, the image would have neither its data nor what it stood on.

    :raise ToolError: they are not there.
    """
    path, _ = job.target
    await qemu.flush(node_of(graph, path).name, path)
    if not await holds_all(job):
        raise ToolError(f"QEMU reported success, but {path} has not all that was to be moved", "try it with QEMU off")


async def _finalize(qemu: RunningQemu, job: LiveJob, merging: Merging, context: Context) -> None:
    await live_jobs.settle(qemu.qmp, merging)


async def _go_over(qemu: RunningQemu, job: LiveJob, merging: Merging, context: Context) -> None:
    """Let the guest go over from its tip to the layer into which that was committed.

    Before it both files are the same, afterwards the tip is stale, and the files cannot tell: the journal does.
    """
    journal, path = context.journal, job.row[0][0]
    go, stay = (Orders(qemu.descriptor, [(each, {"id": merging.id})]) for each in ("job-finalize", "job-cancel"))
    async with guarded(qemu, path, context, go=go, stay=stay) as guard:
        guard.needed = True
        try:
            if await live_jobs.stop_the_guest(qemu.qmp, merging):
                journal.note(path, PIVOT)
            await live_jobs.settle(qemu.qmp, merging)
        except BaseException:
            with suppress(SnaptreeError):
                async with answering(qemu) as now:
                    await _tell(now, job, context)
                    guard.needed = not await abandon(now.qmp, [merging.id])
            raise
        # One that somebody has cancelled when it was ready ends without an error, and the guest stays where it was.
        merged = await _tell(qemu, job, context)
    if not merged:
        raise ToolError(f"somebody has cancelled the {merging.id} job", "try it again")


async def _tell(qemu: RunningQemu, job: LiveJob, context: Context) -> bool:
    """Have the journal say what QEMU does: whether the guest has gone over. Somebody may have finalized the job, or
    cancelled it."""
    journal, path = context.journal, job.row[0][0]
    merged = is_merged(await qemu.graph(), job)
    if merged != (journal.noted(path) == PIVOT):
        journal.note(path, PIVOT if merged else STAY)
    return merged


async def _close(qemu: RunningQemu, step: LiveMerge) -> None:
    """Have QEMU close what was merged. Of a chain that is as deep as may be it takes seconds to read the graph."""
    graph = await qemu.graph()
    for job in step.jobs:
        for path, _ in reversed(job.gone):
            inode = inode_at(path) if os.path.exists(path) else None
            formats = [node.name for node in graph.opened(inode)] if inode is not None else []
            files = [node.name for node in graph.nodes.values() if inode is not None and node.inode == inode]
            await let_go(qemu, [*formats, *files])


def _sync(step: LiveMerge) -> None:
    """What QEMU has written is on disk before what it was made of goes."""
    for job in step.jobs:
        for path, _ in (job.target, *([job.child] if job.child is not None else [])):
            durable.sync_file(path)


def _require_merged(graph: BlockGraph, step: LiveMerge) -> None:
    for job in step.jobs:
        written = any(is_top(graph, path) for path, _ in job.gone)
        if written or not is_merged(graph, job) or not header_says(job):
            raise ToolError(f"QEMU reported success, but {job.target[0]} has not taken the place of what was merged")


# ---- afterwards ---------------------------------------------------------------------------------------------------


async def went_on(step: LiveMerge, context: Context) -> bool:
    """Whether a merge that was left has come so far that it is finished, not undone: its jobs run, or one has ended."""
    if context.qemu is None:
        return any(_was_merged(job, context) for job in step.jobs)
    living = await live_jobs.living(context.qemu.qmp, [_id(step, job, context) for job in step.jobs])
    graph = await context.qemu.graph()
    for job in step.jobs:
        went_over = job.active and context.journal.noted(job.row[0][0]) == PIVOT
        if went_over and not living and not is_merged(graph, job):
            raise RefusedError(
                f"the guest had gone over to {job.row[0][0]}, and QEMU was then started on {job.row[-1][0]} of before",
                "stop it and copy that file if what was written since matters, then run 'snaptree recover'",
            )
    return bool(living) or any(is_merged(graph, job) for job in step.jobs)


def _was_merged(job: LiveJob, context: Context) -> bool:
    """Whether a job had been finalized when QEMU died: the header says it, or the journal where the guest went over."""
    if job.active:
        return context.journal.noted(job.row[0][0]) == PIVOT
    return header_says(job)


async def _without_qemu(step: LiveMerge, context: Context) -> None:
    """Finish what QEMU has left."""
    await finish([job for job in step.jobs if not _was_merged(job, context)], context)
    _sync(step)


async def unmerge(step: LiveMerge, context: Context) -> None:
    """Give back what a job had taken when QEMU died; none runs on in one that lives, or the merge would go forward.

    What was written stays: it shows the same, or is read only through what is above.
    """
    if context.qemu is None:
        moving.unmove(Move(tuple(move_job(job) for job in step.jobs)), context)
        return
    await _go_on_without(context.qemu)
