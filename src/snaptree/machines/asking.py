"""Asking a machine's monitor what it does, and whether what it has open is what the tree says."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress

from snaptree.errors import RefusedError, SnaptreeError, UnhealthyError
from snaptree.machines.power import LOOK_SECONDS, WORK_SECONDS, Power, monitor_of, own_monitor, written_by
from snaptree.model.layer import Layer, LayerId
from snaptree.model.live import OFF, RUNNING, UNKNOWN, Live
from snaptree.model.machine import MachineConfig
from snaptree.model.tree import Tree
from snaptree.qemu.graph import PROTOCOLS, BlockGraph, Inode, Node
from snaptree.qemu.launching import is_ours
from snaptree.qemu.options import is_unnamed, options_of
from snaptree.qemu.running import RunningQemu, state_of
from snaptree.store.database import Database

NEEDED = frozenset(
    ("x-debug-query-block-graph", "query-named-block-nodes", "query-block", "blockdev-snapshot", "transaction")
)
"""What a monitor must be able to do for a machine to be handled while it runs."""


async def look(
    database: Database, config: MachineConfig, tree: Tree, seconds: float = LOOK_SECONDS
) -> tuple[Power, RunningQemu | None]:
    """What the machine does, and its monitor if it told us; whoever asks closes it.

    :param seconds: how long the monitor may take to greet us.
    """
    monitor = monitor_of(database, config)
    writer = written_by(tree)
    try:
        qemu = await RunningQemu.attach(monitor, seconds)
    except SnaptreeError as error:
        # Of our own socket nobody but another snaptree knows.
        own = monitor == own_monitor(database, config.name)
        state = RUNNING if writer and own else UNKNOWN if writer or error.code == "tool" else OFF
        return Power(state, None, error.message, error.hint), None
    if qemu is None:
        if not writer:
            return Power(OFF), None
        why = f"{writer} has its disk open, and no monitor is known"
        hint = f"stop it, or name its monitor: 'snaptree set {config.name} --qmp SOCKET'"
        return Power(UNKNOWN, None, why, hint), None
    try:
        return await _asked(qemu, tree, writer, config.name)
    except BaseException:
        await qemu.close()
        raise


async def _asked(qemu: RunningQemu, tree: Tree, writer: str, name: str) -> tuple[Power, RunningQemu | None]:
    try:
        commands = await qemu.commands()
        if missing := sorted(NEEDED - commands):
            why = f"its QEMU does not know {missing[0]}"
            await qemu.close()
            return Power(UNKNOWN, None, why, "stop it, or run it with QEMU 7.2 or newer"), None
        graph = await qemu.graph()
        if not writer and not _any_open(graph, tree):
            await qemu.close()
            return Power(OFF, None, f"the QEMU at {qemu.path} runs another machine"), None
        live = await _live(qemu, graph, tree, commands)
        return Power(live.state, live, next(iter(live.astray.values()), "")), qemu
    except SnaptreeError as error:
        await qemu.close()
        return Power(UNKNOWN, None, error.message, error.hint), None


async def again(qemu: RunningQemu, tree: Tree) -> Power:
    """What a machine does that has told us before, with what it has open now.

    :raise UnhealthyError: its disks are other images than the tree says.
    """
    live = await _live(qemu, await qemu.graph(), tree, await qemu.commands())
    return Power(live.state, live)


async def _live(qemu: RunningQemu, graph: BlockGraph, tree: Tree, commands: frozenset[str]) -> Live:
    astray: dict[LayerId, str] = {}
    nodes, words = match(graph, tree, qemu.path, astray), qemu.command_line()
    known = frozenset(layer for layer, node in nodes.items() if options_of(graph, node, words) is not None)
    tracked = frozenset(layer for layer, node in nodes.items() if node.bitmaps)
    unnamed = frozenset(layer for layer, node in nodes.items() if is_unnamed(node))
    tops = {disk: nodes[point.layer] for disk, point in tree.active_branch.tips.items()}
    word = await qemu.run_state()
    return Live(
        state=state_of(word),
        pid=qemu.pid,
        open=frozenset(nodes),
        commands=commands,
        reopenable=known,
        unnamed=unnamed,
        tracked=tracked,
        files=graph.files(),
        disks=graph.plugged(),
        # From QEMU 10.0 on it can be told to use them again, and is.
        let_go=word == "postmigrate" and "blockdev-set-active" not in commands,
        backups={disk: job for disk, node in tops.items() if (job := graph.backup(node))},
        jobs={disk: job for disk, node in tops.items() if (job := graph.job_on(node))},
        astray=astray,
    )


async def without_unplugged(qemu: RunningQemu, layers: Iterable[Layer], rest: Tree) -> Power:
    """Have QEMU close what snaptree has opened of a disk that has no device any more: nobody else knows these nodes.

    :param layers: the disk's, its tip first.
    :param rest: the tree without the disk.
    :return: what the machine does, with what it has open now.
    """
    graph = await qemu.graph()
    inodes = [inode for layer in layers if (inode := _inode(layer.path)) is not None]
    plugged = any(graph.top(inode) is not None for inode in inodes)
    for node in [] if plugged else [node for inode in inodes for node in graph.opened(inode) if is_ours(node.name)]:
        # One that a node of the user's stands on stays.
        with suppress(SnaptreeError):
            await qemu.blockdev_del(node.name)
    return await again(qemu, rest)


async def for_recovery(database: Database, config: MachineConfig, tree: Tree) -> RunningQemu | None:
    """The monitor of a machine that an interrupted operation has left, whatever its graph.

    ``None`` when nobody listens there. Somebody may have its images open all the same: a step that this matters to
    finds out by locking them.

    :raise ToolError: somebody listens who tells us nothing.
    """
    monitor = monitor_of(database, config)
    qemu = await RunningQemu.attach(monitor, WORK_SECONDS)
    if qemu is not None:
        try:
            if _any_open(await qemu.graph(), tree):
                return qemu
        except BaseException:
            await qemu.close()
            raise
        await qemu.close()
    return None


def _inode(path: str) -> Inode | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _any_open(graph: BlockGraph, tree: Tree) -> bool:
    opened = {node.inode for node in graph.nodes.values() if node.inode is not None}
    return any(layer.owned and _inode(layer.path) in opened for layer in tree.layers.values())


async def stands_on(monitor: str, paths: Sequence[str]) -> bool:
    """Whether the QEMU at the monitor has the first of the files as a disk, standing on the others.

    :raise RefusedError: it only reads it.
    :raise UnhealthyError: it stands on others there.
    :raise ToolError: the monitor does not answer.
    """
    qemu = await RunningQemu.attach(monitor)
    if qemu is None:
        return False
    async with qemu:
        graph = await qemu.graph()
    inodes = [_inode(path) for path in paths]
    top = graph.top(inodes[0]) if inodes[0] is not None else None
    if top is None:
        return False
    if top.read_only:
        hint = "a disk that nothing is written to needs no snapshots"
        raise RefusedError(f"the QEMU at {monitor} has {paths[0]} open for reading only", hint)
    has = [graph.file_of(node) for node in graph.chain(top)]
    if [node.inode for node in has] != inodes:
        there = " on ".join(node.path or node.name for node in has)
        hint = "see to the headers with 'qemu-img info --backing-chain'"
        raise UnhealthyError(f"the QEMU at {monitor} has {there}, the headers say {' on '.join(paths)}", hint)
    return True


def match(graph: BlockGraph, tree: Tree, monitor: str, astray: dict[LayerId, str] | None = None) -> dict[LayerId, Node]:
    """The node of each layer that the active tips stand on.

    :param astray: gets the layers of disks that QEMU has stacked otherwise beneath the tip, with a sentence that says
        so; of these the nodes are given which it has.
    :raise UnhealthyError: QEMU has other images as its disks than the tree says or, without ``astray``, stacked
        otherwise.
    """
    found: dict[LayerId, Node] = {}
    for disk, point in sorted(tree.active_branch.tips.items()):
        layers = list(tree.chain(point.layer))
        inode = _inode(layers[0].path)
        top = graph.top(inode) if inode is not None else None
        hint = f"see what it has with 'info block', and what the tree has with 'snaptree show {tree.machine}'"
        if top is None:
            hint += f"; one that was unplugged is let go with 'snaptree disk detach {tree.machine} {disk}'"
            raise UnhealthyError(f"the QEMU at {monitor} has not {layers[0].path} as a disk, the tip of {disk}", hint)
        nodes = graph.chain(top)
        if len(nodes) == len(layers) and all(map(_same, [graph] * len(nodes), nodes, layers)):
            found.update({layer.id: node for layer, node in zip(layers, nodes, strict=True)})
        else:
            has = " on ".join(graph.file_of(node).path or node.name for node in nodes)
            knows = " on ".join(layer.path for layer in layers)
            why = f"the QEMU at {monitor} has {has} as {disk}, the tree knows {knows}"
            if astray is None or not _same(graph, top, layers[0]):
                raise UnhealthyError(why, hint)
            astray.update({layer.id: why for layer in layers})
            files = {graph.file_of(node).inode: node for node in nodes}
            pairs = ((layer, files.get(_inode(layer.path))) for layer in layers)
            found.update({layer.id: node for layer, node in pairs if node is not None and _same(graph, node, layer)})
    return found


def _same(graph: BlockGraph, node: Node, layer: Layer) -> bool:
    driver, inode = "raw" if node.driver in PROTOCOLS else node.driver, _inode(layer.path)
    return driver == layer.format and inode is not None and graph.file_of(node).inode == inode
