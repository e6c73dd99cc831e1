"""Merges that QEMU's block jobs do, in a storage daemon that dies with us."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from snaptree.images import gate
from snaptree.images.mover.limiting import Limiter
from snaptree.images.qemu_img import Keys
from snaptree.planning.steps import MoveJob
from snaptree.qemu.daemon import StorageDaemon
from snaptree.qemu.jobs import Commit, JobProgress, Pull, run_jobs
from snaptree.running.carry.finishing import moved_of


async def merge(
    jobs: Sequence[MoveJob],
    tell: Callable[[str, int], None],
    cancelled: Callable[[], bool],
    limiter: Limiter,
    keys: Keys,
) -> int:
    """Have QEMU's jobs move the data of all of them at once; how many bytes that was.

    :param tell: is told of each job how many bytes it has moved so far.
    :param limiter: how many bytes a second may move in all; it may change.
    :param keys: the files with the keys of layers that are encrypted.
    """

    def report(state: dict[str, JobProgress]) -> None:
        for job in jobs:
            tell(job.name, bytes_moved(job, state.get(job.name)))

    async with StorageDaemon() as daemon:
        opened = [await _open(daemon, job, number, keys) for number, job in enumerate(jobs)]
        started = [_job(job, nodes) for job, nodes in zip(jobs, opened, strict=True)]
        ended = await run_jobs(daemon.qmp, started, progress=report, cancelled=cancelled, limiter=limiter)
        for job, nodes in zip(jobs, opened, strict=True):
            await daemon.settle(nodes[len(job.below) if job.way == "commit" else -1])
    # QEMU counts zeroes among what a commit has written.
    counted = {job.name: max(0, ended[job.name].current - job.zeroes) for job in jobs}
    return sum(counted[job.name] if job.way == "commit" else job.bytes for job in jobs)


async def _open(daemon: StorageDaemon, job: MoveJob, number: int, keys: Keys) -> list[dict[str, Any]]:
    """Open the job's chain, lowest first, with nodes of its own; what each was opened with."""
    nodes: list[dict[str, Any]] = []
    for place, (path, image_format) in enumerate([*reversed(job.below), *job.row]):
        below = nodes[-1]["node-name"] if nodes else None
        nodes.append(gate.blockdev(path, image_format, f"j{number}n{place}", below, locking=False))
        await daemon.add(nodes[-1], keys)
    return nodes


def _job(job: MoveJob, nodes: list[dict[str, Any]]) -> Commit | Pull:
    names = [node["node-name"] for node in nodes]
    if job.way == "commit":
        return Commit(job.name, names[-1], names[len(job.below)])
    return Pull(job.name, names[-1], names[len(job.below) - 1] if job.below else None)


def bytes_moved(job: MoveJob, state: JobProgress | None) -> int:
    """How many of the job's bytes have moved."""
    return moved_of(job, state.current, state.total) if state is not None else 0
