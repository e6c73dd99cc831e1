"""Snapshots as libvirt's domainsnapshot XML, and back.

Source: libvirt's ``formatsnapshot`` and ``domainsnapshot.rng``. There an external disk names the *overlay* that was
made when the snapshot was taken, and the ``<domain>`` within names the disk as it was then: the point itself.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

from snaptree.errors import NotFoundError, ToolError, UnhealthyError
from snaptree.model.layer import Point
from snaptree.model.tree import Tree
from snaptree.paths import canonical
from snaptree.planning.adopt import FoundSnapshot

if TYPE_CHECKING:
    from snaptree.machines.machine import View

MAX_FILES = 10_000
MAX_BYTES = 16 << 20


def _etree() -> Any:
    try:
        from lxml import etree
    except ImportError as error:
        raise ToolError("lxml is not installed, and XML needs it", "install snaptree[xml]") from error
    return etree


def snapshot_xml(view: View, name: str) -> str:
    """One snapshot as domainsnapshot XML.

    :raise NotFoundError: there is no such snapshot.
    """
    etree = _etree()
    tree = view.tree
    if name not in tree.snapshots:
        raise NotFoundError(f"machine {tree.machine} has no snapshot {name!r}", f"see 'snaptree tree {tree.machine}'")
    snapshot = tree.snapshots[name]
    root = etree.Element("domainsnapshot")
    _text(etree, root, "name", snapshot.name)
    if snapshot.description:
        _text(etree, root, "description", snapshot.description)
    _text(etree, root, "state", "shutoff")
    if snapshot.parent is not None:
        _text(etree, etree.SubElement(root, "parent"), "name", snapshot.parent)
    _text(etree, root, "creationTime", str(int(snapshot.created)))
    etree.SubElement(root, "memory", snapshot="no")
    disks = etree.SubElement(root, "disks")
    for target in sorted({*tree.disks, *snapshot.points}):
        point = snapshot.points.get(target)
        if point is None:
            etree.SubElement(disks, "disk", name=target, snapshot="no")
        elif point.internal is not None:
            etree.SubElement(disks, "disk", name=target, snapshot="internal")
        else:
            disk = etree.SubElement(disks, "disk", name=target, snapshot="external", type="file")
            overlay = _overlay(tree, point)
            if overlay is not None:
                etree.SubElement(disk, "driver", type=overlay[1])
                etree.SubElement(disk, "source", file=overlay[0])
    domain = etree.SubElement(root, "domain", type="qemu")
    _text(etree, domain, "name", tree.machine)
    _text(etree, domain, "memory", "1048576", unit="KiB")
    system = etree.SubElement(domain, "os")
    _text(etree, system, "type", "hvm")
    devices = etree.SubElement(domain, "devices")
    for target, point in sorted(snapshot.points.items()):
        layer = tree.layers[point.layer]
        disk = etree.SubElement(devices, "disk", type="file", device="disk")
        etree.SubElement(disk, "driver", name="qemu", type=layer.format)
        etree.SubElement(disk, "source", file=layer.path)
        etree.SubElement(disk, "target", dev=target, bus=_bus(target))
    return str(etree.tostring(root, pretty_print=True, encoding="unicode"))


def _text(etree: Any, parent: Any, tag: str, text: str, **attributes: str) -> None:
    try:
        etree.SubElement(parent, tag, **attributes).text = text
    except ValueError as error:
        raise UnhealthyError(f"{text[:40]!r} cannot be written as XML", "rename it first") from error


def _bus(target: str) -> str:
    return {"vd": "virtio", "sd": "scsi", "hd": "ide", "fd": "fdc"}.get(target[:2], "virtio")


def _overlay(tree: Tree, point: Point) -> tuple[str, str] | None:
    """The file that the snapshot's line goes on in; at a fork, that of the oldest child."""
    for child in tree.children.get(point.layer, ()):
        return tree.layers[child].path, tree.layers[child].format
    return None


def read_folder(folder: str) -> tuple[FoundSnapshot, ...]:
    """The snapshots that a folder of domainsnapshot XML describes, such as libvirt keeps for each domain.

    :raise NotFoundError: there is no such folder, or it has no XML.
    :raise UnhealthyError: a file is not domainsnapshot XML.
    """
    if not os.path.isdir(folder):
        raise NotFoundError(f"there is no folder {folder}", "give the folder with the snapshots' XML")
    names = sorted(name for name in os.listdir(folder) if name.endswith(".xml"))[:MAX_FILES]
    if not names:
        raise NotFoundError(f"there is no XML in {folder}", "give the folder with the snapshots' XML")
    return tuple(_read(os.path.join(folder, name)) for name in names)


def _read(path: str) -> FoundSnapshot:
    etree = _etree()
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    try:
        root = etree.fromstring(_content(path), parser)
    except etree.XMLSyntaxError as error:
        raise UnhealthyError(f"{path} is not XML: {error}") from error
    if root.tag != "domainsnapshot" or not root.findtext("name"):
        raise UnhealthyError(f"{path} is not domainsnapshot XML", "give the folder with the snapshots' XML")
    name = str(root.findtext("name"))
    kinds = {disk.get("name"): disk.get("snapshot", "external") for disk in root.findall("disks/disk")}
    points: list[tuple[str, str, str | None]] = []
    for disk in root.findall("domain/devices/disk"):
        target, source = disk.find("target"), disk.find("source")
        if target is None or source is None or source.get("file") is None or disk.get("device", "disk") != "disk":
            continue
        kind = kinds.get(target.get("dev"), "no" if kinds else "internal")
        if kind != "no":
            internal = name if kind == "internal" else None
            points.append((str(target.get("dev")), canonical(str(source.get("file"))), internal))
    try:
        created = float(root.findtext("creationTime") or 0)
    except ValueError:
        created = 0.0
    return FoundSnapshot(
        name=name,
        parent=root.findtext("parent/name"),
        created=created,
        description=root.findtext("description") or "",
        points=tuple(points),
        memory=root.find("memory") is not None and root.find("memory").get("snapshot", "no") != "no",
    )


def _content(path: str) -> bytes:
    """What is in the file, if it is one: a pipe would be waited for."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnhealthyError(f"{path} is not a regular file", "take it out of the folder")
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UnhealthyError(
            f"{path} cannot be read: {error.strerror}", "check it, or take it out of the folder"
        ) from error
    if len(content) > MAX_BYTES:
        raise UnhealthyError(f"{path} is larger than snapshot XML can be")
    return content
