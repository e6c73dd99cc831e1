"""The file that takes the data of a merge, changed in such an order that a crash leaves leaked clusters at worst.

Clusters are taken at the end of the file. In one round they, new tables and reference counts are written in any order,
since nothing refers to them yet; then, each after a sync, what refers to the counts, what refers to the clusters, and
the counts of what is referred to no more. Source: the qcow2 specification, ``docs/interop/qcow2.txt`` of QEMU.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from snaptree.errors import RefusedError, UnhealthyError
from snaptree.images import durable
from snaptree.images.header import MAX_L1_BYTES, read_internals
from snaptree.images.mover.refcounts import Clusters, Numbers, RefCounts
from snaptree.images.tables import COPIED_BIT, OFFSET, ZERO_BIT, Allocation, Places, Qcow2Allocation

_SIZE_AT, _L1_AT, _AUTOCLEAR_AT = 24, 36, 88
"""Where the header has them; each lies within one sector, and is written whole."""
_CHECK = "look at it with 'qemu-img check'"
Mask = npt.NDArray[np.bool_]


class Target:
    """A file that takes data, open for reading and writing, locked for us alone.

    :param allocation: what it holds.
    :param unit: what is placed at once, in bytes.
    :param settle: brings to disk what was written; does nothing where a crash throws the whole file away.
    """

    trims = False
    """Whether a unit at the end is cut where the disk ends."""

    def __init__(self, descriptor: int, allocation: Allocation, unit: int, settle: Callable[[], None]) -> None:
        self.descriptor = descriptor
        self.path = allocation.path
        self.unit = unit
        self.settle = settle

    @property
    def weight(self) -> int:
        """How much memory this round takes by now, in bytes."""
        return 0

    def prepare(self, size: int) -> None:
        """See that the file can be written to and hold a disk of that many bytes, before anything is written.

        :raise RefusedError: it cannot hold it.
        :raise UnhealthyError: its tables are where they cannot be.
        """

    def writable(self, entries: Places) -> Mask:
        """Which units, by their L2 entries, can be written where they are."""
        raise NotImplementedError

    def held(self, numbers: Numbers, entries: Places) -> Numbers:
        """Where units that can be written in place lie, in bytes."""
        raise NotImplementedError

    def take(self, count: int) -> Numbers:
        """Places for so many units that cannot, in a row."""
        raise NotImplementedError

    def refer(self, numbers: Numbers, places: Numbers) -> None:
        """From the end of the round on the units with these numbers lie at these places."""
        raise NotImplementedError

    def clear(self, numbers: Numbers) -> None:
        """From the end of the round on the units with these numbers show zeroes."""
        raise NotImplementedError

    def finish_round(self) -> None:
        """Bring this round to disk; from then on it counts."""
        raise NotImplementedError

    def finish(self, size: int) -> None:
        """The last round; the disk is at least that long afterwards."""
        raise NotImplementedError


class RawTarget(Target):
    """A raw file: the place of a unit is its address."""

    trims = True

    def writable(self, entries: Places) -> Mask:
        return np.ones(len(entries), dtype=bool)

    def held(self, numbers: Numbers, entries: Places) -> Numbers:
        return numbers * np.uint64(self.unit)

    def take(self, count: int) -> Numbers:
        assert count == 0, "all of a raw file is there"
        return np.zeros(0, dtype=np.uint64)

    def refer(self, numbers: Numbers, places: Numbers) -> None:
        pass

    def clear(self, numbers: Numbers) -> None:
        size = os.lseek(self.descriptor, 0, os.SEEK_END)
        for first, last in runs_of(np.subtract(numbers, np.arange(len(numbers), dtype=np.uint64), dtype=np.uint64)):
            start, end = int(numbers[first]) * self.unit, min((int(numbers[last - 1]) + 1) * self.unit, size)
            if start < end:
                durable.write_zeroes(self.descriptor, start, end - start, self.path)

    def finish_round(self) -> None:
        """Nothing refers to what was written: there are no rounds."""

    def finish(self, size: int) -> None:
        if -(-os.lseek(self.descriptor, 0, os.SEEK_END) // 512) * 512 < size:
            durable.set_length(self.descriptor, size, self.path)
        self.settle()


class Qcow2Target(Target):
    """A qcow2 file without extended L2 entries; one of version 2 is not told to show zeroes."""

    def __init__(self, descriptor: int, allocation: Qcow2Allocation, settle: Callable[[], None]) -> None:
        header = allocation.header
        super().__init__(descriptor, allocation, header.cluster_size, settle)
        self._header = header
        self._size = header.virtual_size
        self._length = os.fstat(descriptor).st_size
        self._per_table = self.unit // 8
        self._l1_at = header.l1_table_offset
        self._l1 = self._words(self._l1_at, header.l1_size)
        self._clusters = Clusters(self._length, self.unit)
        self._counts = RefCounts(descriptor, self.path, header, self._clusters)
        self._tables: dict[int, Numbers] = {}
        self._changed: dict[int, tuple[int, int]] = {}
        self._l1_grew = False
        self._given_up: list[Numbers] = []
        self._protected = np.zeros(1, dtype=np.uint64)

    @property
    def weight(self) -> int:
        return len(self._tables) * self.unit + sum(len(each) * 8 for each in self._given_up)

    def prepare(self, size: int) -> None:
        if -(-size // (self._per_table * self.unit)) * 8 > MAX_L1_BYTES:
            raise RefusedError(
                f"{self.path} has clusters of {self.unit} bytes, too small for a disk of {size} bytes",
                "merge with --merge pull",
            )
        self._protect()
        if self._header.autoclear:
            # Who does not keep up to date what they stand for has to clear them before writing.
            durable.write_in_place(self.descriptor, _AUTOCLEAR_AT, bytes(8), self.path)

    def _protect(self) -> None:
        """Find out where the tables are, which no data may overwrite, and see that none is where another is."""
        header, unit, active = self._header, self.unit, self._l1 & OFFSET
        own = [np.zeros(1, dtype=np.uint64), active[active != 0], *self._counts.occupied()]
        own.append(self._clusters.occupied(self._l1_at, len(self._l1) * 8))
        points = read_internals(self.descriptor, header, self.path)
        others: list[Numbers] = []
        if points:
            own.append(np.array([header.snapshots_offset], dtype=np.uint64))
        for each in points:
            own.append(self._clusters.occupied(each.l1_table_offset, each.l1_size * 8))
            # These may be the active tables as well.
            others.append(self._words(each.l1_table_offset, each.l1_size) & OFFSET)
        places = np.sort(np.concatenate(own))
        self._require_places(places)
        if np.any(places[1:] == places[:-1]):
            raise UnhealthyError(f"{self.path} is damaged: two of its tables overlap", _CHECK)
        self._protected = np.sort(np.concatenate([places, *others])) // np.uint64(unit)

    def _require_places(self, places: Numbers) -> None:
        if len(places) and (int(places.max()) >= self._length or np.any(places % np.uint64(self.unit))):
            raise UnhealthyError(f"{self.path} is damaged: something in it is said to be where nothing can be", _CHECK)

    def writable(self, entries: Places) -> Mask:
        """Those that the flag and the count say are ours alone."""
        found = np.asarray(((entries & OFFSET) != 0) & ((entries & COPIED_BIT) != 0), dtype=bool)
        places = entries[found] & OFFSET
        self._require_places(places)
        numbers = places // np.uint64(self.unit)
        at = np.minimum(np.searchsorted(self._protected, numbers), len(self._protected) - 1)
        if np.any(self._protected[at] == numbers):
            raise UnhealthyError(f"{self.path} is damaged: data is said to be where a table is", _CHECK)
        found[found] = self._counts.are_one(places)
        return found

    def held(self, numbers: Numbers, entries: Places) -> Numbers:
        return entries & OFFSET

    def take(self, count: int) -> Numbers:
        return self._clusters.take(count)

    def refer(self, numbers: Numbers, places: Numbers) -> None:
        self._change(numbers, places | COPIED_BIT)

    def clear(self, numbers: Numbers) -> None:
        self._change(numbers, np.full(len(numbers), ZERO_BIT, dtype=np.uint64))

    def _change(self, numbers: Numbers, entries: Numbers) -> None:
        """Let the L2 entries of these clusters be others, and give up what they referred to."""
        order = np.argsort(numbers, kind="stable")
        numbers, entries = numbers[order], entries[order]
        tables = numbers // np.uint64(self._per_table)
        for first, last in runs_of(tables):
            number = int(tables[first])
            table = self._table(number)
            inside = (numbers[first:last] % np.uint64(self._per_table)).astype(np.int64)
            old, new = table[inside] & OFFSET, entries[first:last]
            self._given_up.append(old[(old != 0) & (old != (new & OFFSET))])
            table[inside] = new
            low, high = self._changed.get(number, (self._per_table, 0))
            self._changed[number] = (min(low, int(inside[0])), max(high, int(inside[-1]) + 1))

    def _table(self, number: int) -> Numbers:
        if number not in self._tables:
            if number >= len(self._l1):
                self._grow_l1(number + 1)
            offset = int(self._l1[number] & OFFSET)
            self._tables[number] = (
                self._words(offset, self._per_table) if offset else np.zeros(self._per_table, dtype=np.uint64)
            )
        return self._tables[number]

    def _grow_l1(self, entries: int) -> None:
        if not self._l1_grew:
            self._given_up.append(self._clusters.occupied(self._l1_at, len(self._l1) * 8))
        self._l1 = np.concatenate([self._l1, np.zeros(entries - len(self._l1), dtype=np.uint64)])
        self._l1_grew = True

    def finish_round(self) -> None:
        moved = self._place_tables()
        self._counts.place()
        end = self._clusters.end * self.unit
        if os.fstat(self.descriptor).st_size < end:
            durable.set_length(self.descriptor, end, self.path)
        for number, place in moved.items():
            self._write(place, self._tables[number])
        if self._l1_grew:
            self._write(self._l1_at, self._l1)
        self._counts.write()
        self.settle()
        if self._counts.refer():
            self.settle()
        self._write_references(moved)
        self.settle()
        self._counts.give_up(np.concatenate([np.zeros(0, dtype=np.uint64), *self._given_up]))
        self._given_up.clear()
        self._tables.clear()
        self._changed.clear()
        self._clusters.begin = self._clusters.end

    def finish(self, size: int) -> None:
        needed = -(-size // (self._per_table * self.unit))
        if needed > len(self._l1):
            self._grow_l1(needed)
        if self._changed or self._l1_grew:
            self.finish_round()
        if size > self._size:
            # Last: what shows past the end of before is right only now.
            durable.write_in_place(self.descriptor, _SIZE_AT, struct.pack(">Q", size), self.path)
        self.settle()

    def _place_tables(self) -> dict[int, int]:
        """Places for L2 tables that are new or that an internal snapshot needs as they are, and for an L1 that grew."""
        moved: dict[int, int] = {}
        for number in sorted(self._changed):
            entry = self._l1[number]
            if entry & COPIED_BIT and self._counts.are_one(np.array([entry & OFFSET], dtype=np.uint64))[0]:
                continue
            if entry & OFFSET:
                self._given_up.append(np.array([entry & OFFSET], dtype=np.uint64))
            moved[number] = int(self._clusters.take(1)[0])
            self._l1[number] = np.uint64(moved[number]) | COPIED_BIT
        if self._l1_grew:
            self._l1_at = self._clusters.take_for(len(self._l1) * 8)
        return moved

    def _write_references(self, moved: dict[int, int]) -> None:
        """Let L2 tables, the L1 table and the header refer to what is on disk by now."""
        for number, (low, high) in self._changed.items():
            if number not in moved:
                self._write(int(self._l1[number] & OFFSET) + low * 8, self._tables[number][low:high])
        if self._l1_grew:
            where = struct.pack(">IQ", len(self._l1), self._l1_at)
            durable.write_in_place(self.descriptor, _L1_AT, where, self.path)
            self._l1_grew = False
        elif moved:
            low, high = min(moved), max(moved) + 1
            self._write(self._l1_at + low * 8, self._l1[low:high])

    def _words(self, offset: int, count: int) -> Numbers:
        data = os.pread(self.descriptor, count * 8, offset)
        return np.frombuffer(data.ljust(count * 8, b"\0"), ">u8").astype(np.uint64)

    def _write(self, offset: int, words: Numbers) -> None:
        durable.write_in_place(self.descriptor, offset, words.astype(">u8").tobytes(), self.path)


def runs_of(values: Numbers) -> Iterator[tuple[int, int]]:
    """Where runs of equal values begin and end."""
    if len(values):
        edges = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1], [True]])).tolist()
        yield from itertools.pairwise(edges)


def open_target(descriptor: int, allocation: Allocation, unit: int, settle: Callable[[], None]) -> Target:
    """The target that an image of that kind is."""
    if isinstance(allocation, Qcow2Allocation):
        return Qcow2Target(descriptor, allocation, settle)
    return RawTarget(descriptor, allocation, unit, settle)
