"""Domains and records out of libvirt's XML."""

from __future__ import annotations

import os
from collections.abc import Mapping

from snaptree.errors import UsageError
from snaptree.model.domain import Domain, DomainDisk, Hints, Mark, Record, RecordDisk
from snaptree.model.names import check_target
from snaptree.model.snapshot import FirmwareFile
from snaptree.store.libvirt import xml
from snaptree.store.libvirt.xml import Element, Resolve


def domain_of(
    text: str, uri: str, state: str, resolve: Resolve, *, persistent: bool = True, saved: bool = False
) -> Domain:
    """A domain out of its definition.

    :param resolve: gives the path of a volume of a storage pool.
    """
    root = xml.parse(text, "the domain's definition")
    found: list[DomainDisk] = []
    left: dict[str, str] = {}
    for target, disk in xml.disks(root):
        why = xml.why_left(disk, resolve) or _bad_target(target)
        path = xml.path_of(disk, resolve)
        if why or path is None:
            left[target] = why
        else:
            found.append(DomainDisk(target, path, xml.format_of(disk)))
    nvram, nvram_left = xml.variables_of(root)
    return Domain(
        name=str(root.findtext("name")),
        uuid=str(root.findtext("uuid")),
        uri=uri,
        state=state,
        persistent=persistent,
        disks=tuple(found),
        left=left,
        nvram=os.path.realpath(nvram) if nvram is not None and os.path.exists(nvram) else None,
        nvram_left=nvram_left,
        tpm=xml.has_tpm(root),
        saved=saved,
        hints=hints_of(root),
        lost=xml.lost_volumes(root, resolve),
    )


def _bad_target(target: str) -> str:
    try:
        check_target(target)
    except UsageError as error:
        return error.message
    return ""


def record_of(text: str, resolve: Resolve) -> Record:
    """A record out of its XML."""
    root = xml.parse(text, "a snapshot's record")
    domain = root.find("domain")
    points: dict[str, tuple[str, str]] = {}
    for target, disk in xml.disks(domain):
        path = xml.path_of(disk, resolve)
        if path is not None and not xml.why_left(disk, resolve) and not _bad_target(target):
            points[target] = (path, xml.format_of(disk))
    memory = root.find("memory")
    kind = memory.get("snapshot", "no") if memory is not None else "no"
    file = memory.get("file") if memory is not None else None
    return Record(
        name=str(root.findtext("name")),
        parent=root.findtext("parent/name"),
        created=_number(root.findtext("creationTime")),
        description=root.findtext("description") or "",
        state=root.findtext("state") or "shutoff",
        disks=_record_disks(root, "disks", resolve),
        points=points,
        reverts=_record_disks(root, "revertDisks", resolve),
        memory=os.path.realpath(file) if file is not None else None,
        mark=_mark_of(domain),
        hints=hints_of(domain),
        inside=kind == "internal",
        lost=xml.lost_volumes(domain, resolve),
    )


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def _record_disks(root: Element, tag: str, resolve: Resolve) -> Mapping[str, RecordDisk]:
    found: dict[str, RecordDisk] = {}
    for disk in root.findall(f"{tag}/disk"):
        driver = disk.find("driver")
        found[disk.get("name", "")] = RecordDisk(
            kind=disk.get("snapshot", "external"),
            overlay=xml.path_of(disk, resolve),
            format=driver.get("type") if driver is not None else None,
            deleting=disk.find("snapshotDeleteInProgress") is not None,
        )
    return found


def _mark_of(domain: Element | None) -> Mark | None:
    found = xml.own(domain, "record")
    if found is None:
        return None
    return Mark(
        kind=found.get("kind", "snapshot"),
        created=_number(found.get("created")),
        consistency=found.get("consistency", ""),
        firmware=tuple(
            FirmwareFile(each.get("role", ""), each.get("path", "")) for each in xml.children(found, "firmware")
        ),
        guarded=frozenset(each.get("disk", "") for each in xml.children(found, "guard")),
        tags={each.get("disk", ""): each.get("name", "") for each in xml.children(found, "tag")},
        active=found.get("active"),
    )


def hints_of(domain: Element | None) -> Hints:
    """What snaptree keeps in a domain's metadata."""
    found = xml.own(domain, "domain")
    if found is None:
        return Hints()
    layers = xml.children(found, "layer")
    return Hints(
        active=found.get("active"),
        parent=found.get("parent"),
        created=_number(found.get("created")),
        roots={
            each.get("disk", ""): (each.get("path", ""), each.get("format", "qcow2"))
            for each in xml.children(found, "root")
        },
        renamed={each.get("disk", ""): each.get("now", "") for each in xml.children(found, "root") if each.get("now")},
        owned=frozenset(each.get("path", "") for each in layers),
        made=frozenset(each.get("path", "") for each in layers if each.get("made") == "yes"),
        going=frozenset((each.get("path", ""), each.get("snapshot", "")) for each in xml.children(found, "going")),
    )
