"""Writing another backing name into a header, so that a crash leaves the old or the new one.

Source: the qcow2 specification, ``docs/interop/qcow2.txt`` of QEMU.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from snaptree.errors import RefusedError
from snaptree.images.header import EXTENSION_BACKING_FORMAT, MAX_BACKING_NAME, Header, read_header

SECTOR = 512


@dataclass(frozen=True, slots=True)
class RepointWrites:
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
    if header.backing == name and header.backing_format == image_format:
        return None
    old = os.pread(descriptor, header.cluster_size, 0).ljust(header.cluster_size, b"\0")
    return _in_place(header, old, path, name, image_format) or _rearranged(header, old, path, name, image_format)


def _in_place(
    header: Header, old: bytes, path: str, name: str | None, image_format: str | None
) -> RepointWrites | None:
    """The way without rearranging: the name goes to a free place, then one sector says so."""
    found = next(((at, data) for magic, at, data in header.extensions if magic == EXTENSION_BACKING_FORMAT), None)
    sector = bytearray(old[:SECTOR])
    if image_format != header.backing_format:
        if image_format is None or found is None:
            return None
        at, data = found
        value = image_format.encode("ascii")
        room = -(-len(data) // 8) * 8
        if at + room > SECTOR or -(-len(value) // 8) * 8 != room:
            return None
        sector[at - 4 : at + room] = struct.pack(">I", len(value)) + value.ljust(room, b"\0")
    if name is None:
        sector[8:20] = bytes(12)
        return RepointWrites(((0, bytes(sector)),), True, b"")
    data = os.fsencode(name)
    taken = (header.backing_offset, header.backing_offset + len(os.fsencode(header.backing or "")))
    place = _free_place(header, taken, len(data))
    if place is None or len(data) > MAX_BACKING_NAME:
        return None
    if place < SECTOR:
        # Part of the name may lie in the sector that is written last: it has to be the same in both writes.
        inside = data[: SECTOR - place]
        sector[place : place + len(inside)] = inside
    sector[8:20] = struct.pack(">QI", place, len(data))
    return RepointWrites(((place, data), (0, bytes(sector))), True, b"")


def _free_place(header: Header, taken: tuple[int, int], length: int) -> int | None:
    """Where in the first cluster a name of that length overlaps neither the extensions nor the old name."""
    start = header.extensions_end
    if taken[0] == 0:
        return start if start + length <= header.cluster_size else None
    if start + length <= taken[0]:
        return start
    after = (taken[1] + 7) & ~7
    return after if after + length <= header.cluster_size else None


def _rearranged(header: Header, old: bytes, path: str, name: str | None, image_format: str | None) -> RepointWrites:
    """The whole head of the file anew, with all other extensions kept."""
    extensions = b""
    if image_format is not None:
        value = image_format.encode("ascii")
        padded = value.ljust(-(-len(value) // 8) * 8, b"\0")
        extensions += struct.pack(">II", EXTENSION_BACKING_FORMAT, len(value)) + padded
    for magic, _, data in header.extensions:
        if magic != EXTENSION_BACKING_FORMAT:
            extensions += struct.pack(">II", magic, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")
    extensions += bytes(8)
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
