"""Reference counts of a qcow2 image: blocks of them as arrays, and changing them so that a crash loses nothing.

A count that is too high leaks a cluster, one that is too low loses data: counts go up before anything refers to a
cluster, and down when nothing does any more. Source: the qcow2 specification, ``docs/interop/qcow2.txt`` of QEMU, "Host
cluster management".
"""

from __future__ import annotations

import os
import struct

import numpy as np
import numpy.typing as npt

from snaptree.errors import RefusedError
from snaptree.images import durable
from snaptree.images.header import MAX_REFCOUNT_TABLE_BYTES, Header
from snaptree.images.tables import OFFSET, words_of

Numbers = npt.NDArray[np.uint64]
_KEPT = 16 << 20
"""Of so many clusters it is kept in mind whether they are counted once, in bytes."""
_TABLE_AT = 48
"""Where the header has the table's offset and length, in one sector."""


def decode(data: bytes, bits: int) -> Numbers:
    """The counts of one block, each of so many bits; those narrower than a byte begin at its lowest bit."""
    if bits >= 8:
        return np.frombuffer(data, f">u{bits // 8}").astype(np.uint64)
    whole = np.frombuffer(data, np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((whole[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1).astype(np.uint64)


def encode(counts: Numbers, bits: int) -> bytes:
    """The block that holds these counts."""
    if bits >= 8:
        return counts.astype(f">u{bits // 8}").tobytes()
    parts = counts.astype(np.uint8).reshape(-1, 8 // bits)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    whole: npt.NDArray[np.uint8] = np.bitwise_or.reduce(parts << shifts, axis=1).astype(np.uint8)
    return whole.tobytes()


class Clusters:
    """Taking clusters at the end of a file. ``begin`` and ``end`` are numbers of clusters: what was taken lies between.

    Free clusters within the file are not taken: after a crash the counts may lag behind, but past the end all is free.
    """

    def __init__(self, size: int, unit: int) -> None:
        self.unit = unit
        self.begin = self.end = -(-size // unit)

    def take(self, count: int) -> Numbers:
        """The places (bytes) of so many clusters in a row."""
        taken = np.arange(self.end, self.end + count, dtype=np.uint64) * np.uint64(self.unit)
        self.end += count
        return taken

    def take_for(self, length: int) -> int:
        """The place of so many bytes."""
        return int(self.take(-(-length // self.unit))[0])

    def occupied(self, offset: int, length: int) -> Numbers:
        """The places of the clusters that a table of so many bytes occupies."""
        return np.arange(offset, offset + max(length, 1), self.unit, dtype=np.uint64)


class RefCounts:
    """The reference counts of an image that is open for writing, in rounds: place, write, refer, give up."""

    def __init__(self, descriptor: int, path: str, header: Header, clusters: Clusters) -> None:
        self.descriptor = descriptor
        self.path = path
        self.bits = header.refcount_bits
        self.clusters = clusters
        self.per_block = clusters.unit * 8 // self.bits
        self._table_at = header.refcount_table_offset
        data = os.pread(descriptor, header.refcount_table_clusters * clusters.unit, self._table_at)
        self._table = words_of(data) & OFFSET
        self._fresh: set[int] = set()
        self._left: tuple[int, int] | None = None
        self._ones: dict[int, npt.NDArray[np.bool_]] = {}
        clusters.begin = clusters.end = max(clusters.end, self._counted())

    def _counted(self) -> int:
        """The number past the last cluster that has a count: past the end of the file, too, one may be referred to."""
        for number in np.flatnonzero(self._table)[::-1].tolist():
            if (number + 1) * self.per_block <= self.clusters.end:
                break
            used = np.flatnonzero(self._read(number))
            if len(used):
                return int(used[-1]) + 1 + int(number) * self.per_block
        return 0

    def occupied(self) -> list[Numbers]:
        """Where the table and the blocks are, in bytes."""
        table = self.clusters.occupied(self._table_at, len(self._table) * 8)
        return [table, self._table[self._table != 0]]

    def are_one(self, places: Numbers) -> npt.NDArray[np.bool_]:
        """Which of these clusters (bytes) were counted exactly once, as far as is known: later changes are not seen."""
        numbers = places // np.uint64(self.clusters.unit)
        blocks = numbers // np.uint64(self.per_block)
        found = np.zeros(len(places), dtype=bool)
        for number in sorted(set(blocks.tolist())):
            if number < len(self._table) and self._table[number]:
                chosen = blocks == number
                found[chosen] = self._ones_of(number)[numbers[chosen] % np.uint64(self.per_block)]
        return found

    def _ones_of(self, number: int) -> npt.NDArray[np.bool_]:
        if number not in self._ones:
            if len(self._ones) * self.per_block >= _KEPT:
                self._ones.clear()
            self._ones[number] = self._read(number) == 1
        return self._ones[number]

    def place(self) -> None:
        """Take clusters for counts of what was taken where there are none yet, and for a longer table."""
        clusters, unit = self.clusters, self.clusters.unit
        while clusters.begin < clusters.end:
            last = (clusters.end - 1) // self.per_block
            if last >= len(self._table):
                # Room for twice as much, so that it seldom moves; but QEMU opens no image with a longer one.
                most = MAX_REFCOUNT_TABLE_BYTES // unit * unit // 8
                if last >= most:
                    raise RefusedError(f"{self.path} would be longer than its reference counts can be")
                entries = min(-(-(last + 1) * 2 * 8 // unit) * unit // 8, most)
                if self._left is None:
                    self._left = (self._table_at, len(self._table) * 8)
                self._table = np.concatenate([self._table, np.zeros(entries - len(self._table), dtype=np.uint64)])
                self._table_at = clusters.take_for(entries * 8)
                continue
            first = clusters.begin // self.per_block
            missing = np.flatnonzero(self._table[first : last + 1] == 0) + first
            if not len(missing):
                return
            self._table[missing] = clusters.take(len(missing))
            self._fresh.update(missing.tolist())

    def write(self) -> None:
        """Count what was taken, in blocks to which nothing refers, or which have counted it as free."""
        begin, end = self.clusters.begin, self.clusters.end
        for number in range(begin // self.per_block, -(-end // self.per_block)) if begin < end else ():
            first = number * self.per_block
            low, high = max(begin - first, 0), min(end - first, self.per_block)
            counts = np.zeros(self.per_block, dtype=np.uint64) if number in self._fresh else self._read(number)
            counts[low:high] = 1
            self._write(int(self._table[number]), encode(counts, self.bits))
        if self._left is not None:
            self._write(self._table_at, self._table.astype(">u8").tobytes())

    def refer(self) -> bool:
        """Let the image refer to the new blocks, which are on disk; whether there was anything to change."""
        if self._left is not None:
            unit = self.clusters.unit
            self._write(_TABLE_AT, struct.pack(">QI", self._table_at, len(self._table) * 8 // unit))
        elif self._fresh:
            low, high = min(self._fresh), max(self._fresh) + 1
            self._write(self._table_at + low * 8, self._table[low:high].astype(">u8").tobytes())
        else:
            return False
        return True

    def give_up(self, places: Numbers) -> None:
        """Count these clusters (bytes) once less: on disk nothing refers to them any more."""
        if self._left is not None:
            places = np.concatenate([places, self.clusters.occupied(*self._left)])
        self._left = None
        self._fresh.clear()
        numbers = places // np.uint64(self.clusters.unit)
        blocks = numbers // np.uint64(self.per_block)
        for number in sorted(set(blocks.tolist())):
            if number >= len(self._table) or not self._table[number]:
                continue  # Not counted at all: damage of before, which "qemu-img check" mends.
            counts = self._read(number)
            inside = (numbers[blocks == number] % np.uint64(self.per_block)).astype(np.int64)
            times = np.bincount(inside, minlength=self.per_block).astype(np.uint64)
            counts -= np.minimum(counts, times)
            self._write(int(self._table[number]), encode(counts, self.bits))

    def _read(self, number: int) -> Numbers:
        data = os.pread(self.descriptor, self.clusters.unit, int(self._table[number]))
        return decode(data.ljust(self.clusters.unit, b"\0"), self.bits)

    def _write(self, offset: int, data: bytes) -> None:
        durable.write_in_place(self.descriptor, offset, data, self.path)
