"""Finding the nodes of files in the QEMU of a running machine, and closing them."""

from __future__ import annotations

import os
from collections.abc import Iterable

from snaptree.errors import SnaptreeError, UnhealthyError
from snaptree.qemu.graph import BlockGraph, Inode, Node
from snaptree.qemu.running import RunningQemu


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

    :raise ToolError: QEMU does not answer any more: what it still has open is to be closed later.
    """
    for name in dict.fromkeys(nodes):
        try:
            await qemu.blockdev_del(name)
        except SnaptreeError:
            if not await qemu.answers():
                raise


def is_top(graph: BlockGraph, path: str) -> bool:
    """Whether a device has the file's image as its disk."""
    return os.path.exists(path) and graph.top(inode_at(path)) is not None
