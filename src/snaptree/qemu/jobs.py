"""Block jobs: started together, followed to their end, cancelled together."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from msgspec import Struct

from snaptree.errors import CancelledError, SnaptreeError, ToolError
from snaptree.images.mover.limiting import Limiter
from snaptree.qemu.session import QmpSession, explain, sense

PREFIX = "snaptree-"
"""What the names of our jobs begin with."""
FIRST_POLL, LAST_POLL = 0.005, 0.1
STALL_SECONDS = 300.0
"""So long the jobs may make no progress at all."""
FLUSH_SECONDS = 1800.0
"""So long an image may take to bring to disk all that was copied."""
ABANDON_SECONDS = 30.0
"""So long jobs may take to stop when they are cancelled."""
# JobStatus in QEMU's qapi/job.json.
_STATUSES = frozenset(
    (
        "undefined",
        "created",
        "running",
        "paused",
        "ready",
        "standby",
        "waiting",
        "pending",
        "aborting",
        "concluded",
        "null",
    )
)


_STEERED = ("running", "ready", "paused", "standby")
"""In these a job takes orders; in others it has copied all, or has not begun."""
_STILL = ("paused", "standby", "waiting", "pending", "aborting", "concluded", "null")
"""In these it copies nothing."""
_DRAINING = ("mirror", "commit")
"""Jobs whose disk nobody writes to while they wait to be finalized."""


class Commit(Struct, frozen=True):
    """An active commit of ``top`` and all between into ``base`` (node names)."""

    id: str
    top: str
    base: str


class Pull(Struct, frozen=True):
    """A stream of all between ``top`` and ``base`` into ``top`` (node names); ``base`` is ``None`` to pull everything.

    Only the data moves: the header of ``top`` names the same backing file afterwards. QEMU would change it when the job
    is finalized, before it has written the tables that say what was copied; killed between, the image has neither.
    """

    id: str
    top: str
    base: str | None


class JobProgress(Struct, frozen=True):
    """How far a job has come, in QEMU's own units."""

    current: int
    total: int
    status: str


async def run_jobs(
    qmp: QmpSession,
    jobs: Sequence[Commit | Pull],
    *,
    progress: Callable[[dict[str, JobProgress]], None] = lambda state: None,
    cancelled: Callable[[], bool] = lambda: False,
    limiter: Limiter | None = None,
) -> dict[str, JobProgress]:
    """Start all jobs, follow them to their end, and dismiss them. How far each had come at its end.

    When one fails, or on ``cancelled``, the others are cancelled: what they have written keeps every chain right.

    :param limiter: how fast they may be all together, and whether they may move anything; it is followed as it changes.
    :raise CancelledError: ``cancelled`` said so.
    :raise NoSpaceError: a job ran out of room.
    :raise ToolError: a job failed or stood still, or QEMU went away or talks nonsense.
    """
    steering = Steering(qmp, limiter or Limiter(), len(jobs))
    try:
        for job in jobs:
            await _start(qmp, job, steering.first_speed)
        return await _follow(qmp, {job.id: job for job in jobs}, progress, cancelled, steering)
    except BaseException:
        # Also one whose start was not answered: it may run all the same.
        await abandon(qmp, [job.id for job in jobs])
        raise
    finally:
        steering.end()


async def _start(qmp: QmpSession, job: Commit | Pull, speed: int) -> None:
    common: dict[str, Any] = {"job_id": job.id, "device": job.top, "speed": speed, "auto_dismiss": False}
    if isinstance(job, Commit):
        await qmp.execute("block-commit", base_node=job.base, top_node=job.top, **common)
        return
    if job.base is not None:
        common["base_node"] = job.base
    await qmp.execute("block-stream", auto_finalize=False, **common)


class Job(Struct, frozen=True):
    """A job as QEMU tells of it; ``error`` is what it failed with."""

    id: str
    progress: JobProgress
    error: str | None


