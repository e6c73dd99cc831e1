"""What merging a row of layers moves, counted from their tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct, field

from snaptree.images.mover.mapping import look_at_point, opened
from snaptree.images.tables import (
    COMPRESSED,
    DATA,
    UNALLOCATED,
    ZERO,
    Allocation,
    Classes,
    Qcow2Allocation,
    RawAllocation,
)
from snaptree.model.survey import RowFacts

WINDOW_GRANULES = 1 << 20
"""So many units of allocation are looked at together: a few mebibytes for each layer."""
STEPS = 256
STREAM_CHUNK = 512 << 10
"""So much QEMU's stream job looks at together (``STREAM_CHUNK`` in ``block/stream.c``)."""
Mask = npt.NDArray[np.bool_]


class _Way(Struct):
    """What one way to merge adds up to."""

    unit: int
    copied: int = 0
    zeroes: int = 0
    grows: int = 0
    extents: int = 0
    last: int = -1
    profile: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(STEPS + 1))


def measure_row(layers: Sequence[tuple[str, str]], below: Sequence[tuple[str, str]] = ()) -> RowFacts:
    """Count what merging the row would move, as QEMU's jobs do it.

    A commit copies in units of the lower file's clusters, from 4 KiB to 64 KiB (the mirror's granularity), a pull in
    whole clusters (or subclusters) of the upper file (copy on read), where data that is all zero becomes zero clusters.

    :param layers: ``(path, format)``, lowest first.
    :param below: what the lowest stands on; it is not read.
    :raise UnhealthyError: a table is damaged.
    """
    with opened(layers) as row:
        return _measure(row, has_below=bool(below))


