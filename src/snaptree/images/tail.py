"""What the last cluster of a qcow2 image holds past the end of the disk.

QEMU leaves it there when it shrinks an image, and shows it again when it grows it.
Source: the qcow2 specification, ``docs/interop/qcow2.txt`` of QEMU, "Cluster mapping".
"""

from __future__ import annotations

import os
import struct

from snaptree.images import durable
from snaptree.images.facts import open_to_read
from snaptree.images.header import Header, read_header

_OFFSET = 0x00FFFFFFFFFFFE00
_COPIED, _COMPRESSED, _ZERO = 1 << 63, 1 << 62, 1


def zero_tail(path: str) -> None:
    """Zero what the last cluster holds past the end of the disk; what the image shows stays the same.

    A cluster that cannot be written in place, compressed or shared with an internal snapshot, is left as it is. What is
    written is not synced yet. Of an encrypted image these would be no zeroes to QEMU.
    """
    with durable.opened_for_writing(path) as descriptor:
        header = read_header(descriptor, path)
        inside = header.virtual_size % header.cluster_size
        if place := _last_place(descriptor, header, header.virtual_size):
            durable.write_in_place(descriptor, place + inside, bytes(header.cluster_size - inside), path)


def range_past(path: str, end: int) -> list[tuple[int, int]]:
    """Where an image that is to end there shows something in the last cluster past that: ``(start, length)``, if so."""
    descriptor = open_to_read(path)
    try:
        header = read_header(descriptor, path)
        stop = min(-(-end // header.cluster_size) * header.cluster_size, header.virtual_size)
        return [(end, stop - end)] if end < stop and _last_place(descriptor, header, end) else []
    finally:
        os.close(descriptor)


def _last_place(descriptor: int, header: Header, end: int) -> int:
    """Where in the file the cluster is in which a disk ends; 0 when it cannot be written in place, or ends there."""
    entry = _last_entry(descriptor, header, end) if end % header.cluster_size else 0
    zero = header.version >= 3 and not header.extended_l2 and entry & _ZERO
    return 0 if zero or entry & _COMPRESSED or not entry & _COPIED else entry & _OFFSET


def _last_entry(descriptor: int, header: Header, end: int) -> int:
    """The L2 entry of the cluster in which a disk ends; 0 when nothing is allocated there."""
    width = 16 if header.extended_l2 else 8
    table, index = divmod(end // header.cluster_size, header.cluster_size // width)
    l2 = _entry(descriptor, header.l1_table_offset + table * 8) & _OFFSET if table < header.l1_size else 0
    return _entry(descriptor, l2 + index * width) if l2 else 0


def _entry(descriptor: int, offset: int) -> int:
    data = os.pread(descriptor, 8, offset)
    found: int = struct.unpack(">Q", data)[0] if len(data) == 8 else 0
    return found
