"""libvirt's records, a domain's definition and its metadata as the tree has them: XML that says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from snaptree.errors import UnhealthyError
from snaptree.model.domain import PLACEHOLDER
from snaptree.model.memory import Memory
from snaptree.model.tree import Tree
from snaptree.planning.naming import renamed_roots
from snaptree.planning.records import Wanted
from snaptree.store.libvirt import xml
from snaptree.store.libvirt.reading import hints_of
from snaptree.store.libvirt.xml import Element, Resolve

Row = tuple[str, str, tuple[str, str] | None, bool]
"""A disk of a record: its target, how it was taken, its overlay, and whether virsh is kept from deleting it."""


class Going(Struct, frozen=True):
    """Internal snapshots, by path and tag, that nothing shows any more: ``more`` that are still there, and ``done``."""

    more: frozenset[tuple[str, str]] = frozenset()
    done: frozenset[tuple[str, str]] = frozenset()


_FIRST_STATE = {"crash": "disk-snapshot", "quiesced": "disk-snapshot"}


def hints(tree: Tree, going: Iterable[tuple[str, str]] = ()) -> Element:
    """What the domain's metadata is to say.

    :param going: internal snapshots that nothing shows any more, by path and tag.
    """
    found = xml.new_own("domain", active=tree.active, created=repr(tree.active_branch.created))
    if tree.active_branch.parent is not None:
        found.set("parent", tree.active_branch.parent)
    waiting = renamed_roots(tree)
    for disk, (path, image_format) in sorted(tree.roots.items()):
        now = {"now": waiting[disk].path} if disk in waiting else {}
        xml.add_own(found, "root", disk=disk, path=path, format=image_format, **now)
    # What only something outside stands on is nobody's here any more.
    needed = {layer.id for point in tree.names_on for layer in tree.chain(point.layer)}
    layers: dict[str, bool] = {}
    for layer in tree.layers.values():
        if layer.owned and layer.id in needed:
            layers[layer.path] = layers.get(layer.path, False) or layer.made
    for path, made in sorted(layers.items()):
        xml.add_own(found, "layer", path=path, **({"made": "yes"} if made else {}))
    named = {(tree.layers[layer].path, tag) for layer, tags in tree.internals.items() for tag in tags}
    for path, tag in sorted(set(going) - named):
        if path in layers:
            xml.add_own(found, "going", path=path, snapshot=tag)
    return found


def definition(
    before: Element, tree: Tree, records: Iterable[Element], resolve: Resolve, going: Going | None = None
) -> Element:
    """The domain's definition with its disks on the active tips.

    :param records: where the description of a disk is taken from that the definition has not.
    :param going: what is to be noted of internal snapshots that nothing shows any more.
    :raise UnhealthyError: nothing describes a disk.
    """
    domain = xml.clone(before)
    there = dict(xml.disks(domain))
    for target, tip in sorted(tree.active_branch.tips.items()):
        disk = there.get(target)
        if disk is None:
            disk = _described(target, records, domain)
            domain.find("devices").append(disk)
        layer = tree.layers[tip.layer]
        xml.put_source(disk, layer.path, layer.format, resolve)
    xml.put_own(domain, "record", None)
    known = hints_of(before).going
    xml.put_own(domain, "domain", hints(tree, known if going is None else (known | going.more) - going.done))
    return domain


def _described(target: str, records: Iterable[Element], domain: Element) -> Element:
    """A disk as the first record has it that has it, but for what another device of the domain has by now."""
    for record in records:
        for known in (record.find("inactiveDomain"), record.find("domain")):
            disk = dict(xml.disks(known)).get(target)
            if disk is not None:
                found = xml.clone(disk)
                for each in [each for each in found if each.tag == "alias" or xml.is_taken(each, domain)]:
                    found.remove(each)
                return found
    raise UnhealthyError(
        f"nothing says what disk {target} was like", "plug one in with 'virsh attach-disk', or leave the disk out"
    )


def record(before: Element | None, domain: Element, wanted: Wanted, tree: Tree, resolve: Resolve) -> Element:
    """The record that says what is wanted.

    :param before: the record as it is, or that of its former name.
    :param domain: the domain's definition, of which a new record is made.
    """
    root = xml.clone(before) if before is not None else _new(domain, wanted)
    xml.put_text(root, "name", wanted.name)
    xml.put_text(root, "description", wanted.description or None, after="name")
    # One that libvirt wrote when it saved the memory of a branch has the time of that.
    xml.put_text(root, "creationTime", str(int(wanted.created)))
    _put_parent(root, wanted.parent)
    _put_disks(root, "disks", wanted, wanted.overlays, resolve)
    _put_disks(root, "revertDisks", wanted, wanted.reverts, resolve)
    for tag in ("domain", "inactiveDomain"):
        inner = root.find(tag)
        if inner is None:
            continue
        there = dict(xml.disks(inner))
        for target, disk in there.items():
            place = wanted.points.get(target)
            if place is not None:
                xml.put_source(disk, place.path, place.format, resolve)
            elif xml.path_of(disk, resolve) is not None:
                xml.strip_chain(disk)
        for target in sorted(set(wanted.points) - set(there)):
            disk = _described(target, [root, _as_record(domain)], inner)
            xml.put_source(disk, wanted.points[target].path, wanted.points[target].format, resolve)
            inner.find("devices").append(disk)
    inner = root.find("domain")
    xml.put_own(inner, "record", _mark(wanted))
    if xml.own(inner, "domain") is None:
        xml.put_own(inner, "domain", hints(tree))
    return root


def with_memory(domain: Element, memory: Memory, cookie: Element | None = None) -> Element:
    """What a new record is made of whose memory is there already.

    :param domain: the domain as it was when it was saved.
    :param cookie: what libvirt keeps besides in a record with memory.
    """
    root = xml.etree().Element("domainsnapshot")
    xml.put_text(root, "name", "")
    xml.put_text(root, "state", memory.state)
    xml.put_text(root, "creationTime", "0")
    xml.etree().SubElement(root, "memory", snapshot="external", file=memory.path)
    root.append(xml.clone(domain))
    if cookie is not None:
        root.append(xml.clone(cookie))
    return root


def _as_record(domain: Element) -> Element:
    root = xml.etree().Element("domainsnapshot")
    root.append(xml.clone(domain))
    return root


def _new(domain: Element, wanted: Wanted) -> Element:
    root = xml.etree().Element("domainsnapshot")
    xml.put_text(root, "name", wanted.name)
    xml.put_text(root, "state", _FIRST_STATE.get(wanted.consistency, "shutoff"))
    xml.put_text(root, "creationTime", str(int(wanted.created)))
    xml.etree().SubElement(root, "memory", snapshot="no")
    inner = xml.clone(domain)
    for each in inner.findall("devices/disk/backingStore"):
        each.getparent().remove(each)
    root.append(inner)
    return root


def _put_parent(root: Element, parent: str | None) -> None:
    element = root.find("parent")
    if parent is None:
        if element is not None:
            root.remove(element)
        return
    if element is None:
        element = xml.etree().Element("parent")
        root.find("name").addnext(element)
    xml.put_text(element, "name", parent)


def _put_disks(root: Element, tag: str, wanted: Wanted, files: Mapping[str, tuple[str, str]], resolve: Resolve) -> None:
    """Let ``<disks>`` or ``<revertDisks>`` name these files; a disk without a point is in neither."""
    element = root.find(tag)
    targets = {target for target, _ in xml.disks(root.find("domain"))} | set(wanted.points)
    if tag == "revertDisks" and not files:
        if element is not None:
            root.remove(element)
        return
    rows: list[Row] = []
    for target in sorted(targets):
        place = wanted.points.get(target)
        if place is None:
            rows.append((target, "no", None, False))
        elif place.tag is not None:
            rows.append((target, "internal" if tag == "disks" else "no", None, False))
        else:
            rows.append((target, "external", files.get(target), tag == "disks" and target in wanted.guarded))
    if element is not None and _rows_of(element, resolve) == rows:
        return
    fresh = xml.etree().Element(tag)
    for target, kind, file, guarded in rows:
        disk = xml.etree().SubElement(fresh, "disk", name=target, snapshot=kind)
        if file is not None:
            disk.set("type", "file")
            xml.etree().SubElement(disk, "driver", type=file[1])
            xml.etree().SubElement(disk, "source", file=file[0])
        if guarded:
            xml.etree().SubElement(disk, "snapshotDeleteInProgress")
    if element is not None:
        root.replace(element, fresh)
    else:
        root.find("domain").addprevious(fresh)


def _rows_of(element: Element, resolve: Resolve) -> list[Row]:
    """What ``<disks>`` or ``<revertDisks>`` says now."""
    found: list[Row] = []
    for disk in element:
        kind = disk.get("snapshot", "external")
        path = xml.path_of(disk, resolve) if kind == "external" else None
        file = (path, xml.format_of(disk)) if path is not None else None
        found.append((disk.get("name", ""), kind, file, disk.find("snapshotDeleteInProgress") is not None))
    return sorted(found, key=lambda row: row[0])


def is_placeholder(record: Element) -> bool:
    """Whether a record is one of ours that stands for no snapshot."""
    mark = xml.own(record.find("domain"), "record")
    return mark is not None and mark.get("kind") == PLACEHOLDER


def _mark(wanted: Wanted) -> Element:
    found = xml.new_own("record", kind=wanted.kind, created=repr(wanted.created))
    if wanted.active is not None:
        found.set("active", wanted.active)
    if wanted.consistency:
        found.set("consistency", wanted.consistency)
    for piece in wanted.firmware:
        xml.add_own(found, "firmware", role=piece.role, path=piece.path)
    for disk, place in sorted(wanted.points.items()):
        if place.tag is not None and place.tag != wanted.name:
            xml.add_own(found, "tag", disk=disk, name=place.tag)
    for disk in sorted(wanted.guarded):
        xml.add_own(found, "guard", disk=disk)
    return found
