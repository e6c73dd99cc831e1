"""Giving room back to the file system: clusters of a qcow2 image that nothing in it refers to.

QEMU would punch them itself (``discard=unmap`` on the file), but when an fsync fails it frees, and so punches, a table
that it has just made the image use. Here it only frees; the holes are punched when all is on disk and has gone well.
Source: the qcow2 specification, ``docs/interop/qcow2.txt`` of QEMU, "Host cluster management".
"""

from __future__ import annotations

import os

import numpy as np

from snaptree.images import durable
from snaptree.images.header import Header, read_header
from snaptree.images.refcounts import decode

_OFFSET = 0xFFFFFFFFFFFFFE00


def punch_free(path: str) -> int:
    """Punch holes where no reference counts anything; how many bytes were free.

    What the image shows does not change: on disk a count falls to zero only after the last reference has gone. The
    exclusive lock on the image has to be held.
    """
    freed = 0
    with durable.opened_for_writing(path) as descriptor:
        header = read_header(descriptor, path)
        if header.dirty or header.corrupt or header.external_data:
            return 0  # The counts may be stale.
        size = os.fstat(descriptor).st_size
        per_block = header.cluster_size * 8 // header.refcount_bits
        table = os.pread(descriptor, header.refcount_table_clusters * header.cluster_size, header.refcount_table_offset)
        for number, block in enumerate((np.frombuffer(table, ">u8").astype(np.uint64) & np.uint64(_OFFSET)).tolist()):
            first = number * per_block * header.cluster_size
            if first >= size:
                break
            if not block:
                continue
            for start, end in _free(descriptor, header, block, first, size):
                durable.punch_hole(descriptor, start, end - start, path)
                freed += end - start
        if freed:
            # The file has another time now, by which it is known; that must not be taken back.
            durable.sync(descriptor, path)
    return freed


def cut_tail(path: str) -> None:
    """Cut the file where its last counted cluster ends: what was written past it, nothing has come to refer to.

    The counts have to be right, and the exclusive lock on the image held.
    """
    with durable.opened_for_writing(path) as descriptor:
        header = read_header(descriptor, path)
        if header.dirty or header.corrupt or header.external_data:
            return
        table = os.pread(descriptor, header.refcount_table_clusters * header.cluster_size, header.refcount_table_offset)
        blocks = np.frombuffer(table, ">u8").astype(np.uint64) & np.uint64(_OFFSET)
        for number in np.flatnonzero(blocks)[::-1].tolist():
            counts = decode(os.pread(descriptor, header.cluster_size, int(blocks[number])), header.refcount_bits)
            used = np.flatnonzero(counts)
            if len(used):
                end = (number * len(counts) + int(used[-1]) + 1) * header.cluster_size
                if end < os.fstat(descriptor).st_size:
                    durable.set_length(descriptor, end, path)
                return


def _free(descriptor: int, header: Header, block: int, first: int, size: int) -> list[tuple[int, int]]:
    """The runs of clusters, as byte ranges of the file, that the refcount block says are free."""
    counts = decode(os.pread(descriptor, header.cluster_size, block), header.refcount_bits)
    free = np.concatenate([[False], counts == 0, [False]])
    edges = np.flatnonzero(free[1:] != free[:-1]) * header.cluster_size + first
    pairs = edges.reshape(-1, 2).tolist()
    return [(start, min(end, size)) for start, end in pairs if start < size]
