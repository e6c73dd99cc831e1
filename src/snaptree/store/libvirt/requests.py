"""What libvirt is asked for a snapshot with, as XML."""

from __future__ import annotations

from collections.abc import Mapping

from snaptree.errors import RefusedError
from snaptree.store.libvirt import xml


def targets(definition: str) -> tuple[str, ...]:
    """The disks of a definition, whatever they are."""
    return tuple(target for target, _ in xml.disks(xml.parse(definition, "the domain's definition")))


def snapshot_request(definition: str, overlays: Mapping[str, str]) -> xml.Element:
    """What libvirt is asked for a snapshot with: these disks go on in these overlays, the others as they are.

    :raise RefusedError: libvirt would take one disk for another.
    """
    root = xml.etree().Element("domainsnapshot")
    disks = xml.etree().SubElement(root, "disks")
    running = xml.parse(definition, "the domain's definition")
    if mixed := xml.out_of_order(running):
        raise RefusedError(
            f"libvirt would take {mixed} of domain {running.findtext('name')} for another disk: it was defined without "
            "its bus",
            "shut the domain down and start it again: from then on libvirt knows its disks' order",
        )
    for target, now in xml.disks(running):
        disk = xml.etree().SubElement(disks, "disk", name=target, snapshot="external" if target in overlays else "no")
        if target in overlays:
            disk.set("type", "file")
            xml.etree().SubElement(disk, "driver", type="qcow2")
            source = xml.etree().SubElement(disk, "source", file=overlays[target])
            source.extend(xml.clone(each) for each in now.findall("source/seclabel"))
    return root
