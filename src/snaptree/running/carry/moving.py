"""Steps that move data and change sizes: done by the mover, or by QEMU's block layer."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import partial

from snaptree.errors import ToolError, UnhealthyError
from snaptree.images import durable, gate, qemu_img
from snaptree.images.facts import read_facts
from snaptree.images.holes import cut_tail, punch_free
from snaptree.images.measure import hidden_ranges, holds
from snaptree.images.mover.copying import Watch
from snaptree.images.mover.merging import Merge, merge
from snaptree.images.qemu_img import Keys
from snaptree.images.tail import range_past, zero_tail
from snaptree.images.workers import run_together
from snaptree.planning.steps import BuildMerged, Cover, Move, MoveJob, Shrink, Step
from snaptree.running.carry.internals import mend, require
from snaptree.running.context import Context
from snaptree.running.loops import within


def cover(step: Cover, context: Context) -> None:
    """Write zeroes into the top wherever it shows zeroes only because a layer beneath it ends there.

    QEMU's jobs forget that once the layer is out of the chain. What the top shows stays the same at every moment.
    """
    ranges = hidden_ranges(step.row)
    if ranges:
        with context.holding.lent([path for path, _ in (*step.row, *step.below)]):
            qemu_img.write_zeroes(
                gate.graph([*reversed(step.row), *step.below], read_only=False, locking=False), ranges, context.keys
            )
        durable.sync_file(step.row[-1][0])
        path = step.row[-1][0]
        require(not hidden_ranges(step.row), "has not the zeroes that were written", path)


def shrink(step: Shrink, context: Context) -> None:
    """Cut a layer, with nothing left past its end that could show when it grows."""
    qcow2 = step.format == "qcow2"
    with context.holding.lent([step.path, *(path for path, _ in step.below)]):
        if context.recovering and qcow2:
            mend(step.path, context.keys)
        facts = read_facts(step.path, step.format)
        if facts.virtual_size != step.size:
            graph = gate.graph([(step.path, step.format), *step.below], read_only=False, locking=False)
            if facts.encrypted and (past := range_past(step.path, step.size)):
                # Only QEMU can write there what it will take for zeroes.
                qemu_img.write_zeroes(graph, past, context.keys)
            qemu_img.resize(graph, step.size, shrink=True, keys=context.keys)
            size = read_facts(step.path, step.format).virtual_size
            require(size == step.size, f"has {size} bytes, not {step.size}", step.path)
    if qcow2 and not facts.encrypted:
        zero_tail(step.path)
    durable.sync_file(step.path)


async def move(step: Move, context: Context) -> None:
    """Move the data of all jobs at once: by the mover, and what it cannot do by a storage daemon that dies with us."""
    for job in step.jobs:
        require_counted(*target_of(job), context.keys)
    tally = Tally(context, sum(job.bytes for job in step.jobs))
    own = [job for job in step.jobs if not job.by_qemu]
    theirs = [job for job in step.jobs if job.by_qemu]
    run_together((partial(_move_own, job, tally) for job in own), len(own) - 1)
    context.journal.moved += tally.copied
    if theirs:
        context.journal.moved += await _by_qemu(theirs, context, tally)
    for job in step.jobs:
        path, image_format = target_of(job)
        if image_format == "qcow2":
            punch_free(path)
    note_sources(step, context)
    context.moved(tally.total, tally.total)


class Tally:
    """What the jobs of a step have moved together, told as it grows, by whichever thread."""

    def __init__(self, context: Context, total: int) -> None:
        self.context = context
        self.total = total
        self.copied = 0
        self._moved: dict[str, int] = {}
        self._lock = threading.Lock()
        self._failed = threading.Event()

    def count(self, copied: int) -> None:
        """A job has ended, and so many bytes were copied for it."""
        with self._lock:
            self.copied += copied

    def fail(self) -> None:
        """One of the jobs has failed: the others stop."""
        self._failed.set()

    def stopped(self) -> bool:
        """Whether the jobs are to stop."""
        return self._failed.is_set() or self.context.cancelled.is_set()

    def tell(self, job: str, moved: int) -> None:
        """A job has moved so many bytes in all."""
        with self._lock:
            self._moved[job] = moved
            self.context.moved(sum(self._moved.values()), self.total)

    def watch(self, job: str) -> Watch:
        """What the mover tells of one job."""

        def moved(count: int) -> None:
            with self._lock:
                self._moved[job] = self._moved.get(job, 0) + count
                self.context.moved(sum(self._moved.values()), self.total)

        return Watch(moved, self.stopped, self.context.limiter)


def _move_own(job: MoveJob, tally: Tally) -> None:
    """Have the mover do one job; when it fails the others stop."""
    into = 0 if job.way == "commit" else len(job.row) - 1
    try:
        tally.count(merge(Merge(job.row, job.below, into), tally.watch(job.name)))
    except BaseException:
        tally.fail()
        raise


async def _by_qemu(jobs: Sequence[MoveJob], context: Context, tally: Tally) -> int:
    """Have QEMU's jobs move the data; how many bytes that was."""
    from snaptree.running.carry import by_qemu

    with context.holding.lent([path for job in jobs for path, _ in (*job.row, *job.below)]):
        copied = await within(by_qemu.merge(jobs, tally.tell, tally.stopped, context.limiter, context.keys))
        for job in jobs:
            durable.sync_file(target_of(job)[0])
    for job in jobs:
        _require_moved(job)
    return copied


