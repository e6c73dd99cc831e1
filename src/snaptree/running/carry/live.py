"""Steps that the QEMU of a running machine takes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from snaptree.errors import SnaptreeError, ToolError, UnhealthyError
from snaptree.images import gate
from snaptree.images.facts import read_facts
from snaptree.planning.live_steps import Cut, LiveSnapshot
from snaptree.qemu.graph import BlockGraph, Inode, Node
from snaptree.qemu.running import RunningQemu
from snaptree.running.carry.standing import go_on_after_kill, with_firmware
from snaptree.running.context import Context
from snaptree.running.quiescing import quiesced, thaw

FREEZING = "freezing"
"""What a step notes before the guest's file systems are frozen."""


def inode_at(path: str) -> Inode:
    """Device and inode of a file.

    :raise OSError: it is not there.
    """
    status = os.stat(path)
    return status.st_dev, status.st_ino


def node_of(graph: BlockGraph, path: str) -> Node:
    """The node that shows the image of a file that keeps its name.

    :raise UnhealthyError: QEMU has not just one.
    """
    found = graph.opened(inode_at(path))
    if len(found) != 1:
        raise UnhealthyError(f"QEMU has {path} open {len(found)} times", "see what was done to the machine")
    return found[0]


async def let_go(qemu: RunningQemu, nodes: Iterable[str]) -> None:
    """Have QEMU close nodes that are out of its graph: those that were opened by name stay until they are told to go.

    One that something else uses stays open; its file's room comes back when QEMU ends.
    """
    for name in dict.fromkeys(nodes):
        with suppress(SnaptreeError):
            await qemu.blockdev_del(name)


def is_top(graph: BlockGraph, path: str) -> bool:
    """Whether a device has the file's image as its disk."""
    return os.path.exists(path) and graph.top(inode_at(path)) is not None


async def snapshot(step: LiveSnapshot, context: Context) -> None:
    """Let the guest go on in the overlays: one transaction over all disks."""
    qemu = context.qemu
    if qemu is None:
        # QEMU has died. The overlays show what the tips show, or what the guest wrote to them.
        require_dead(step.cuts, context)
        return
    graph = await qemu.graph()
    if all(is_top(graph, cut.overlay) for cut in step.cuts):
        await _left(step, context)
        return
    actions = await open_overlays(qemu, step.cuts, context)
    if step.quiesce:
        context.journal.note(step.cuts[0].tip, FREEZING)
        async with quiesced(qemu, step.agent):
            await _cut(step, context, qemu, actions)
    else:
        await _cut(step, context, qemu, actions)
    await require_cut(qemu, step.cuts)


async def _cut(step: LiveSnapshot, context: Context, qemu: RunningQemu, actions: list[dict[str, Any]]) -> None:
    async with with_firmware(qemu, step.firmware, step.cuts[0].overlay, context):
        await qemu.qmp.execute("transaction", actions=actions)


async def open_overlays(qemu: RunningQemu, cuts: Sequence[Cut], context: Context) -> list[dict[str, Any]]:
    """Have QEMU open the overlays; the actions of the transaction that lets the guest go on in them."""
    graph = await qemu.graph()
    actions: list[dict[str, Any]] = []
    for number, cut in enumerate(cuts):
        tip = _tip(graph, cut)
        name = f"st{number}-{context.token}"[:31]
        await qemu.add(_overlay(graph, tip, cut.overlay, name))
        actions.append({"type": "blockdev-snapshot", "data": {"node": tip.name, "overlay": name}})
    return actions


async def require_cut(qemu: RunningQemu, cuts: Sequence[Cut]) -> None:
    """See that the guest writes to the overlays.

    :raise ToolError: it does not.
    """
    graph = await qemu.graph()
    for cut in cuts:
        top = graph.top(inode_at(cut.overlay))
        below = graph.below(top) if top is not None else None
        if below is None or graph.file_of(below).inode != inode_at(cut.tip):
            raise ToolError(f"QEMU reported success, but {cut.overlay} is not what {cut.disk} writes to now")


async def _left(step: LiveSnapshot, context: Context) -> None:
    """Let go on, and thaw, what a snaptree that was killed may have left so, had its guards been killed too."""
    if not context.recovering or context.qemu is None:
        return
    await go_on_after_kill(step.cuts[0].overlay, context.qemu, context)
    if context.journal.noted(step.cuts[0].tip) == FREEZING:
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


async def was_cut(cuts: Sequence[Cut], context: Context) -> bool:
    """Whether the guest writes to the overlays, or may have when QEMU died."""
    if not all(os.path.exists(cut.overlay) for cut in cuts):
        return False
    if context.qemu is None:
        # Taken once more, the step sees to it that QEMU has died.
        return context.recovering
    graph = await context.qemu.graph()
    # One that was written to was a tip; since then somebody has started QEMU on the old ones.
    return any(is_top(graph, cut.overlay) or read_facts(cut.overlay, "qcow2").written for cut in cuts)


async def unsnapshot(step: LiveSnapshot, context: Context) -> None:
    """Let the guest be as before: on its tips, and neither frozen nor stopped."""
    if context.qemu is not None:
        await _left(step, context)
        await close_overlays(step.cuts, context)


async def close_overlays(cuts: Sequence[Cut], context: Context) -> None:
    """Close overlays that the guest does not write to: they are removed next."""
    if context.qemu is None:
        return
    graph = await context.qemu.graph()
    for cut in cuts:
        for node in graph.opened(inode_at(cut.overlay)) if os.path.exists(cut.overlay) else ():
            await context.qemu.blockdev_del(node.name)
