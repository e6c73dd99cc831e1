"""What merging a row of layers would cost, whoever does it: the mover, or QEMU's jobs where the mover cannot."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from snaptree.images.measure import measure_row
from snaptree.images.mover import sharing
from snaptree.images.mover.mapping import (
    COPY,
    MIX,
    WINDOW_GRANULES,
    ZEROES,
    Mapping,
    Mask,
    Window,
    look_at_point,
    opened,
)
from snaptree.images.rights import can_give
from snaptree.images.tables import COMPRESSED, COPIED_BIT, DATA, OFFSET, Allocation, Qcow2Allocation
from snaptree.model.survey import PointFacts, RowFacts

File = tuple[str, str]
_FINE = 4096


class _Packed(Exception):
    """Compressed clusters are among what would move."""


class _Sum(Struct):
    """What moving into one of the layers adds up to."""

    copied: int = 0
    mixed: int = 0
    zeroes: int = 0
    grows: int = 0
    tables: int = 0
    extents: int = 0
    beneath: bool = False


def foreseen(layers: Sequence[File], below: Sequence[File] = ()) -> RowFacts:
    """Count what merging the row moves. ``SNAPTREE_MOVER=qemu`` in the environment leaves all of it to QEMU.

    :param layers: ``(path, format)``, lowest first.
    :param below: what the lowest stands on, nearest first.
    :raise UnhealthyError: a table is damaged.
    """
    with opened([*reversed(below), *layers]) as chain:
        row = chain[len(below) :]
        why = "SNAPTREE_MOVER=qemu" if os.environ.get("SNAPTREE_MOVER") == "qemu" else _beyond_the_mover(row)
        if not why:
            try:
                return _count(chain, row, layers)
            except _Packed:
                why = "some of what moves is compressed"
    return replace(measure_row(layers, below), by_qemu=why, unshared=why)


def foreseen_point(path: str, tag: str) -> PointFacts:
    """Count what making a layer out of an internal snapshot takes.

    :raise UnhealthyError: a table is damaged.
    """
    with opened([(path, "qcow2")]) as (image,):
        assert isinstance(image, Qcow2Allocation)
        look_at_point(image, tag)
        why = "SNAPTREE_MOVER=qemu" if os.environ.get("SNAPTREE_MOVER") == "qemu" else _beyond_the_mover([image])
        data, tables, unit = 0, 0, image.cluster
        span = max(WINDOW_GRANULES // image.per_table, 1) * image.per_table * unit
        for number in sorted(image.busy(span)):
            start = number * span
            end = min(start + span, -(-image.virtual_size // unit) * unit)
            if start >= end:
                continue
            found = image.classes(start, end, image.granule)
            if not why and np.any(found == COMPRESSED):
                why = "some of it is compressed"
            data += int(((found == DATA) | (found == COMPRESSED)).sum()) * image.granule
            tables += int(np.count_nonzero(image.table_there(start, end)))
        last = image.virtual_size // unit * unit
        tail = last < image.virtual_size and image.classes(last, last + unit, image.granule)[0] == DATA
        return PointFacts(
            bytes=data,
            tables=(tables + 1 + data // unit * image.header.refcount_bits // 8 // unit) * unit,
            by_qemu=why,
            unshared=why or _unshared([image], [(path, "qcow2")]),
            share_bytes=unit if tail else 0,
        )


def _beyond_the_mover(row: Sequence[Allocation]) -> str:
    for each in row:
        if isinstance(each, Qcow2Allocation) and each.header.extended_l2:
            return f"{each.path} has extended L2 entries"
        if isinstance(each, Qcow2Allocation) and each.header.encrypted:
            return f"{each.path} is encrypted"
    return ""


def _count(chain: Sequence[Allocation], row: Sequence[Allocation], layers: Sequence[File]) -> RowFacts:
    below = chain[: len(chain) - len(row)]
    down, up = (_sum(Mapping(row, into, below[-1].virtual_size if below else 0), below) for into in (0, len(row) - 1))
    return RowFacts(
        commit_bytes=down.copied + down.mixed,
        commit_zeroes=down.zeroes,
        commit_grows=down.grows + down.tables,
        pull_bytes=up.copied + up.mixed,
        pull_grows=up.grows + up.tables,
        extents=(down.extents, up.extents),
        unshared=_unshared(row, layers) or _not_ours(row),
        share_bytes=(down.mixed, up.mixed),
        share_grows=(down.tables + down.mixed, up.tables + up.mixed),
    )


def _unshared(row: Sequence[Allocation], layers: Sequence[File]) -> str:
    """Why the row cannot be merged by sharing blocks; empty if it can."""
    paths = [path for path, _ in layers]
    if len({os.fstat(each.descriptor).st_dev for each in row}) > 1:
        return f"{paths[0]} and {paths[-1]} are on different file systems"
    block = sharing.block_size(paths[0])
    for each in row:
        if isinstance(each, Qcow2Allocation) and each.cluster < block:
            return f"{each.path} has clusters of {each.cluster} bytes, and the file system blocks of {block}"
    if len({sharing.copies_on_write(each.descriptor) for each in row}) > 1:
        return "one of the files is not copied on write (chattr +C), and another is"
    if not all(sharing.can_share(folder) for folder in dict.fromkeys(map(os.path.dirname, paths))):
        return f"the file system of {paths[0]} cannot share blocks between files"
    return ""


def _not_ours(row: Sequence[Allocation]) -> str:
    """Why a new file cannot take the place of one of the row, as sharing needs: it would be another user's."""
    for each in (row[0], row[-1]):
        if not can_give(os.fstat(each.descriptor)):
            return f"{each.path} belongs to another user or group, and what would take its place would not"
    return ""