async def query(qmp: QmpSession, names: Collection[str], *, seconds: float | None = None) -> dict[str, Job]:
    """Those of our jobs that there are.

    :raise ToolError: the answer is not one.
    """
    answer = await qmp.execute("query-jobs", seconds=seconds)
    with sense(qmp.name, "jobs", answer):
        found = [_job_of(each) for each in answer if each["id"] in names]
        return {each.id: each for each in found}


def _job_of(info: dict[str, Any]) -> Job:
    status, current, total = info["status"], info["current-progress"], info["total-progress"]
    if status not in _STATUSES or not all(isinstance(each, int) for each in (current, total)):
        raise ValueError
    if not (0 <= current < 1 << 64 and 0 <= total < 1 << 64):
        raise ValueError
    error = str(info["error"]) if "error" in info else None
    return Job(info["id"], JobProgress(current, total, status), error)


async def _follow(
    qmp: QmpSession,
    jobs: dict[str, Commit | Pull],
    progress: Callable[[dict[str, JobProgress]], None],
    cancelled: Callable[[], bool],
    steering: Steering,
) -> dict[str, JobProgress]:
    ended: dict[str, JobProgress] = {}
    polls = Polls()
    completing: set[str] = set()
    seen: dict[str, JobProgress] = {}
    since = time.monotonic()
    while len(ended) < len(jobs):
        if cancelled():
            raise CancelledError("stopped while data was being moved")
        found = await query(qmp, jobs.keys() - ended.keys())
        gone = jobs.keys() - ended.keys() - found.keys()
        if gone:
            raise ToolError(f"{qmp.name} does not know the {min(gone)} job any more, which had not come to its end")
        now = {name: each.progress for name, each in found.items()}
        for name, each in found.items():
            if each.progress.status == "concluded":
                if each.error is not None and not (isinstance(jobs[name], Pull) and name in completing):
                    raise explain(f"the {name} job failed", each.error)
                ended[name] = each.progress
                await qmp.execute("job-dismiss", id=name)
        held = await steering.apply(found)
        if now != seen or held:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > STALL_SECONDS:
            raise ToolError(
                f"{qmp.name} made no progress for {STALL_SECONDS:.0f} s", "look at the kernel's log for the device"
            )
        progress({**now, **ended})
        waiting = [name for name, each in now.items() if each.status in ("ready", "pending") and name not in completing]
        # All disks come to their end together: none completes while another may still fail.
        if waiting and not held and all(each.status in ("ready", "pending", "concluded") for each in now.values()):
            for name in waiting:
                # A pull has copied all by now; cancelled, it leaves the header alone.
                command = "job-cancel" if isinstance(jobs[name], Pull) else "job-complete"
                await qmp.execute(command, id=name, seconds=FLUSH_SECONDS)
                completing.add(name)
            polls = Polls()
        await polls.wait(now.values())
    return ended


