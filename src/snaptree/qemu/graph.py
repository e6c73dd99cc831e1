"""The block graph of a QEMU that runs: which file is open in which node, and what stands on what.

Nodes are found by the files that they have open. Names are the user's, or generated, and format nodes tell of another
file than they have open once header and graph differ.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct, field

from snaptree.errors import UnhealthyError
from snaptree.qemu.jobs import PREFIX
from snaptree.qemu.session import sense

Inode = tuple[int, int]
FORMATS = ("qcow2", "raw")
PROTOCOLS = ("file", "host_device")
BACKUP = "copy-before-write"
"""The driver of the node that a backup job puts above what it copies; where that goes is beneath it as well."""
FILTERS = ("commit_top", "mirror_top", "stream", "copy-on-read", "throttle", "preallocate", "snapshot-access", BACKUP)
"""Drivers of nodes that show what is in the child that is their file or backing file."""


class Node(Struct, frozen=True):
    """One node. ``file`` and ``backing`` are the nodes beneath it, ``above`` those that stand on it.

    ``path`` and ``inode`` are of the file that a protocol node has open. ``cache`` has ``direct`` and ``no-flush``,
    ``bitmaps`` the names of the dirty bitmaps that QEMU keeps of it; those of jobs have none. ``internals`` are the
    names of an image's internal snapshots, ``jobs`` those of the jobs that work on the node. ``secret`` is the object
    that has the key of an image that is ``encrypted``, where QEMU tells it.
    """

    name: str
    driver: str
    read_only: bool
    file: str | None = None
    backing: str | None = None
    path: str | None = None
    inode: Inode | None = None
    above: tuple[str, ...] = ()
    cache: Mapping[str, bool] = field(default_factory=dict)
    detect_zeroes: str = "off"
    bitmaps: tuple[str, ...] = ()
    internals: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    encrypted: bool = False
    secret: str = ""


class BlockGraph(Struct, frozen=True):
    """All nodes by name; ``disks`` are those that devices have as their disks, ``keys`` the objects with keys."""

    nodes: Mapping[str, Node]
    disks: frozenset[str]
    keys: frozenset[str] = frozenset()

    def opened(self, inode: Inode) -> tuple[Node, ...]:
        """The nodes that show the image in a file: its format's, or the file's own where there is none above it."""
        found: dict[str, Node] = {}
        for node in self.nodes.values():
            if node.inode != inode:
                continue
            formats = [self.nodes[each] for each in node.above if self.nodes[each].file == node.name]
            formats = [each for each in formats if each.driver in FORMATS]
            for each in formats or [node]:
                found[each.name] = each
        return tuple(found.values())

    def files(self) -> frozenset[Inode]:
        """All files that are open."""
        return frozenset(node.inode for node in self.nodes.values() if node.inode is not None)

    def plugged(self) -> frozenset[Inode]:
        """The files whose images devices have as their disks."""
        found = (self.file_of(node) for node in self.nodes.values() if self._is_disk(node))
        return frozenset(node.inode for node in found if node.inode is not None)

    def file_of(self, node: Node) -> Node:
        """The node that has the file open in which an image is."""
        while node.file is not None:
            node = self.nodes[node.file]
        return node

    def below(self, node: Node) -> Node | None:
        """The image that an image stands on; nodes that jobs have put between are passed over."""
        return self._image(node.backing)

    def _image(self, name: str | None) -> Node | None:
        """The image that a node shows: itself, or what is beneath it when it is a filter."""
        at = self.nodes[name] if name is not None else None
        while at is not None and at.driver in FILTERS:
            beneath = at.backing or at.file
            at = self.nodes[beneath] if beneath is not None else None
        return at

    def chain(self, node: Node) -> tuple[Node, ...]:
        """An image and all that it stands on, top first."""
        found = [node]
        while (below := self.below(found[-1])) is not None:
            found.append(below)
        return tuple(found)

    def root_of(self, node: Node) -> Node:
        """The uppermost node of the disk that the image is of: it itself, an image on it, or a filter."""
        at = node
        while at.above:
            at = self.nodes[at.above[0]]
        return at

    def top(self, inode: Inode) -> Node | None:
        """The image in the file, where a device has it as its disk; ``None`` when none has.

        :raise UnhealthyError: it is the disk of more than one device.
        """
        found = [node for node in self.opened(inode) if self._is_disk(node)]
        if len(found) > 1:
            names = ", ".join(node.name for node in found)
            raise UnhealthyError(f"QEMU has one image open {len(found)} times ({names})", "give each disk its own")
        return found[0] if found else None

    def _is_disk(self, node: Node) -> bool:
        """Whether a device has the image, or a filter above it, as its disk. What a job uses is no device's."""
        above = (self.nodes[each] for each in node.above)
        filters = (each for each in above if each.driver in FILTERS and node.name in (each.file, each.backing))
        return node.name in self.disks or any(map(self._is_disk, filters))

    def backup(self, node: Node) -> str:
        """The name of a backup job that copies the image, or one that it stands on; empty without one."""
        shown = {each.name for each in self.chain(node)}
        for each in self.nodes.values():
            if each.driver != BACKUP:
                continue
            image = self._image(each.file)
            if image is not None and image.name in shown:
                return each.jobs[0] if each.jobs else each.name
        return ""

    def job_on(self, node: Node) -> str:
        """The name of a job, not of ours, that works on a tip or on what is between that and the device; empty without
        one."""
        while True:
            for job in node.jobs:
                if not job.startswith(PREFIX):
                    return job
            if not node.above:
                return ""
            node = self.nodes[node.above[0]]