def _sum(mapping: Mapping, below: Sequence[Allocation]) -> _Sum:
    total = _Sum()
    target = mapping.target
    last: tuple[int, int] | None = None
    tables: set[int] = set()
    for window in mapping.windows():
        if window.packed or _packed_beneath(mapping, window, below):
            raise _Packed
        copies, mixed = window.kinds == COPY, window.kinds == MIX
        total.copied += int(copies.sum()) * mapping.unit
        total.mixed += int(mixed.sum()) * mapping.unit
        total.zeroes += int((window.kinds == ZEROES).sum()) * mapping.unit
        if copies.any():
            last = _add_extents(total, mapping, window, copies, last)
        if isinstance(target, Qcow2Allocation):
            held = ((window.entries & OFFSET) != 0) & ((window.entries & COPIED_BIT) != 0)
            total.grows += int(((copies | mixed) & ~held).sum()) * mapping.unit
            changed = np.flatnonzero(((copies | mixed) & ~held) | (window.kinds == ZEROES))
            numbers = (window.start // mapping.unit + changed) // target.per_table
            # (numpy's unique loads numpy.ma, which takes 16 ms.)
            tables.update(number for number in set(numbers.tolist()) if not _there(target, number))
        else:
            total.grows += _holes(mapping, window, copies | mixed)
    if isinstance(target, Qcow2Allocation):
        total.tables = _tables(target, mapping.size, total.grows // target.cluster, len(tables)) * target.cluster
    return total


def _there(target: Qcow2Allocation, number: int) -> bool:
    """Whether there is a table that can be changed where it is; an internal snapshot may need it as it is."""
    return number < len(target.l1) and bool(target.l1[number]) and bool(target.own_tables[number])


def _tables(target: Qcow2Allocation, size: int, clusters: int, tables: int) -> int:
    """How many clusters of tables come with so many of data and so many L2 tables, on a disk of that size."""
    header, unit = target.header, target.cluster
    entries = -(-size // (target.per_table * unit))
    tables += -(-entries * 8 // unit) if entries > len(target.l1) else 0
    if not clusters and not tables:
        return 0
    per_block = unit * 8 // header.refcount_bits
    blocks = -(-(clusters + tables) // per_block) + 1
    needed = -(-(-(-target.file_size // unit) + clusters + tables + blocks) // per_block) + 1
    if needed > header.refcount_table_clusters * unit // 8:
        # The mover makes a table with room for twice as much.
        blocks += -(-needed * 2 * 8 // unit) + 1
    return tables + blocks


def _add_extents(
    total: _Sum, mapping: Mapping, window: Window, copies: Mask, last: tuple[int, int] | None
) -> tuple[int, int]:
    """Count the runs in the files that the data comes from, as the mover takes them; where the last one ends."""
    order = np.lexsort((window.places[copies], window.layers[copies]))
    layers, places = window.layers[copies][order], window.places[copies][order]
    unit = np.uint64(mapping.unit)
    breaks = (layers[1:] != layers[:-1]) | (places[1:] != places[:-1] + unit)
    joined = last == (int(layers[0]), int(places[0]))
    total.extents += int(np.count_nonzero(breaks)) + (0 if joined else 1)
    return int(layers[-1]), int(places[-1]) + mapping.unit


def _packed_beneath(mapping: Mapping, window: Window, below: Sequence[Allocation]) -> bool:
    """Whether a cluster that is put together shows something of what the row stands on that only QEMU can read."""
    wanted = np.flatnonzero(window.beneath)
    if not below or not len(wanted):
        return False
    if _beyond_the_mover(below):
        return True
    for each in below:
        for number in wanted.tolist():
            start = (window.start + number * mapping.unit) // each.cluster * each.cluster
            end = -(-(window.start + (number + 1) * mapping.unit) // each.cluster) * each.cluster
            if start < each.virtual_size and np.any(each.classes(start, end, each.granule) == COMPRESSED):
                return True
    return False


def _holes(mapping: Mapping, window: Window, given: Mask) -> int:
    """How much of what a raw file gets lies in its holes, in bytes."""
    end = window.start + len(window.kinds) * mapping.unit
    fine = min(_FINE, mapping.unit)
    free = mapping.target.classes(window.start, end, fine) != DATA
    return int((free & np.repeat(given, mapping.unit // fine)).sum()) * fine
