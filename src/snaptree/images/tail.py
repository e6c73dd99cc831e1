"""What the last cluster of a qcow2 image holds past the end of the disk.

QEMU leaves it there when it shrinks an image, and shows it again when it grows it.
Source: the qcow2 specification, ``docs/interop/qcow2.txt`` of QEMU, "Cluster mapping".
"""

from __future__ import annotations

import os
import struct

from snaptree.images import durable
from snaptree.images.header import Header, read_header

_OFFSET = 0x00FFFFFFFFFFFE00
_COPIED, _COMPRESSED, _ZERO = 1 << 63, 1 << 62, 1


def zero_tail(path: str) -> None:
    """Zero what the last cluster holds past the end of the disk; what the image shows stays the same.

    A cluster that cannot be written in place, compressed or shared with an internal snapshot, is left as it is. What is
    written is not synced yet.
    """
    with durable.opened_for_writing(path) as descriptor:
        header = read_header(descriptor, path)
        inside = header.virtual_size % header.cluster_size
        entry = _last_entry(descriptor, header) if inside else 0
        place = entry & _OFFSET
        zero = header.version >= 3 and not header.extended_l2 and entry & _ZERO
        if not place or zero or entry & _COMPRESSED or not entry & _COPIED:
            return
        durable.write_in_place(descriptor, place + inside, bytes(header.cluster_size - inside), path)


def _last_entry(descriptor: int, header: Header) -> int:
    """The L2 entry of the cluster in which the disk ends; 0 when nothing is allocated there."""
    width = 16 if header.extended_l2 else 8
    table, index = divmod(header.virtual_size // header.cluster_size, header.cluster_size // width)
    l2 = _entry(descriptor, header.l1_table_offset + table * 8) & _OFFSET if table < header.l1_size else 0
    return _entry(descriptor, l2 + index * width) if l2 else 0


def _entry(descriptor: int, offset: int) -> int:
    data = os.pread(descriptor, 8, offset)
    found: int = struct.unpack(">Q", data)[0] if len(data) == 8 else 0
    return found