def _measure(row: Sequence[Allocation], *, has_below: bool) -> RowFacts:
    granule = min(each.granule for each in row)
    largest = max(each.cluster for each in row)
    window = max(WINDOW_GRANULES * granule // largest, 1) * largest
    length = max(each.virtual_size for each in row)
    lowest, top = row[0], row[-1]
    base_unit = lowest.cluster if isinstance(lowest, Qcow2Allocation) else 65536
    down = _Way(unit=max(granule, min(max(base_unit, 4096), 65536)))
    up = _Way(unit=max(granule, top.granule))
    covered = 0
    busy = set().union(*(each.busy(window) for each in row))
    shortest = min(each.virtual_size for each in row)
    busy.update(range(shortest // window, -(-top.virtual_size // window)) if shortest < top.virtual_size else ())
    for number in sorted(busy):
        start = number * window
        end = min(start + window, -(-length // largest) * largest)
        if start >= end:
            continue
        classes = [_seen(each, start, end, granule) for each in row]
        if isinstance(top, Qcow2Allocation) and top.header.version < 3:
            # Version 2 has no zero clusters: what is covered is written out before the rest moves.
            written = _hidden(row, classes, start, granule)
            written = np.repeat(_any(written, top.cluster // granule), top.cluster // granule)[: len(written)]
            written &= classes[-1] == UNALLOCATED
            classes[-1] = np.where(written, DATA, classes[-1]).astype(np.uint8)
            covered += int(written.sum()) * granule
        upper = _topmost(classes[1:])
        # What shows as zeroes past the end of the lowest is zeroes in the top by then (Cover).
        past = np.arange(len(upper)) >= -(-lowest.virtual_size // granule) - start // granule
        upper = np.where((upper == UNALLOCATED) & past, ZERO, upper).astype(np.uint8)
        _count(down, start, granule, length, upper, classes[0], lowest, top.virtual_size)
        lower = np.where(classes[-1] == UNALLOCATED, _topmost(classes[:-1]), UNALLOCATED).astype(np.uint8)
        if isinstance(lowest, RawAllocation):
            hidden = _topmost(classes[1:]) != UNALLOCATED
            lower = np.where(_streamed(lower, ~hidden, STREAM_CHUNK // granule), DATA, lower).astype(np.uint8)
        _count(up, start, granule, length, lower, classes[-1], top, top.virtual_size)
    if isinstance(lowest, Qcow2Allocation) and lowest.header.version < 3 and has_below:
        # Version 2 has no zero clusters: they are written out.
        down.copied, down.zeroes = down.copied + down.zeroes, 0
    return RowFacts(
        commit_bytes=down.copied,
        commit_zeroes=down.zeroes,
        commit_grows=down.grows + covered,
        pull_bytes=up.copied + covered,
        pull_grows=up.grows + covered,
        extents=(down.extents, up.extents),
        profile_commit=tuple(int(each) for each in np.cumsum(down.profile)),
        profile_pull=tuple(int(each) for each in np.cumsum(up.profile)),
    )


def hidden_ranges(layers: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """Where the top of a row shows zeroes only because a layer beneath ends there, as ``(start, length)``.

    :param layers: ``(path, format)``, lowest first.
    """
    found: list[tuple[int, int]] = []
    with opened(layers) as row:
        length = row[-1].virtual_size
        shortest = min(each.virtual_size for each in row[:-1])
        if shortest >= length:
            return []
        granule = min(512, *(each.granule for each in row))
        largest = max(each.cluster for each in row)
        window = max(WINDOW_GRANULES * granule // largest, 1) * largest
        for start in range(shortest // largest * largest, length, window):
            end = min(start + window, -(-length // largest) * largest)
            hidden = _hidden(row, [layer.classes(start, end, granule) for layer in row], start, granule)
            edges = np.flatnonzero(np.diff(np.concatenate([[0], hidden.astype(np.int8), [0]]))).reshape(-1, 2)
            for first, last in (edges * granule + start).tolist():
                if first < length:
                    found.append((first, min(last, length) - first))
    return found


def _hidden(row: Sequence[Allocation], classes: Sequence[Classes], start: int, granule: int) -> Mask:
    """Where, from ``start`` on, the top shows zeroes only because a layer beneath ends there."""
    masked = classes[-1] != UNALLOCATED
    hidden = np.zeros(len(masked), dtype=bool)
    for layer, seen in zip(reversed(row[:-1]), reversed(classes[:-1]), strict=True):
        past = np.arange(len(hidden)) >= -(-layer.virtual_size // granule) - start // granule
        hidden |= past & ~masked
        masked = masked | past | (seen != UNALLOCATED)
    hidden[max(0, -(-row[-1].virtual_size // granule) - start // granule) :] = False
    return hidden


def holds(target: tuple[str, str], sources: Sequence[tuple[str, str]], *, tag: str | None = None) -> bool:
    """Whether the target has something of its own wherever data shows in the sources; contents are not compared.

    A raw file says nothing: where a file system turns zeroes into holes, it has holes where zeroes were written.

    :param sources: ``(path, format)``, lowest first.
    :param tag: the internal snapshot of the one source that is meant, not its active state.
    :raise UnhealthyError: a table is damaged.
    """
    with opened([target, *sources]) as (into, *row):
        if isinstance(into, RawAllocation):
            return True
        if tag is not None:
            look_at_point(row[0], tag)
        granule = min(each.granule for each in (into, *row))
        largest = max(each.cluster for each in (into, *row))
        window = max(WINDOW_GRANULES * granule // largest, 1) * largest
        size = min(into.virtual_size, row[-1].virtual_size)
        for number in sorted(set().union(*(each.busy(window) for each in row))):
            start = number * window
            end = min(start + window, -(-size // largest) * largest)
            if start >= end:
                continue
            shown = _topmost([_seen(each, start, end, granule) for each in row])
            data = (shown == DATA) | (shown == COMPRESSED)
            data[-(-size // granule) - start // granule :] = False
            if np.any(data & (into.classes(start, end, granule) == UNALLOCATED)):
                return False
    return True


def _streamed(lower: Classes, raw: Mask, chunk: int) -> Mask:
    """Which holes of a raw file a stream copies as data: those that share one of its chunks with data.

    To a stream all of a raw file is allocated; it writes a chunk as zeroes only when all of it reads so.
    """
    starts = raw & ~np.concatenate([[False], raw[:-1]])
    at = np.arange(len(raw))
    start = np.maximum.accumulate(np.where(starts, at, 0))
    # The start of the chunk that each place is in names the chunk.
    name = start + (at - start) // chunk * chunk
    data = np.zeros(len(raw), dtype=bool)
    data[name[raw & (lower == DATA)]] = True
    return np.asarray(raw & data[name], dtype=bool)


def _seen(layer: Allocation, start: int, end: int, granule: int) -> Classes:
    """What the layer has; past its end it hides what is beneath with zeroes."""
    found = layer.classes(start, end, granule)
    inside = max(0, -(-layer.virtual_size // granule) - start // granule)
    if inside < len(found):
        found = found.copy()
        found[inside:] = ZERO
    return found


def _topmost(classes: Sequence[Classes]) -> Classes:
    """What shows through layers, lowest first, where any has something."""
    seen = classes[-1]
    for lower in reversed(classes[:-1]):
        seen = np.where(seen == UNALLOCATED, lower, seen)
    return seen


def _count(
    way: _Way, start: int, granule: int, length: int, moved: Classes, there: Classes, target: Allocation, size: int
) -> None:
    """Add what moves in one window.

    :param moved: what moves, ``there`` what the target has, ``size`` where the merged layer ends.
    """
    inside = max(0, -(-size // granule) - start // granule)
    moved = moved.copy()
    moved[inside:] = UNALLOCATED
    data = (moved != UNALLOCATED) & (moved != ZERO)
    units = _any(data, way.unit // granule)
    way.copied += int(units.sum()) * way.unit
    zeroes = _any(moved == ZERO, way.unit // granule) & ~units
    way.zeroes += int(zeroes.sum()) * way.unit
    starts = np.flatnonzero(units & ~np.concatenate([[False], units[:-1]]))
    way.extents += len(starts) - (1 if len(starts) and units[0] and way.last == start // way.unit - 1 else 0)
    if units.any():
        way.last = start // way.unit + int(np.flatnonzero(units)[-1])
        places = (start + np.flatnonzero(units) * way.unit) * STEPS // max(length, 1)
        way.profile += np.bincount(np.minimum(places, STEPS - 1) + 1, minlength=STEPS + 1) * float(way.unit)
    if isinstance(target, Qcow2Allocation):
        # Zeroes that cover a part of a cluster only may be written out.
        partly = _any(moved == ZERO, target.cluster // granule) & _any(moved != ZERO, target.cluster // granule)
        clusters = _any(np.repeat(units, way.unit // granule)[: len(moved)], target.cluster // granule) | partly
        held = _any(there == DATA, target.cluster // granule)
        way.grows += int((clusters & ~held).sum()) * target.cluster
        end = start + len(moved) * granule
        needed = _tables(clusters, start, target)
        way.grows += int((needed & ~target.table_there(start, end)[: len(needed)]).sum()) * target.cluster
    else:
        way.grows += int((data & (there == ZERO)).sum()) * granule


def _tables(clusters: Mask, start: int, target: Qcow2Allocation) -> Mask:
    """Which L2 tables the clusters need, from the one that covers ``start`` on."""
    first = start // target.cluster
    used = (first + np.flatnonzero(clusters)) // target.per_table - first // target.per_table
    count = -(-(first % target.per_table + len(clusters)) // target.per_table)
    found = np.zeros(count, dtype=bool)
    found[used] = True
    return found


def _any(mask: Mask, factor: int) -> Mask:
    """The mask in units that are ``factor`` times as large; a unit counts when any of its parts does."""
    if factor <= 1:
        return mask
    padded = np.concatenate([mask, np.zeros(-len(mask) % factor, dtype=bool)])
    return np.asarray(padded.reshape(-1, factor).any(axis=1), dtype=bool)
