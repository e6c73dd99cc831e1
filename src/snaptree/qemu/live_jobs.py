"""Block jobs of a running machine: started or found again by name, brought so far that nothing is left, finalized.

A job outlives the snaptree that started it. Neither QEMU's graph nor a header is changed before it is finalized.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from msgspec import Struct

from snaptree.errors import CancelledError, OutrunError, ToolError
from snaptree.qemu.jobs import FLUSH_SECONDS, STALL_SECONDS, Job, JobProgress, Polls, Steering, query
from snaptree.qemu.session import QmpSession, explain

Reporter = Callable[[Mapping[str, JobProgress]], None]
CONVERGE_SECONDS = 60.0
"""So long an active commit may fail to come nearer to its end than it has been: the guest writes faster."""
PENDING_SECONDS = 10.0
"""So long the last of it may take, while the guest's requests wait more and more."""


class Merging(Struct, frozen=True):
    """One job, by the names of nodes. ``top`` and ``base`` are the ends of what is merged: a commit goes from ``top``
    down into ``base``, a pull brings all above ``base`` up into ``top``.

    ``root`` is the disk's uppermost node. ``backing`` is the name to write into the header of what then stands on
    ``base``.
    """

    id: str
    way: str
    root: str
    top: str
    base: str | None
    backing: str | None
    active: bool


async def living(qmp: QmpSession, names: Collection[str]) -> frozenset[str]:
    """Which of the jobs there are and have not ended; those that have are dismissed: they would hold their images."""
    found = await query(qmp, names)
    ended = {name for name, each in found.items() if each.progress.status == "concluded"}
    for name in ended:
        await qmp.execute("job-dismiss", id=name)
    return frozenset(found.keys() - ended)


async def pending(qmp: QmpSession, names: Collection[str]) -> list[str]:
    """Which of the jobs have done all and wait to be finalized."""
    return [name for name, each in (await query(qmp, names)).items() if each.progress.status == "pending"]


async def begin(qmp: QmpSession, job: Merging, speed: int) -> None:
    """Start the job.

    :raise ToolError: QEMU refuses.
    """
    qmp.failed.pop(job.id, None)
    # A pull that has ended must not stay: see :meth:`RunningQemu.graph`.
    common: dict[str, Any] = {
        "job_id": job.id,
        "speed": speed,
        "auto_dismiss": job.way == "pull",
        "auto_finalize": False,
    }
    if job.backing is not None and not job.active:
        common["backing_file"] = job.backing
    if job.way == "commit":
        await qmp.execute("block-commit", device=job.root, top_node=job.top, base_node=job.base, **common)
        return
    if job.base is not None:
        common["base_node"] = job.base
    await qmp.execute("block-stream", device=job.top, **common)


async def follow(
    qmp: QmpSession,
    jobs: Sequence[Merging],
    progress: Reporter,
    cancelled: threading.Event,
    steering: Steering,
) -> None:
    """Wait until all jobs have copied all: those that let the guest go over are ready, the others pending or ended.

    :raise CancelledError: ``cancelled`` said so.
    :raise NoSpaceError: a job ran out of room.
    :raise ToolError: a job failed or stands still.
    :raise OutrunError: a job does not come to its end because the guest writes too fast.
    """
    names = {job.id: job for job in jobs}
    polls = Polls()
    seen: dict[str, JobProgress] = {}
    since = nearer = time.monotonic()
    nearest: dict[str, int] = {}
    while True:
        if cancelled.is_set():
            raise CancelledError("stopped while data was being moved")
        found = await query(qmp, names)
        _require_sound(qmp, found, names)
        progress({name: each.progress for name, each in found.items()})
        held = await steering.apply(found)
        if not held and all(_has_all(names[name], each) for name, each in found.items()):
            return
        now = {name: each.progress for name, each in found.items()}
        if held:
            since = nearer = time.monotonic()
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > STALL_SECONDS:
            hint = "look at the kernel's log for the device"
            raise ToolError(f"{qmp.name} made no progress for {STALL_SECONDS:.0f} s", hint)
        for name, each in now.items():
            left = each.total - each.current
            if left < nearest.get(name, left + 1):
                nearest[name], nearer = left, time.monotonic()
        if any(job.active for job in jobs) and time.monotonic() - nearer > CONVERGE_SECONDS:
            raise OutrunError(
                f"the guest writes faster than its disk is committed: no nearer for {CONVERGE_SECONDS:.0f} s",
                "use --merge pull, or 'snaptree gc' when it is quiet or off",
            )
        await polls.wait(now.values())


def _require_sound(qmp: QmpSession, found: Mapping[str, Job], names: Collection[str]) -> None:
    gone = set(names) - set(found)
    for name in sorted(gone & qmp.failed.keys()):
        raise explain(f"the {name} job failed", qmp.failed[name])
    if gone:
        raise ToolError(f"QEMU does not know the {min(gone)} job any more, which had not come to its end")
    for name, each in found.items():
        if each.error is not None:
            raise explain(f"the {name} job failed", each.error)


def _has_all(job: Merging, found: Job) -> bool:
    return found.progress.status in (("ready", "pending", "concluded") if job.active else ("pending", "concluded"))


async def settle(qmp: QmpSession, job: Merging) -> None:
    """Finalize a pending job, and wait until it has ended.

    :raise ToolError: it failed in the end, or does not end.
    """
    deadline = time.monotonic() + FLUSH_SECONDS
    asked = False
    while True:
        found = await query(qmp, [job.id])
        if asked and not found and job.way == "pull" and job.id not in qmp.failed:
            return
        _require_sound(qmp, found, [job.id])
        status = found[job.id].progress.status
        if status == "concluded":
            await qmp.execute("job-dismiss", id=job.id)
            return
        if status == "pending" and not asked:
            await qmp.execute("job-finalize", id=job.id, seconds=FLUSH_SECONDS)
            asked = True
        elif time.monotonic() > deadline:
            raise ToolError(f"the {job.id} job does not end")
        await asyncio.sleep(0.001)


async def stop_the_guest(qmp: QmpSession, job: Merging) -> bool:
    """Bring an active commit from ready to pending: both files are the same, and the guest's requests wait.

    :return: whether it is so; without it the commit has ended already.
    :raise OutrunError: it does not get there in time.
    :raise ToolError: somebody has cancelled it: one that is ready would end, and the guest stay where it was.
    """
    deadline = time.monotonic() + PENDING_SECONDS
    asked = False
    while True:
        found = await query(qmp, [job.id])
        _require_sound(qmp, found, [job.id])
        status = found[job.id].progress.status
        if status in ("waiting", "pending") and not asked:
            raise ToolError(f"somebody has cancelled the {job.id} job", "try it again")
        if status in ("pending", "concluded"):
            return status == "pending"
        if status == "ready" and not asked:
            await qmp.execute("job-complete", id=job.id)
            asked = True
        if time.monotonic() > deadline:
            raise OutrunError(
                f"the guest writes too fast for its disk to go over within {PENDING_SECONDS:.0f} s",
                "use --merge pull, or 'snaptree gc' when it is quiet or off",
            )
        await asyncio.sleep(0.001)