def require_counted(path: str, image_format: str, keys: Keys) -> None:
    """Put reference counts right that are late (lazy refcounts, and the writer was killed), or refuse to write.

    QEMU does so itself where it opens an image for writing, but not where it goes over from reading to writing, as for
    a job: it would take clusters for free that are in use.

    :raise UnhealthyError: they cannot be put right without losing something.
    """
    if image_format != "qcow2" or not read_facts(path, image_format).dirty:
        return
    mend(path, keys)
    if read_facts(path, image_format).dirty:
        raise UnhealthyError(f"{path} was not closed cleanly", f"run 'qemu-img check -r all {path}' on a copy first")


def _require_moved(job: MoveJob) -> None:
    """See that what was to move is there: its source goes next."""
    target = target_of(job)
    if not holds(target, job.row[1:] if job.way == "commit" else job.row[:-1]):
        raise ToolError(
            f"qemu-storage-daemon reported success, but {target[0]} has not all that was to be moved",
            "is it QEMU's program of that name?",
        )


def sources(step: Step) -> list[tuple[str, str]]:
    """What the tops look like whose data goes down, to find out after a crash whether they were written to since."""
    rows = [job.row for job in step.jobs if job.way == "commit"] if isinstance(step, Move) else []
    if isinstance(step, BuildMerged) and step.into == 0:
        rows.append(step.row)
    found: list[tuple[str, str]] = []
    for row in rows:
        path, image_format = row[-1]
        looks = read_facts(path, image_format).identity
        found.append((path, "" if looks is None else f"{looks.inode} {looks.size} {looks.mtime_ns} {looks.header}"))
    return found


def note_sources(step: Step, context: Context) -> None:
    """Keep what the tops look like now."""
    for path, looks in sources(step):
        context.journal.keep(path, looks)


def target_of(job: MoveJob) -> tuple[str, str]:
    """The file that takes the data."""
    return job.row[0] if job.way == "commit" else job.row[-1]


def unmove(step: Move, context: Context) -> None:
    """Put right the reference counts that a job which was stopped has left between, and give back what it had taken.

    What was written stays: a pull's copies show the same as what they were copied from, and a layer that a commit has
    written to is marked and read only through the upper one.
    """
    for job in step.jobs:
        path, image_format = target_of(job)
        if image_format == "qcow2" and os.path.exists(path):
            with context.holding.lent([path]):
                counted = mend(path, context.keys)
            if counted:
                cut_tail(path)
