"""Block jobs: started together, followed to their end, cancelled together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from snaptree.errors import CancelledError, ToolError
from snaptree.qemu.session import QmpSession, explain

FIRST_POLL, LAST_POLL = 0.005, 0.1


@dataclass(frozen=True, slots=True)
class Commit:
    """An active commit of ``top`` and all between into ``base`` (node names)."""

    id: str
    top: str
    base: str


@dataclass(frozen=True, slots=True)
class Pull:
    """A stream of all between ``top`` and ``base`` into ``top`` (node names); ``base`` is ``None`` to pull everything.

    Only the data moves: the header of ``top`` names the same backing file afterwards. QEMU would change it when the job
    is finalized, before it has written the tables that say what was copied; killed between, the image has neither.
    """

    id: str
    top: str
    base: str | None


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job has come, in QEMU's own units."""

    current: int
    total: int
    status: str


async def run_jobs(
    qmp: QmpSession,
    jobs: Sequence[Commit | Pull],
    *,
    progress: Callable[[dict[str, JobProgress]], None] = lambda state: None,
    cancelled: threading.Event | None = None,
    speed: int = 0,
) -> dict[str, JobProgress]:
    """Start all jobs, follow them to their end, and dismiss them. How far each had come at its end.

    When one fails, or on ``cancelled``, the others are cancelled: what they have written keeps every chain right.

    :param speed: bytes a second for each job; 0 for no limit.
    :raise CancelledError: ``cancelled`` said so.
    :raise NoSpaceError: a job ran out of room.
    :raise ToolError: a job failed, or QEMU went away.
    """
    started: list[str] = []
    try:
        for job in jobs:
            await _start(qmp, job, speed)
            started.append(job.id)
        return await _follow(qmp, {job.id: job for job in jobs}, progress, cancelled)
    except BaseException:
        await _abandon(qmp, started)
        raise


async def _start(qmp: QmpSession, job: Commit | Pull, speed: int) -> None:
    common: dict[str, Any] = {"job_id": job.id, "device": job.top, "speed": speed, "auto_dismiss": False}
    if isinstance(job, Commit):
        await qmp.execute("block-commit", base_node=job.base, top_node=job.top, **common)
        return
    if job.base is not None:
        common["base_node"] = job.base
    await qmp.execute("block-stream", auto_finalize=False, **common)


async def _follow(
    qmp: QmpSession,
    jobs: dict[str, Commit | Pull],
    progress: Callable[[dict[str, JobProgress]], None],
    cancelled: threading.Event | None,
) -> dict[str, JobProgress]:
    ended: dict[str, JobProgress] = {}
    pause = FIRST_POLL
    completing: set[str] = set()
    while len(ended) < len(jobs):
        if cancelled is not None and cancelled.is_set():
            raise CancelledError("stopped while data was being moved")
        now: dict[str, JobProgress] = {}
        for info in await qmp.execute("query-jobs"):
            name, status = info["id"], info["status"]
            if name not in jobs or name in ended:
                continue
            now[name] = JobProgress(info["current-progress"], info["total-progress"], status)
            if status == "concluded":
                if "error" in info and not (isinstance(jobs[name], Pull) and name in completing):
                    raise explain(f"the {name} job failed", info["error"])
                ended[name] = now[name]
                await qmp.execute("job-dismiss", id=name)
        progress({**now, **ended})
        waiting = [name for name, each in now.items() if each.status in ("ready", "pending") and name not in completing]
        # All disks come to their end together: none completes while another may still fail.
        if waiting and all(each.status in ("ready", "pending", "concluded") for each in now.values()):
            for name in waiting:
                # A pull has copied all by now; cancelled, it leaves the header alone.
                await qmp.execute("job-cancel" if isinstance(jobs[name], Pull) else "job-complete", id=name)
                completing.add(name)
            pause = FIRST_POLL
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, LAST_POLL)
    return ended


async def _abandon(qmp: QmpSession, names: Sequence[str]) -> None:
    """Cancel what still runs and wait until it has stopped writing; a peer that went away has stopped too."""
    try:
        for _ in range(600):
            infos = [info for info in await qmp.execute("query-jobs") if info["id"] in names]
            if not infos:
                return
            for info in infos:
                if info["status"] == "concluded":
                    await qmp.execute("job-dismiss", id=info["id"])
                elif info["status"] not in ("aborting", "null"):
                    await _try_cancel(qmp, info["id"])
            await asyncio.sleep(0.02)
    except ToolError:
        return


async def _try_cancel(qmp: QmpSession, name: str) -> None:
    try:
        await qmp.execute("block-job-cancel", device=name, force=True)
    except ToolError:
        return
