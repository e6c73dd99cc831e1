"""The step in which a running machine's disks are frozen at one instant."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

from snaptree.errors import ToolError, UnhealthyError
from snaptree.images import gate
from snaptree.images.facts import read_facts
from snaptree.planning.live_steps import Cut, LiveSnapshot
from snaptree.planning.memory_steps import SaveMemory
from snaptree.qemu.graph import BlockGraph, Node
from snaptree.qemu.jobs import FLUSH_SECONDS
from snaptree.qemu.key_objects import add_overlay
from snaptree.qemu.running import RunningQemu
from snaptree.running.carry import internals, live_internals
from snaptree.running.carry.nodes import inode_at, is_top
from snaptree.running.carry.standing import go_on_after_kill, with_firmware
from snaptree.running.context import Context
from snaptree.running.quiescing import quiesced, thaw

Frozen: TypeAlias = LiveSnapshot | SaveMemory
"""The steps that freeze a running machine's disks at one instant."""
FREEZING = "freezing"
"""What a step notes before the guest's file systems are frozen."""


async def snapshot(step: LiveSnapshot, context: Context) -> None:
    """Let the guest go on in the overlays, or after the internal snapshots: one transaction over all disks."""
    qemu = context.qemu
    if qemu is None:
        # QEMU has died. The overlays show what the tips show, or what the guest wrote to them.
        require_dead(step.cuts, context)
        return
    if _is_frozen(await qemu.graph(), step):
        await _left(step, context)
        return
    actions = await prepared(qemu, step, context)
    if step.quiesce:
        context.journal.note(step.about, FREEZING)
        async with quiesced(qemu, step.agent):
            await _cut(step, context, qemu, actions)
    else:
        await _cut(step, context, qemu, actions)
    await require_frozen(qemu, step)


async def _cut(step: LiveSnapshot, context: Context, qemu: RunningQemu, actions: list[dict[str, Any]]) -> None:
    async with with_firmware(qemu, step.firmware, _instant(step), context):
        await qemu.qmp.execute("transaction", actions=actions, seconds=FLUSH_SECONDS)


async def prepared(qemu: RunningQemu, step: Frozen, context: Context) -> list[dict[str, Any]]:
    """Have QEMU open the overlays; the actions of the transaction that freezes the disks.

    A disk's requests wait from its own action until the transaction has ended, so that what is written to another disk
    meanwhile rests on nothing that came after.
    """
    graph = await qemu.graph()
    actions = [live_internals.action(graph, mark) for mark in step.marks]
    for number, cut in enumerate(step.cuts):
        tip = _tip(graph, cut)
        name = f"st{number}-{context.token}"[:31]
        await add_overlay(qemu, graph, tip, _overlay(graph, tip, cut.overlay, name), context.keys)
        actions.append({"type": "blockdev-snapshot", "data": {"node": tip.name, "overlay": name}})
    return actions


def _is_frozen(graph: BlockGraph, step: Frozen) -> bool:
    """Whether it has happened on every disk."""
    marked = all(live_internals.is_marked(graph, mark) for mark in step.marks)
    return marked and all(is_top(graph, cut.overlay) for cut in step.cuts)


async def require_frozen(qemu: RunningQemu, step: Frozen) -> None:
    """See that the guest writes to the overlays, and that the internal snapshots are there.

    :raise ToolError: it is not so.
    """
    graph = await qemu.graph()
    for mark in step.marks:
        if not live_internals.is_marked(graph, mark):
            raise ToolError(f"QEMU reported success, but {mark.path} has no internal snapshot {mark.tag!r}")
    for cut in step.cuts:
        top = graph.top(inode_at(cut.overlay))
        below = graph.below(top) if top is not None else None
        if below is None or graph.file_of(below).inode != inode_at(cut.tip):
            raise ToolError(f"QEMU reported success, but {cut.overlay} is not what {cut.disk} writes to now")


def _instant(step: LiveSnapshot) -> str:
    """What the journal's notes are about while the guest stands still."""
    return f"instant of {step.about}"


async def _left(step: LiveSnapshot, context: Context) -> None:
    """Let go on, and thaw, what a snaptree that was killed may have left so, had its guards been killed too."""
    if not context.recovering or context.qemu is None:
        return
    await go_on_after_kill(_instant(step), context.qemu, context)
    if context.journal.noted(step.about) == FREEZING:
        await thaw(context.qemu, step.agent)


def _tip(graph: BlockGraph, cut: Cut) -> Node:
    tip = graph.top(inode_at(cut.tip))
    if tip is None:
        raise UnhealthyError(f"QEMU has not {cut.tip} as a disk any more", "see what was done to the machine")
    return tip


def _overlay(graph: BlockGraph, tip: Node, path: str, name: str) -> dict[str, Any]:
    """How to open the overlay: as the tip is, so far as QEMU tells."""
    found = gate.blockdev(path, "qcow2", name, None, read_only=False)
    file = graph.file_of(tip)
    found["cache"], found["file"]["cache"] = tip.cache, file.cache
    if tip.detect_zeroes != "off":
        found["detect-zeroes"] = tip.detect_zeroes
    return found


def require_dead(cuts: Sequence[Cut], context: Context) -> None:
    """See that no QEMU that does not answer us writes to the tips or to the overlays.

    :raise BusyError: one does.
    :raise OSError: one of the files is gone.
    """
    for cut in cuts:
        inode_at(cut.overlay)
    context.holding.require_closed(path for cut in cuts for path in (cut.tip, cut.overlay))


async def was_frozen(step: Frozen, context: Context) -> bool:
    """Whether the guest writes to the overlays, or may have when QEMU died; with internal snapshots alone, whether all
    are there.

    QEMU takes these before the guest goes over to any overlay: where one is missing it has not.
    """
    if not all(os.path.exists(cut.overlay) for cut in step.cuts):
        return False
    # One that was written to was a tip, even where somebody has started QEMU on the old ones since.
    written = any(read_facts(cut.overlay, "qcow2").written for cut in step.cuts)
    if context.qemu is None:
        # Taken once more, the step sees to it that QEMU has died.
        marked = all(mark.tag in internals.tags_of(mark.path) for mark in step.marks)
        return context.recovering and (written or marked)
    graph = await context.qemu.graph()
    if step.cuts:
        return written or any(is_top(graph, cut.overlay) for cut in step.cuts)
    return all(live_internals.is_marked(graph, mark) for mark in step.marks)


async def unsnapshot(step: LiveSnapshot, context: Context) -> None:
    """Let the guest be as before: on its tips, and neither frozen nor stopped."""
    if context.qemu is not None:
        await _left(step, context)
    await unfreeze(step, context)


async def unfreeze(step: Frozen, context: Context) -> None:
    """Take internal snapshots back, and close overlays that the guest does not write to: they are removed next."""
    await live_internals.unmark(step.marks, context)
    if context.qemu is None:
        return
    graph = await context.qemu.graph()
    for cut in step.cuts:
        for node in graph.opened(inode_at(cut.overlay)) if os.path.exists(cut.overlay) else ():
            await context.qemu.blockdev_del(node.name)
