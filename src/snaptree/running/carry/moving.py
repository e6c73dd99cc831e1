"""Steps that move data and change sizes, done by QEMU's block layer."""

from __future__ import annotations

import os

from snaptree.images import durable, gate, qemu_img
from snaptree.images.facts import read_facts
from snaptree.images.holes import punch_free
from snaptree.images.measure import hidden_ranges
from snaptree.images.tail import zero_tail
from snaptree.planning.steps import Cover, Move, MoveJob, Repoint, Shrink, Step
from snaptree.qemu.daemon import StorageDaemon
from snaptree.qemu.jobs import Commit, JobProgress, Pull, run_jobs
from snaptree.running.carry.headers import repoint
from snaptree.running.carry.internals import mend
from snaptree.running.context import Context


def cover(step: Cover, context: Context) -> None:
    """Write zeroes into the top wherever it shows zeroes only because a layer beneath it ends there.

    QEMU's jobs forget that once the layer is out of the chain. What the top shows stays the same at every moment.
    """
    ranges = hidden_ranges(step.row)
    if ranges:
        with context.holding.lent([path for path, _ in (*step.row, *step.below)]):
            qemu_img.write_zeroes(
                gate.graph([*reversed(step.row), *step.below], read_only=False, locking=False), ranges
            )
        durable.sync_file(step.row[-1][0])


def shrink(step: Shrink, context: Context) -> None:
    """Cut a layer, with nothing left past its end that could show when it grows."""
    qcow2 = step.format == "qcow2"
    with context.holding.lent([step.path, *(path for path, _ in step.below)]):
        if context.recovering and qcow2:
            mend(step.path)
        if read_facts(step.path, step.format).virtual_size != step.size:
            graph = gate.graph([(step.path, step.format), *step.below], read_only=False, locking=False)
            qemu_img.resize(graph, step.size, shrink=True)
    if qcow2:
        zero_tail(step.path)
    durable.sync_file(step.path)


async def move(step: Move, context: Context) -> None:
    """Move the data of all jobs at once, by a storage daemon that dies with us."""
    files = [path for job in step.jobs for path, _ in (*job.row, *job.below)]
    total = sum(job.bytes for job in step.jobs)

    def report(state: dict[str, JobProgress]) -> None:
        context.moved(sum(bytes_moved(job, state.get(job.name)) for job in step.jobs), total)

    with context.holding.lent(files):
        async with StorageDaemon() as daemon:
            jobs = [await _open(daemon, job, number) for number, job in enumerate(step.jobs)]
            ended = await run_jobs(daemon.qmp, jobs, progress=report, cancelled=context.cancelled)
        for job in step.jobs:
            durable.sync_file(target_of(job)[0])
    for job in step.jobs:
        path, image_format = target_of(job)
        if image_format == "qcow2":
            punch_free(path)
    for path, looks in sources(step):
        context.journal.note(path, looks)
    for job in step.jobs:
        # QEMU counts zeroes among what a commit has written.
        context.journal.moved += max(0, ended[job.name].current - job.zeroes) if job.way == "commit" else job.bytes
    context.moved(total, total)


async def _open(daemon: StorageDaemon, job: MoveJob, number: int) -> Commit | Pull:
    """Open the job's chain, lowest first, with nodes of its own."""
    chain = [*reversed(job.below), *job.row]
    below: str | None = None
    nodes: list[str] = []
    for place, (path, image_format) in enumerate(chain):
        node = f"j{number}n{place}"
        await daemon.add(gate.blockdev(path, image_format, node, below, locking=False))
        nodes.append(node)
        below = node
    lowest = nodes[len(job.below)]
    if job.way == "commit":
        return Commit(job.name, nodes[-1], lowest)
    base = nodes[len(job.below) - 1] if job.below else None
    name = gate.relative_backing_name(job.row[-1][0], job.below[0][0]) if job.below else None
    return Pull(job.name, nodes[-1], base, name)


def bytes_moved(job: MoveJob, state: JobProgress | None) -> int:
    """How many of the job's bytes have moved.

    A commit counts what it has to copy; a stream counts the guest's address range, which the job's profile turns into
    bytes.
    """
    if state is None or state.total <= 0:
        return 0
    part = min(1.0, state.current / state.total)
    if job.way == "commit" or not job.profile:
        return int(job.bytes * part)
    return job.profile[min(len(job.profile) - 1, int(part * (len(job.profile) - 1)))]


def sources(step: Step) -> list[tuple[str, str]]:
    """What the tops look like whose data goes down, to find out after a crash whether they were written to since."""
    found: list[tuple[str, str]] = []
    for job in step.jobs if isinstance(step, Move) else ():
        if job.way == "commit":
            path = job.row[-1][0]
            looks = read_facts(path, job.row[-1][1]).identity
            found.append((path, "" if looks is None else f"{looks.inode} {looks.size} {looks.mtime_ns} {looks.header}"))
    return found


def target_of(job: MoveJob) -> tuple[str, str]:
    """The file that takes the data."""
    return job.row[0] if job.way == "commit" else job.row[-1]


def unmove(step: Move, context: Context) -> None:
    """Take back what can be: a pull that has come to its end points at its old backing file again.

    What a commit has written stays: the lower layer is marked and is read only through the upper one.
    """
    for job in step.jobs:
        path, image_format = target_of(job)
        if image_format == "qcow2" and os.path.exists(path):
            with context.holding.lent([path]):
                mend(path)
        if job.way == "pull" and os.path.exists(path):
            below = job.row[-2]
            repoint(Repoint(path, below[0], below[1]), context)
