"""libvirt's XML: elements of a domain and of a record, found and changed in place.

What is right already is not touched, so that a record that says what it should is not written again.
"""

from __future__ import annotations

import copy
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from snaptree.errors import ToolError, UnhealthyError
from snaptree.paths import canonical

NAMESPACES = {"domain": "urn:snaptree:domain:1", "record": "urn:snaptree:record:1"}
"""Those of the elements which snaptree keeps in ``<metadata>``: libvirt keeps one element of each namespace."""
FORMATS = ("qcow2", "raw")
_OF_ONE_FILE = ("file", "dev", "pool", "volume", "mode", "fdgroup", "index")
_WITHIN_ONE_FILE = ("slices", "encryption", "reservations", "dataStore", "privateData")
"""Attributes and children of a ``<source>`` that name or describe the one file; the disk's own (``startupPolicy``,
``seclabel``) go with it to another one."""
Element = Any
"""An element of lxml's; its types are as loose."""
Resolve = Callable[[str, str], str | None]
"""Gives the path of a volume of a storage pool: empty for one on network storage, ``None`` for one not found."""


def etree() -> Any:
    """lxml, which is loaded only when there is XML to read.

    :raise ToolError: it is not installed.
    """
    try:
        from lxml import etree as found
    except ImportError as error:
        raise ToolError("lxml is not installed, and libvirt's XML needs it", "install snaptree[libvirt]") from error
    return found


def parse(text: str, what: str) -> Element:
    """The root element of an XML text.

    :param what: what it is, for the message.
    :raise UnhealthyError: it is not XML.
    """
    parser = etree().XMLParser(resolve_entities=False, no_network=True, load_dtd=False, remove_blank_text=True)
    try:
        return etree().fromstring(text.encode(), parser)
    except etree().XMLSyntaxError as error:
        raise UnhealthyError(f"{what} is not XML: {error}") from error


def text_of(element: Element) -> str:
    """The element as text."""
    return str(etree().tostring(element, pretty_print=True, encoding="unicode"))


def same(one: Element, other: Element) -> bool:
    """Whether two elements say the same."""
    return bool(etree().tostring(one, method="c14n") == etree().tostring(other, method="c14n"))


def clone(element: Element) -> Element:
    """A copy of the element that stands by itself."""
    return copy.deepcopy(element)


# ---- disks --------------------------------------------------------------------------------------------------------


def disks(domain: Element | None) -> Iterator[tuple[str, Element]]:
    """The disks of a ``<domain>`` (or ``<inactiveDomain>``) by target."""
    for disk in domain.findall("devices/disk") if domain is not None else ():
        target = disk.find("target")
        if target is not None and target.get("dev"):
            yield target.get("dev"), disk


def out_of_order(domain: Element) -> str | None:
    """A disk of a running ``<domain>`` that libvirt 11.3 takes for another one when it takes a snapshot of them.

    It goes by their numbers in its own list and in a copy, and the copy is sorted: within each bus by the target. One
    that was defined without a bus has been put into the list before the bus was known.
    """
    copied: list[tuple[str, tuple[int, str]]] = []
    found: list[tuple[str, tuple[int, str]]] = []
    names: list[str] = []
    for name, disk in disks(domain):
        bus = disk.find("target").get("bus", "")
        letters = name.removeprefix("x")[2:].rstrip("0123456789")
        each = (bus, (len(letters), letters))
        found.append(each)
        names.append(name)
        same = [at for at, other in enumerate(copied) if other[0] == bus]
        later = [at for at in same if copied[at][1] > each[1]]
        copied.insert(later[0] if later else same[-1] + 1 if same else len(copied), each)
    return next((name for name, one, other in zip(names, found, copied, strict=True) if one != other), None)


def path_of(disk: Element, resolve: Resolve) -> str | None:
    """The canonical path of the file that a disk, of a domain or of a record, begins on; ``None`` for other sources."""
    source = disk.find("source")
    if source is None:
        return None
    path = source.get("file") or source.get("dev")
    if path is None and source.get("volume") is not None and source.get("pool") is not None:
        path = resolve(source.get("pool"), source.get("volume"))
    return canonical(path) if path else None