def read_graph(
    told: Sequence[Mapping[str, Any]], edges: Mapping[str, Any], devices: Sequence[Mapping[str, Any]], folder: str
) -> BlockGraph:
    """The graph from what QEMU says.

    :param told: the answer to ``query-named-block-nodes``.
    :param edges: the answer to ``x-debug-query-block-graph``: the only one that says which node stands on which.
    :param devices: the answer to ``query-block``, which looks through the nodes that jobs put between.
    :param folder: QEMU's working folder, which relative names start from.
    :raise ToolError: the answers make no sense.
    """
    with sense("QEMU", "block graph", told):
        return _read(told, edges, devices, folder)


def _read(
    told: Sequence[Mapping[str, Any]], edges: Mapping[str, Any], devices: Sequence[Mapping[str, Any]], folder: str
) -> BlockGraph:
    known = {each["node-name"] for each in told}
    names = {each["id"]: each["name"] for each in edges["nodes"] if each["type"] == "block-driver"}
    names = {number: name for number, name in names.items() if name in known}
    jobs = {each["id"]: each["name"] for each in edges["nodes"] if each["type"] == "block-job"}
    at_work: dict[str, list[str]] = {}
    beneath: dict[str, dict[str, str]] = {}
    above: dict[str, list[str]] = {}
    for edge in edges["edges"]:
        child = names.get(edge["child"])
        if child is None:
            continue
        if edge["parent"] in jobs:
            at_work.setdefault(child, []).append(jobs[edge["parent"]])
        parent = names.get(edge["parent"])
        if parent is not None:
            beneath.setdefault(parent, {})[edge["name"]] = child
            above.setdefault(child, []).append(parent)
    nodes: dict[str, Node] = {}
    for each in told:
        name, driver = each["node-name"], each["drv"]
        path = os.path.join(folder, each["file"]) if driver in PROTOCOLS else None
        nodes[name] = Node(
            name=name,
            driver=driver,
            read_only=bool(each["ro"]),
            file=beneath.get(name, {}).get("file"),
            backing=beneath.get(name, {}).get("backing"),
            path=path,
            inode=_inode(path) if path is not None else None,
            above=tuple(above.get(name, ())),
            cache={key: bool(each["cache"][key]) for key in ("direct", "no-flush")},
            detect_zeroes=str(each["detect_zeroes"]),
            bitmaps=tuple(str(one["name"]) for one in each.get("dirty-bitmaps", ()) if one.get("name")),
            internals=tuple(str(one["name"]) for one in each.get("image", {}).get("snapshots", ())),
            jobs=tuple(at_work.get(name, ())),
            encrypted=bool(each.get("encrypted")),
            secret=_secret(each["file"]) if each.get("encrypted") else "",
        )
    tops = frozenset(each["inserted"]["node-name"] for each in devices if "inserted" in each)
    if tops and not tops & known:
        raise ValueError(f"there are disks, as {min(tops)}, and none of their nodes")
    return BlockGraph(nodes, tops)


def _secret(name: str) -> str:
    """The object with the key that an image was opened with: its name tells, where that says how it was opened.

    Of a chain that is deep QEMU tells only the beginning.
    """
    if not name.startswith("json:"):
        return ""
    try:
        options = json.loads(name.removeprefix("json:"))
        return str(options.get("encrypt.key-secret") or options.get("encrypt", {}).get("key-secret") or "")
    except (ValueError, AttributeError, RecursionError):
        return ""


def _inode(path: str) -> Inode | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
