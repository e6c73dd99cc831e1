"""Steps with which the QEMU of a running machine goes over to a merged file that was built aside.

The order is: QEMU reads what was built under its hidden name; the rename; QEMU opens it by its name. What it has open
it opens anew by the name when it is to write to it, so that the name has to lead to the same file in the end. Nodes are
found by their names and their files' names: after the rename a name leads to another file than a node has open.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

from snaptree.errors import RefusedError, ToolError, UnhealthyError
from snaptree.images import durable
from snaptree.planning.live_steps import LiveSettle, LiveSwap, Swap
from snaptree.qemu.graph import BlockGraph, Node
from snaptree.qemu.options import is_unnamed, opened_anew, options_of, reopened
from snaptree.qemu.running import RunningQemu
from snaptree.running.carry.nodes import inode_at, let_go, node_of
from snaptree.running.context import Context

_Over: TypeAlias = tuple[Node, str]
"""An image, and the name of the node that it is to stand on."""


async def swap(step: LiveSwap, context: Context) -> None:
    """Have QEMU read what was built. Without QEMU there is nothing to be done."""
    if context.qemu is None:
        return
    await _go_over(context.qemu, step.swaps, context, hidden=True)


async def settle(step: LiveSettle, context: Context) -> None:
    """Have QEMU open the merged files by their names, and close what is out of its graph."""
    qemu = context.qemu
    if qemu is None:
        return
    await _go_over(qemu, step.swaps, context, hidden=False)
    for each in step.swaps:
        await let_go(qemu, [_holder(step.swaps, each, context)])
        await _close(qemu, each, context)


async def unswap(step: LiveSwap, context: Context) -> None:
    """Have QEMU read the row again."""
    qemu = context.qemu
    if qemu is None:
        return
    graph = await qemu.graph()
    back: list[_Over] = []
    for each in step.swaps:
        child, built = _child(graph, each), graph.nodes.get(_name(step.swaps, each, context, hidden=True))
        below = graph.below(child)
        if built is not None and below is not None and below.name == built.name:
            upper = _others(graph, each.upper, _names(step.swaps, each, context))
            if not upper:
                raise UnhealthyError(f"QEMU has {each.upper} open no more", "see what was done to the machine")
            back.append((child, upper[0].name))
    await _restack(qemu, graph, back)
    for each in step.swaps:
        for name in (_name(step.swaps, each, context, hidden=True), _holder(step.swaps, each, context)):
            if name in (await qemu.graph()).nodes:
                await qemu.blockdev_del(name)


async def _go_over(qemu: RunningQemu, swaps: tuple[Swap, ...], context: Context, *, hidden: bool) -> None:
    graph = await qemu.graph()
    over: list[_Over] = []
    for each in swaps:
        name = _name(swaps, each, context, hidden=hidden)
        child = _child(graph, each)
        at = graph.below(child)
        if (at is not None and at.name == name) or (not hidden and _is_settled(qemu, graph, each, context)):
            continue
        if name not in graph.nodes:
            path = durable.temporary_path(each.upper, context.token) if hidden else each.upper
            below = _beneath(graph, child, each.below[0][0]).name if each.below else None
            await qemu.add(opened_anew(_options(qemu, graph, _upper(graph, swaps, each, context)), path, name, below))
        if hidden:
            await _hold(qemu, graph, at, _holder(swaps, each, context))
        over.append((child, name))
    await _restack(qemu, graph, over)
    graph = await qemu.graph()
    for each in swaps:
        at = graph.below(_child(graph, each))
        over_there = at is not None and at.name == _name(swaps, each, context, hidden=hidden)
        if not over_there and (hidden or not _is_settled(qemu, graph, each, context)):
            raise ToolError(f"QEMU reported success, but {each.child[0]} does not stand on what was built")


async def _restack(qemu: RunningQemu, graph: BlockGraph, over: Sequence[_Over]) -> None:
    """Have images stand on other nodes: at once, but for those whose names QEMU has made up, one after the other."""
    named = [reopened(node, _options(qemu, graph, node), below) for node, below in over if not is_unnamed(node)]
    if named:
        await qemu.qmp.execute("blockdev-reopen", options=named)
    for node, below in over:
        if is_unnamed(node):
            await qemu.reopen(node, backing=below)


async def _hold(qemu: RunningQemu, graph: BlockGraph, node: Node | None, name: str) -> None:
    """Keep open what QEMU opened by itself, and closes when nothing stands on it: it may have to be gone back to."""
    if node is not None and is_unnamed(node) and name not in graph.nodes:
        await qemu.qmp.execute("blockdev-add", driver="raw", node_name=name, file=node.name, read_only=True)


def _holder(swaps: tuple[Swap, ...], each: Swap, context: Context) -> str:
    """The name of the node that keeps the upper layer open."""
    return f"sh{swaps.index(each)}-{context.token}"[:26]


def _name(swaps: tuple[Swap, ...], each: Swap, context: Context, *, hidden: bool) -> str:
    """The name of a node of ours: of what was built under its hidden name, or under its own."""
    return f"s{'v' if hidden else 'w'}{swaps.index(each)}-{context.token}"[:26]


def _names(swaps: tuple[Swap, ...], each: Swap, context: Context) -> frozenset[str]:
    return frozenset(_name(swaps, each, context, hidden=hidden) for hidden in (True, False))


def _beneath(graph: BlockGraph, child: Node, path: str) -> Node:
    """The node of the file among those that the child stands on: another disk may stand on the same file.

    :raise UnhealthyError: there is none.
    """
    inode = inode_at(path)
    for node in graph.chain(child)[1:]:
        if graph.file_of(node).inode == inode:
            return node
    raise UnhealthyError(f"{child.name} does not stand on {path} in QEMU", "see what was done to the machine")


def _others(graph: BlockGraph, path: str, ours: frozenset[str]) -> list[Node]:
    """The nodes of images that were opened at the path, but for ours."""
    found: dict[str, Node] = {}
    for node in graph.nodes.values():
        if _is_at(node, path):
            above = [graph.nodes[each] for each in node.above if graph.nodes[each].file == node.name]
            found.update({each.name: each for each in above or [node] if each.name not in ours})
    return list(found.values())


def _is_at(node: Node, path: str) -> bool:
    """Whether the node was opened at the path: the file that it has open may have another name by now, or none."""
    if node.path is None:
        return False
    folder, name = os.path.split(node.path)
    return os.path.join(os.path.realpath(folder), name) == path


def _child(graph: BlockGraph, swap: Swap) -> Node:
    return node_of(graph, swap.child[0])


def _upper(graph: BlockGraph, swaps: tuple[Swap, ...], swap: Swap, context: Context) -> Node:
    """What the options are taken from: what has taken the upper layer's place already, which says how that was opened,
    or the upper layer itself."""
    ours, at = _names(swaps, swap, context), graph.below(_child(graph, swap))
    opened = _others(graph, swap.upper, ours) if at is None or at.name not in ours else []
    if opened:
        return opened[0]
    if at is None:
        raise UnhealthyError(f"QEMU has nothing beneath {swap.child[0]}", "see what was done to the machine")
    return at


def _is_settled(qemu: RunningQemu, graph: BlockGraph, swap: Swap, context: Context) -> bool:
    """Whether a QEMU that was started since has the merged file open already, on what it is to stand on.

    What a node's file is now the monitor does not tell, only by which name it was opened; the process's descriptors do.
    """
    child = _child(graph, swap)
    at = graph.below(child)
    if at is None:
        return False
    paths = (swap.upper, durable.temporary_path(swap.upper, context.token))
    if [node for node in graph.nodes.values() if any(_is_at(node, path) for path in paths)] != [graph.file_of(at)]:
        return False
    below = graph.below(at)
    stands = graph.file_of(below).inode if below is not None else None
    wanted = inode_at(swap.below[0][0]) if swap.below else None
    return stands == wanted and inode_at(swap.upper) in qemu.descriptors()


def _options(qemu: RunningQemu, graph: BlockGraph, node: Node) -> dict[str, Any]:
    """How the node is open.

    :raise RefusedError: it is not known: this QEMU is not the one that it was planned for.
    """
    found = options_of(graph, node, qemu.command_line())
    if found is None:
        path = graph.file_of(node).path or node.name
        raise RefusedError(
            f"how QEMU has opened {path} cannot be found out, so that it cannot be reopened as it is",
            "the guest may go on; when it has shut down run 'snaptree recover'",
        )
    return found


async def _close(qemu: RunningQemu, swap: Swap, context: Context) -> None:
    """Have QEMU close what it has no use for: what was built under its hidden name, and the row, top first.

    The graph is read once: of a chain that is as deep as may be that takes seconds.
    """
    paths = [durable.temporary_path(swap.upper, context.token), *(path for path, _ in reversed(swap.row))]
    graph = await qemu.graph()
    current = graph.below(_child(graph, swap))
    assert current is not None
    kept = {current.name, current.file}
    for path in paths:
        formats = [node.name for node in _others(graph, path, frozenset()) if node.name not in kept]
        files = [node.name for node in graph.nodes.values() if _is_at(node, path) and node.name not in kept]
        await let_go(qemu, [*formats, *files])