def lost_volumes(domain: Element | None, resolve: Resolve) -> tuple[tuple[str, str], ...]:
    """The volumes of a ``<domain>``'s disks that cannot be found, as pool and name: their pool is not active, say.

    What is left alone whatever it is, such as a CD-ROM that has been thrown away since, is not looked for.
    """
    sources = [disk.find("source") for _, disk in disks(domain) if not _why_never(disk)]
    named = [(each.get("pool"), each.get("volume")) for each in sources if each is not None]
    return tuple((pool, name) for pool, name in named if pool and name and resolve(pool, name) is None)


def format_of(disk: Element) -> str:
    """The image format that a disk is given; libvirt takes one that has none for raw."""
    driver = disk.find("driver")
    return (driver.get("type") if driver is not None else None) or "raw"


def why_left(disk: Element, resolve: Resolve) -> str:
    """Why a domain's disk is none that snaptree looks after; empty where it is."""
    if why := _why_never(disk):
        return why
    if path_of(disk, resolve) is None:
        source = disk.find("source")
        pool, volume = (source.get("pool"), source.get("volume")) if source is not None else (None, None)
        if pool and volume and resolve(pool, volume) == "":
            return f"it is on network storage (pool {pool!r})"
        return f"its source is no file that can be found (type {disk.get('type', 'file')!r})"
    if format_of(disk) not in FORMATS:
        return f"its format is {format_of(disk)}, and only qcow2 and raw are handled"
    if format_of(disk) == "raw" and any(disk.find(each) is not None for each in ("encryption", "source/encryption")):
        # Of a qcow2 image its header says so.
        return "it is encrypted"
    return ""


def _why_never(disk: Element) -> str:
    """The same, as far as it has nothing to do with the file."""
    device = disk.get("device", "disk")
    if device != "disk":
        return {"cdrom": "it is a CD-ROM", "floppy": "it is a floppy", "lun": "it is passed through raw"}.get(
            device, f"it is a {device}"
        )
    if disk.find("readonly") is not None:
        return "it is read-only"
    if disk.find("shareable") is not None:
        return "other machines share it"
    if disk.find("transient") is not None:
        return "what is written to it goes when the machine stops"
    if disk.get("type") == "network":
        source = disk.find("source")
        protocol = source.get("protocol") if source is not None else None
        return f"it is on network storage ({protocol or 'of some kind'})"
    if disk.find("source/slices") is not None:
        return "it is a slice of a file"
    return ""


def has_tpm(domain: Element) -> bool:
    """Whether a domain has a TPM that libvirt emulates, and keeps what that holds."""
    return domain.find("devices/tpm/backend[@type='emulator']") is not None


def variables_of(domain: Element) -> tuple[str | None, str]:
    """The file with a domain's UEFI variables, and why they are left alone where they are not in a file.

    libvirt has two forms for it: the path as text, and a ``<source>`` as disks have.
    """
    element = domain.find("os/nvram")
    if element is None:
        return None, ""
    source = element.find("source")
    if source is None:
        return (element.text or "").strip() or None, ""
    kind = element.get("type", "file")
    return source.get("file"), "" if kind == "file" else f"they are in no file (type {kind!r})"


def is_taken(element: Element, domain: Element) -> bool:
    """Whether a place that a device would have, an ``<address>`` or a ``<boot>`` order, is another's in the domain.

    libvirt takes no definition with one of them twice, nor with orders beside ``<os><boot>``, and finds an address for
    what has none.
    """
    if element.tag not in ("address", "boot"):
        return False
    if element.tag == "boot" and domain.find("os/boot") is not None:
        return True
    return any(_place(each) == _place(element) for each in domain.iterfind(f"devices/*/{element.tag}"))


def _place(element: Element) -> tuple[str, ...]:
    """What no two devices have: a function on a PCI bus, a place on one kind of disk controller, a turn in booting."""
    said = element.attrib
    if element.tag == "boot":
        return (said.get("order", ""),)
    if said.get("type") == "pci":
        return tuple(str(int(said.get(each, "0"), 0)) for each in ("domain", "bus", "slot", "function"))
    target = element.getparent().find("target")
    bus = target.get("bus", "") if target is not None else ""
    return (bus, *(f"{key}={value}" for key, value in sorted(said.items())))


def strip_chain(disk: Element) -> None:
    """Take away what libvirt has noted of the chain beneath a disk: it would believe that rather than the headers."""
    for each in disk.findall("backingStore"):
        disk.remove(each)