class Polls:
    """How long to wait until jobs are asked for again: longer each time, but hardly past the end that they come to."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._pause = FIRST_POLL

    async def wait(self, found: Iterable[JobProgress]) -> None:
        """Wait a while.

        :param found: how far the jobs are.
        """
        passed = time.monotonic() - self._began
        left = max((_left(each, passed) for each in found), default=0.0)
        await asyncio.sleep(max(FIRST_POLL, min(self._pause, left / 2)))
        self._pause = min(self._pause * 1.5, LAST_POLL)


def _left(job: JobProgress, passed: float) -> float:
    """How many seconds a job may still need, if it goes on as it has."""
    if job.current >= job.total:
        return 0.0
    return passed * (job.total - job.current) / job.current if job.current > 0 else math.inf


class Steering:
    """Has QEMU's jobs do what the limiter says, as it changes.

    :param count: how many jobs share what may move.
    """

    def __init__(self, qmp: QmpSession, limiter: Limiter, count: int) -> None:
        self._qmp, self._limiter, self._count = qmp, limiter, count
        self._told: dict[str, int] = {}
        self._paused: set[str] = set()
        self._resting = False
        self.first_speed = self.speed
        """What jobs are to be started with."""

    @property
    def speed(self) -> int:
        """Bytes a second for each job as it is now; 0 for no limit."""
        return max(1, int(self._limiter.speed / self._count)) if self._limiter.speed > 0 else 0

    def found_running(self, names: Collection[str]) -> None:
        """Jobs that were left by somebody else: at another speed, perhaps, and paused."""
        self._told.update(dict.fromkeys(names, -1))
        self._paused.update(names)

    async def apply(self, found: Mapping[str, Job]) -> bool:
        """Tell QEMU what has changed; whether the jobs are to move nothing.

        A job that has copied all takes no more orders, and needs none.
        """
        held, speed = self._limiter.held, self.speed
        for name, each in found.items():
            if each.progress.status not in _STEERED:
                continue
            if self._told.get(name, self.first_speed) != speed:
                await self._try("block-job-set-speed", device=name, speed=speed)
                self._told[name] = speed
            if held != (name in self._paused):
                await self._try("job-pause" if held else "job-resume", id=name)
                (self._paused.add if held else self._paused.discard)(name)
        self._rest(resting=held and all(each.progress.status in _STILL for each in found.values()))
        return held

    async def _try(self, command: str, **arguments: Any) -> None:
        """A job may come to its end just then; whether it has the next look tells."""
        with suppress(SnaptreeError):
            await self._qmp.execute(command, **arguments)

    def _rest(self, *, resting: bool) -> None:
        if resting != self._resting:
            self._resting = resting
            (self._limiter.begin_rest if resting else self._limiter.end_rest)()

    def end(self) -> None:
        """The jobs are over."""
        self._rest(resting=False)


async def standing(qmp: QmpSession) -> list[str]:
    """The jobs of somebody's that keep their disk's requests waiting: they have copied all, and let nobody write until
    they are finalized.

    :raise ToolError: the answer is not one.
    """
    answer = await qmp.execute("query-jobs")
    with sense(qmp.name, "jobs", answer):
        known = [(str(each["id"]), each["type"], each["status"]) for each in answer]
    theirs = (each for each in known if not each[0].startswith(PREFIX))
    return [name for name, kind, status in theirs if kind in _DRAINING and status in ("waiting", "pending")]


async def dismiss_streams(qmp: QmpSession) -> None:
    """Dismiss our streams that have ended: while there is one, QEMU must not be asked for its nodes.

    :raise ToolError: there is one of somebody else's.
    """
    answer = await qmp.execute("query-jobs")
    with sense(qmp.name, "jobs", answer):
        ended = [str(each["id"]) for each in answer if (each["type"], each["status"]) == ("stream", "concluded")]
    for name in ended:
        if not name.startswith(PREFIX):
            hint = f"tell its monitor: job-dismiss, with id {name!r}"
            raise ToolError(f"{qmp.name} has a finished block-stream job, {name}, that nobody has dismissed", hint)
        await qmp.execute("job-dismiss", id=name)


async def abandon(qmp: QmpSession, names: Sequence[str]) -> bool:
    """Cancel what still runs and wait until it has stopped writing; a peer that went away has stopped too.

    :return: whether it is known to have stopped.
    """
    deadline = time.monotonic() + ABANDON_SECONDS
    try:
        while (left := deadline - time.monotonic()) > 0:
            found = await query(qmp, names, seconds=left)
            if not found:
                return True
            for name, each in found.items():
                if each.progress.status == "concluded":
                    await qmp.execute("job-dismiss", id=name, seconds=left)
                elif each.progress.status not in ("aborting", "null"):
                    await _try_cancel(qmp, name, left)
            await asyncio.sleep(0.02)
    except SnaptreeError:
        pass
    return False


async def _try_cancel(qmp: QmpSession, name: str, seconds: float) -> None:
    with suppress(SnaptreeError):
        await qmp.execute("block-job-cancel", device=name, force=True, seconds=seconds)
