"""Internal snapshots in images that the QEMU of a running machine has open: it makes and deletes them itself."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from snaptree.errors import BusyError, SnaptreeError, ToolError
from snaptree.images.holes import punch_free
from snaptree.planning.live_steps import LiveOpen, Mark
from snaptree.planning.steps import DeleteInternal, MakeInternal
from snaptree.qemu import live_jobs
from snaptree.qemu.graph import BlockGraph, Node
from snaptree.qemu.jobs import PREFIX, query
from snaptree.qemu.running import RunningQemu
from snaptree.qemu.session import explain
from snaptree.running.carry import internals
from snaptree.running.carry.nodes import inode_at, node_of
from snaptree.running.carry.standing import go_on
from snaptree.running.context import Context

OPENED = "opened"
"""What a step notes of a layer before it has QEMU open it for writing."""
DELETE_SECONDS = 1800.0
"""So long a deletion may take: it counts every cluster of the image anew."""


def action(graph: BlockGraph, mark: Mark) -> dict[str, Any]:
    """What takes the internal snapshot within a transaction: QEMU wants the uppermost node of the disk."""
    root = graph.root_of(node_of(graph, mark.path))
    return {"type": "blockdev-snapshot-internal-sync", "data": {"device": root.name, "name": mark.tag}}


def is_marked(graph: BlockGraph, mark: Mark) -> bool:
    """Whether QEMU has the internal snapshot in an image that it has open."""
    opened = graph.opened(inode_at(mark.path)) if os.path.exists(mark.path) else ()
    return any(mark.tag in each.internals for each in opened)


async def unmark(marks: Iterable[Mark], context: Context) -> None:
    """Take internal snapshots back; whether they were taken, half taken or not at all."""
    for mark in marks:
        node = await _open_node(mark.path, context)
        if node is None:
            internals.unmake(MakeInternal(mark.path, mark.tag), context)
        elif mark.tag in node.internals:
            assert context.qemu is not None
            await _delete(context.qemu, mark.path, mark.tag, context)


async def _open_node(path: str, context: Context) -> Node | None:
    """The image's node in the machine's QEMU; ``None`` when that has it not open, or does not run."""
    if context.qemu is None or not os.path.exists(path):
        return None
    graph = await context.qemu.graph()
    return node_of(graph, path) if inode_at(path) in graph.files() else None


# ---- writing to what is only read ---------------------------------------------------------------------------------


async def open_to_write(step: LiveOpen, context: Context) -> None:
    """Have QEMU open the layers for writing.

    :raise ToolError: it cannot: it may not, or somebody else reads one of them.
    """
    qemu = context.qemu
    if qemu is None:
        return
    if "snapshot-delete" not in await qemu.commands():
        hint = "stop the machine first, or run it with QEMU 6.0 or newer"
        raise ToolError(f"{qemu.qmp.name} does not know snapshot-delete", hint)
    for path in step.paths:
        await _open(qemu, path, context)


async def _open(qemu: RunningQemu, path: str, context: Context) -> None:
    node = await _open_node(path, context)
    if node is not None and node.read_only:
        context.journal.note(_about(path), OPENED)
        try:
            await qemu.reopen(node, writing=True)
        except ToolError as error:
            hint = "may QEMU write to it, and does nobody else have it open?"
            raise ToolError(f"{path} cannot be opened for writing: {error.message}", hint) from error


async def open_to_read(paths: Iterable[str], context: Context) -> None:
    """Have QEMU open again for reading only what we have had it open for writing."""
    for path in paths:
        node = await _open_node(path, context)
        if node is None or node.read_only or context.journal.recall(_about(path)) != OPENED:
            continue
        assert context.qemu is not None
        await context.qemu.reopen(node, writing=False)


def _about(path: str) -> str:
    return f"open {path}"


# ---- deleting -----------------------------------------------------------------------------------------------------


async def delete(step: DeleteInternal, context: Context) -> None:
    """Delete an internal snapshot: by QEMU where it has the image open, otherwise beside it.

    :raise ToolError: QEMU cannot, or says that it has and has not.
    """
    qemu, node = context.qemu, await _open_node(step.path, context)
    if qemu is None or node is None:
        context.holding.take_over(step.path)
        internals.delete(step, context)
        return
    if step.tag in node.internals:
        try:
            await _delete(qemu, step.path, step.tag, context)
        except BaseException:
            with suppress(SnaptreeError):
                await open_to_read([step.path], context)
            raise
    elif context.recovering:
        # Of a job that has done it, and that nobody has lived to dismiss.
        await live_jobs.living(qemu.qmp, [_job(context)])
    await open_to_read([step.path], context)
    node = node_of(await qemu.graph(), step.path)
    await qemu.flush(node.name, step.path)
    if node.read_only:
        # Nobody writes to it: what is free stays so.
        punch_free(step.path)


async def _delete(qemu: RunningQemu, path: str, tag: str, context: Context) -> None:
    """Delete it in an image that QEMU has open, which it must be able to write to.

    What is under the disk's uppermost node cannot be told from what the guest writes to by the one command, and is done
    by a job.
    """
    graph = await qemu.graph()
    node = node_of(graph, path)
    if graph.top(inode_at(path)) is not None:
        if job := graph.job_on(node):
            raise BusyError(f"QEMU's job {job} works on {path}", "wait until that has ended, or cancel it")
        root = graph.root_of(node).name
        # In an image that QEMU (10.0.2) has let go of, with the memory that was saved, it dies of this.
        await go_on(qemu, running=False)
        await qemu.qmp.execute("blockdev-snapshot-delete-internal-sync", device=root, name=tag, seconds=DELETE_SECONDS)
    else:
        await _open(qemu, path, context)
        await _delete_by_job(qemu, node.name, tag, _job(context))
    if tag in node_of(await qemu.graph(), path).internals:
        raise ToolError(f"QEMU reported success, but {path} still has the internal snapshot {tag!r}")


def _job(context: Context) -> str:
    """The name of the job in QEMU, by which it is found again."""
    return f"{PREFIX}{context.token}-d"


async def _delete_by_job(qemu: RunningQemu, node: str, tag: str, name: str) -> None:
    if not await live_jobs.living(qemu.qmp, [name]):
        await qemu.qmp.execute("snapshot-delete", job_id=name, tag=tag, devices=[node])
    deadline = time.monotonic() + DELETE_SECONDS
    while True:
        job = (await query(qemu.qmp, [name])).get(name)
        if job is None:
            raise ToolError(f"{qemu.qmp.name} does not know the {name} job any more")
        if job.progress.status == "concluded":
            await qemu.qmp.execute("job-dismiss", id=name)
            if job.error is not None:
                raise explain("QEMU did not delete the internal snapshot", job.error)
            return
        if time.monotonic() > deadline:
            raise ToolError(f"the {name} job does not end")
        await asyncio.sleep(0.002)