def put_source(disk: Element, path: str, image_format: str, resolve: Resolve) -> None:
    """Let a disk begin on the file; one that does already keeps the name by which it does.

    What else its source says stays, but for what is of the file that it began on.
    """
    driver = disk.find("driver")
    if driver is None:
        driver = etree().Element("driver", name="qemu")
        disk.insert(0, driver)
    if format_of(disk) != image_format:
        driver.set("type", image_format)
    strip_chain(disk)
    if path_of(disk, resolve) == path:
        return
    source = disk.find("source")
    fresh = clone(source) if source is not None else etree().Element("source")
    for name in _OF_ONE_FILE:
        fresh.attrib.pop(name, None)
    for each in [each for each in fresh if each.tag in _WITHIN_ONE_FILE]:
        fresh.remove(each)
    if os.path.exists(path) and not os.path.isfile(path):
        disk.set("type", "block")
        fresh.set("dev", path)
    else:
        disk.set("type", "file")
        fresh.set("file", path)
    if source is None:
        driver.addnext(fresh)
    else:
        disk.replace(source, fresh)


def copied_disk(overlay: str, chain: Sequence[tuple[str, str]]) -> Element:
    """The disk that a block copy writes to: an overlay, and the files that it stands on, to the last."""
    disk = etree().Element("disk")
    _put_file(disk, overlay)
    etree().SubElement(disk, "driver", name="qemu", type="qcow2")
    at = disk
    for path, image_format in chain:
        at = etree().SubElement(at, "backingStore")
        _put_file(at, path)
        etree().SubElement(at, "format", type=image_format)
    etree().SubElement(at, "backingStore")
    return disk


def _put_file(element: Element, path: str) -> None:
    block = stat.S_ISBLK(os.stat(path).st_mode)
    element.set("type", "block" if block else "file")
    etree().SubElement(element, "source", **{"dev" if block else "file": path})


# ---- small things -------------------------------------------------------------------------------------------------


def put_text(parent: Element, tag: str, text: str | None, *, after: str | None = None) -> None:
    """Let the parent have a child with the text, or none of that tag."""
    child = parent.find(tag)
    if text is None:
        if child is not None:
            parent.remove(child)
        return
    if child is None:
        child = etree().Element(tag)
        place = parent.find(after) if after is not None else None
        if place is not None:
            place.addnext(child)
        else:
            parent.append(child)
    if (child.text or "") != text:
        child.text = text


def own(domain: Element | None, tag: str) -> Element | None:
    """What snaptree keeps under the tag in the metadata of a ``<domain>``."""
    return domain.find(f"metadata/{{{NAMESPACES[tag]}}}{tag}") if domain is not None else None


def children(element: Element, tag: str) -> list[Element]:
    """The children of an element of snaptree's."""
    return list(element.findall(f"{{{etree().QName(element).namespace}}}{tag}"))


def put_own(domain: Element, tag: str, element: Element | None) -> None:
    """Keep an element, or none, in the metadata of a ``<domain>``."""
    before = own(domain, tag)
    if before is not None and element is not None and same(before, element):
        return
    metadata = domain.find("metadata")
    if before is not None:
        metadata.remove(before)
    if element is None:
        if metadata is not None and len(metadata) == 0:
            domain.remove(metadata)
        return
    if metadata is None:
        metadata = etree().Element("metadata")
        place = domain.find("uuid")
        if place is not None:
            place.addnext(metadata)
        else:
            domain.append(metadata)
    metadata.append(element)


def new_own(tag: str, **attributes: str) -> Element:
    """A new element of snaptree's for ``<metadata>``."""
    found = etree().Element(f"{{{NAMESPACES[tag]}}}{tag}", nsmap={f"snaptree-{tag}": NAMESPACES[tag]})
    for key, value in attributes.items():
        found.set(key, value)
    return found


def plain(element: Element) -> str:
    """An element of snaptree's as libvirt takes it by itself: it adds the namespace."""
    found = clone(element)
    for each in found.iter():
        each.tag = etree().QName(each).localname
    etree().cleanup_namespaces(found)
    return text_of(found)


def add_own(parent: Element, tag: str, **attributes: str) -> None:
    """Add a child to an element of snaptree's."""
    child = etree().SubElement(parent, f"{{{etree().QName(parent).namespace}}}{tag}")
    for key, value in attributes.items():
        child.set(key, value)
