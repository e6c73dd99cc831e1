"""Writing another backing name into a header, so that a crash leaves the old or the new one.

Source: the qcow2 specification, ``docs/interop/qcow2.txt`` of QEMU.
"""

from __future__ import annotations

import os
import struct

from msgspec import Struct

from snaptree.errors import RefusedError
from snaptree.images.header import EXTENSION_BACKING_FORMAT, MAX_BACKING_NAME, Header, read_header

SECTOR = 512


class RepointWrites(Struct, frozen=True):
    """The writes that change a backing name, each to be synced before the next.

    ``atomic``: each is harmless until the last, which lies within one sector. Otherwise ``redo`` (the whole new head of
    the file) has to be kept somewhere before the first write, to be written again after a power cut.
    """

    writes: tuple[tuple[int, bytes], ...]
    atomic: bool
    redo: bytes

    def ordered(self) -> tuple[tuple[int, bytes], ...]:
        """The writes, in the order in which they have to reach the disk."""
        return self.writes


def repoint_writes(descriptor: int, path: str, name: str | None, image_format: str | None) -> RepointWrites | None:
    """What has to be written so that the image names another backing file (or none); ``None`` when it does already.

    :raise RefusedError: the name does not fit into the first cluster.
    """
    header = read_header(descriptor, path)
    if header.backing == name and (name is None or header.backing_format == image_format):
        return None
    if name is not None and (not name or "\0" in name):
        raise RefusedError(f"{name!r} cannot be the name of a backing file of {path}", "use a plain file name")
    old = os.pread(descriptor, header.cluster_size, 0).ljust(header.cluster_size, b"\0")
    return _in_place(header, old, path, name, image_format) or _rearranged(header, old, path, name, image_format)


def _in_place(
    header: Header, old: bytes, path: str, name: str | None, image_format: str | None
) -> RepointWrites | None:
    """The way without a journal: the name goes to a free place, then one sector says so."""
    if not _terminated(header, old):
        # Nothing but the old name ends the extensions; without it what follows would be taken for one.
        return None
    new = _new_sector(header, old, name, image_format)
    if new is None:
        return None
    sector, reserved = new
    if name is None:
        sector[8:20] = bytes(12)
        return RepointWrites(((0, bytes(sector)),), True, b"")
    data = os.fsencode(name)
    taken = (header.backing_offset, header.backing_offset + len(os.fsencode(header.backing or "")))
    place = _free_place(header, taken, reserved, len(data))
    if place is None or len(data) > MAX_BACKING_NAME:
        return None
    if place < SECTOR:
        # Part of the name may lie in the sector that is written last: it has to be the same in both writes.
        inside = data[: SECTOR - place]
        sector[place : place + len(inside)] = inside
    sector[8:20] = struct.pack(">QI", place, len(data))
    return RepointWrites(((place, data), (0, bytes(sector))), True, b"")


def _terminated(header: Header, old: bytes) -> bool:
    """Whether an end mark follows the last extension."""
    at = header.header_length
    for _, _, data in header.extensions:
        at += 8 + _padded(len(data))
    return header.extensions_end == at + 8 and old[at : at + 4] == bytes(4)


def _new_sector(header: Header, old: bytes, name: str | None, image_format: str | None) -> tuple[bytearray, int] | None:
    """The first sector with the new format, and where what it says about extensions ends.

    ``None`` when the format cannot be said by changing this sector only.
    """
    sector = bytearray(old[:SECTOR])
    if image_format == header.backing_format or (name is None and header.backing_format is not None):
        # Without a backing file its format says nothing, and may stay.
        return sector, header.extensions_end
    found = next(((at, data) for magic, at, data in header.extensions if magic == EXTENSION_BACKING_FORMAT), None)
    if found is not None and image_format is not None:
        at, data = found
        value = image_format.encode("ascii")
        room = _padded(len(data))
        if at + room <= SECTOR and _padded(len(value)) == room:
            sector[at - 4 : at + room] = struct.pack(">I", len(value)) + value.ljust(room, b"\0")
            return sector, header.extensions_end
    # All extensions anew, when they fit into the sector; what they leave behind them is past the end mark.
    extensions = _extensions(header, image_format)
    end = header.header_length + len(extensions)
    if end > SECTOR:
        return None
    sector[header.header_length : end] = extensions
    return sector, end


def _free_place(header: Header, taken: tuple[int, int], reserved: int, length: int) -> int | None:
    """Where in the first cluster a name of that length overlaps neither extensions, old or new, nor the old name."""
    start = max(header.extensions_end, reserved)
    if taken[0] == 0:
        return start if start + length <= header.cluster_size else None
    if start + length <= taken[0]:
        return start
    after = max(start, _padded(taken[1]))
    return after if after + length <= header.cluster_size else None


def _padded(length: int) -> int:
    return -(-length // 8) * 8


def _extensions(header: Header, image_format: str | None) -> bytes:
    """All header extensions with the end mark: the backing format first, the others as they are."""
    extensions = b""
    if image_format is not None:
        value = image_format.encode("ascii")
        extensions += struct.pack(">II", EXTENSION_BACKING_FORMAT, len(value)) + value.ljust(_padded(len(value)), b"\0")
    for magic, _, data in header.extensions:
        if magic != EXTENSION_BACKING_FORMAT:
            extensions += struct.pack(">II", magic, len(data)) + data.ljust(_padded(len(data)), b"\0")
    return extensions + bytes(8)


def _rearranged(header: Header, old: bytes, path: str, name: str | None, image_format: str | None) -> RepointWrites:
    """The whole head of the file anew, with all other extensions kept."""
    extensions = _extensions(header, image_format)
    place = header.header_length + len(extensions)
    data = os.fsencode(name) if name is not None else b""
    if len(data) > MAX_BACKING_NAME or place + len(data) > header.cluster_size:
        raise RefusedError(
            f"the backing file name {name!r} does not fit into the header of {path}", "move the files to a shorter path"
        )
    head = bytearray(old[: header.header_length])
    head[8:20] = struct.pack(">QI", place if data else 0, len(data))
    redo = (bytes(head) + extensions + data).ljust(min(len(old), max(SECTOR, place + len(data))), b"\0")
    return RepointWrites(((0, redo),), False, redo)
