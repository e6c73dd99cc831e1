"""What merges have come to that QEMU's jobs did, by the files alone; and finishing those that it has left.

Whoever has QEMU's monitor, we or libvirt: nothing here asks it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress

from snaptree.errors import UnhealthyError
from snaptree.images import gate
from snaptree.images.facts import read_facts
from snaptree.images.measure import holds
from snaptree.images.mover.cost import foreseen
from snaptree.planning.live_steps import Cut, LiveJob
from snaptree.planning.steps import Move, MoveJob, Repoint
from snaptree.running import loops
from snaptree.running.carry import headers, moving
from snaptree.running.context import Context

READS = 50
"""So often the tables of an image are read anew that a guest writes to meanwhile."""


def move_job(job: LiveJob, *, by_qemu: str = "") -> MoveJob:
    """The same merge as one that is done with the machine off."""
    name = f"{job.way}-{job.disk}"
    return MoveJob(name, job.way, job.disk, job.row, job.below, job.bytes, job.zeroes, job.profile, by_qemu)


def moved_of(job: MoveJob, current: int, total: int) -> int:
    """How many of a job's bytes have moved when it has come so far, in its own units.

    A commit counts what it has to copy; a stream counts the guest's address range, which the job's profile turns into
    bytes.
    """
    if total <= 0:
        return 0
    part = min(1.0, current / total)
    if job.way == "commit" or not job.profile:
        return int(job.bytes * part)
    return job.profile[min(len(job.profile) - 1, int(part * (len(job.profile) - 1)))]


async def holds_all(job: LiveJob) -> bool:
    """Whether the target has on disk what was to be moved.

    The tables of a tip that the guest writes to may change while they are read; then they are read again.

    :raise UnhealthyError: they make no sense, however often they are read.
    """
    for _ in range(READS):
        with suppress(UnhealthyError):
            return holds(job.target, job.gone)
        await loops.rest(0.02)
    return holds(job.target, job.gone)


def header_says(job: LiveJob) -> bool:
    """Whether the header says that the merge is done. Where the guest has gone over there is none to say it."""
    if job.active:
        return True
    above, below = (job.row[-1], job.below[0] if job.below else None) if job.way == "pull" else (job.child, job.row[0])
    assert above is not None
    facts = read_facts(*above)
    if facts.backing is None or below is None:
        return facts.backing is None and below is None
    return gate.resolve_backing(above[0], facts.backing) == below[0] and facts.backing_format == below[1]


def has_written(cuts: Iterable[Cut]) -> bool:
    """Whether a guest of which nothing else is known has gone over to its overlays, so that it matters."""
    return any(os.path.exists(cut.overlay) and read_facts(cut.overlay, "qcow2").written for cut in cuts)


async def finish(left: Sequence[LiveJob], context: Context) -> None:
    """Do the merges with the machine off: by the mover, or what that cannot do by a storage daemon."""
    if left:
        moves = (move_job(job, by_qemu=foreseen(job.row, job.below).by_qemu) for job in left)
        await moving.move(Move(tuple(moves)), context)
    for job in left:
        if job.way == "pull":
            below = job.below[0] if job.below else (None, None)
            headers.repoint(Repoint(job.row[-1][0], *below), context)
        elif job.child is not None:
            headers.repoint(Repoint(job.child[0], *job.row[0]), context)
