"""Giving room back to the file system: clusters of a qcow2 image that nothing in it refers to.

QEMU would punch them itself (``discard=unmap`` on the file), but when an fsync fails it frees, and so punches, a table
that it has just made the image use. Here it only frees; the holes are punched when all is on disk and has gone well.
Source: the qcow2 specification, ``docs/interop/qcow2.txt`` of QEMU, "Host cluster management".
"""

from __future__ import annotations

import os

import numpy as np

from snaptree.images import durable
from snaptree.images.header import Header, read_header, read_internals
from snaptree.images.mover.refcounts import Numbers, decode
from snaptree.images.tables import COMPRESSED_BIT, OFFSET, words_of

_RUNS = 1 << 20
"""So many holes are punched at most."""
_LOOKED_THROUGH = 4 << 30
"""So many bytes of tables are looked through: with the usual clusters they stand for 32 TiB of data."""


def punch_free(path: str) -> int:
    """Punch holes where no reference counts anything; how many bytes were free.

    What the image shows does not change: on disk a count falls to zero only after the last reference has gone. Where
    counts are wrong, because of a crash under an unsafe cache, say, all stays as it is: "qemu-img check" can mend it.
    The exclusive lock on the image has to be held.
    """
    freed = 0
    with durable.opened_for_writing(path) as descriptor:
        header = read_header(descriptor, path)
        if header.dirty or header.corrupt or header.external_data:
            return 0  # The counts may be stale.
        free = _all_free(descriptor, header, os.fstat(descriptor).st_size)
        if not len(free) or _is_used(descriptor, header, path, free):
            return 0
        for start, end in free.tolist():
            durable.punch_hole(descriptor, start, end - start, path)
            freed += end - start
        # The file has another time now, by which it is known; that must not be taken back.
        durable.sync(descriptor, path)
    return freed


def _all_free(descriptor: int, header: Header, size: int) -> Numbers:
    """The runs that the counts say are free, as rows of first byte and end; no more than are reasonable."""
    per_block = header.cluster_size * 8 // header.refcount_bits
    table = os.pread(descriptor, header.refcount_table_clusters * header.cluster_size, header.refcount_table_offset)
    found: list[tuple[int, int]] = []
    for number, block in enumerate((words_of(table) & OFFSET).tolist()):
        first = number * per_block * header.cluster_size
        if first >= size or len(found) >= _RUNS:
            break
        if block:
            found += _free(descriptor, header, block, first, size)
    return np.array(found[:_RUNS], dtype=np.uint64).reshape(-1, 2)


def _is_used(descriptor: int, header: Header, path: str, free: Numbers) -> bool:
    """Whether any table refers into these runs: then the counts are wrong, and it is not known what is free.

    So it is taken to be where there is more to look through than is reasonable.
    """
    points = read_internals(descriptor, header, path)
    tables = [(header.l1_table_offset, header.l1_size), *((each.l1_table_offset, each.l1_size) for each in points)]
    if sum(entries for _, entries in tables) * 8 > _LOOKED_THROUGH:
        return True
    parts = [(header.refcount_table_offset, header.refcount_table_clusters * header.cluster_size // 8), *tables]
    places = [np.array([header.snapshots_offset], dtype=np.uint64)]
    deeper: set[int] = set()
    for offset, entries in parts:
        found = words_of(os.pread(descriptor, entries * 8, offset)) & OFFSET
        places += [np.arange(offset, offset + max(entries, 1) * 8, header.cluster_size, dtype=np.uint64), found]
        if (offset, entries) != parts[0]:
            deeper.update(found[found != 0].tolist())
    if _within(np.concatenate(places), free):
        return True
    if len(deeper) * header.cluster_size > _LOOKED_THROUGH:
        return True
    width = 2 if header.extended_l2 else 1
    return any(
        _within(_ends(words_of(os.pread(descriptor, header.cluster_size, each))[::width], header), free)
        for each in sorted(deeper)
    )


def _ends(entries: Numbers, header: Header) -> Numbers:
    """The first and the last place that these L2 entries refer to."""
    packed = (entries & COMPRESSED_BIT) != 0
    plain: Numbers = entries[~packed] & OFFSET
    if not np.any(packed):
        return plain
    bits = np.uint64(62 - (header.cluster_bits - 8))
    first = entries[packed] & ((np.uint64(1) << bits) - np.uint64(1))
    sectors = (entries[packed] & (COMPRESSED_BIT - np.uint64(1))) >> bits
    last = (first // np.uint64(512) + sectors) * np.uint64(512)
    return np.concatenate([plain, first, last])


def _within(places: Numbers, runs: Numbers) -> bool:
    """Whether any of the places lies in one of the runs, which are in order; 0 is none."""
    places = places[places != 0]
    before = np.searchsorted(runs[:, 0], places, side="right")
    places, before = places[before > 0], before[before > 0] - 1
    return bool(np.any(places < runs[before, 1]))


def cut_tail(path: str) -> None:
    """Cut the file where its last counted cluster ends: what was written past it, nothing has come to refer to.

    The counts have to be right, and the exclusive lock on the image held.
    """
    with durable.opened_for_writing(path) as descriptor:
        header = read_header(descriptor, path)
        if header.dirty or header.corrupt or header.external_data:
            return
        table = os.pread(descriptor, header.refcount_table_clusters * header.cluster_size, header.refcount_table_offset)
        blocks = words_of(table) & OFFSET
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
    data = os.pread(descriptor, header.cluster_size, block)
    if len(data) < header.cluster_size:
        return []  # A file that is cut.
    counts = decode(data, header.refcount_bits)
    free = np.concatenate([[False], counts == 0, [False]])
    edges = np.flatnonzero(free[1:] != free[:-1]) * header.cluster_size + first
    pairs = edges.reshape(-1, 2).tolist()
    return [(start, min(end, size)) for start, end in pairs if start < size]
