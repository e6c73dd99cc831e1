"""L1 and L2 tables as arrays, read in windows: a table of a large image is never held whole.

Source: the qcow2 specification, ``docs/interop/qcow2.txt`` of QEMU.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from snaptree.errors import UnhealthyError
from snaptree.images.header import Header, read_header

Classes: TypeAlias = npt.NDArray[np.uint8]
Places: TypeAlias = npt.NDArray[np.uint64]
UNALLOCATED, DATA, ZERO, COMPRESSED = 0, 1, 2, 3

OFFSET = np.uint64(0x00FFFFFFFFFFFE00)
COPIED_BIT = np.uint64(1 << 63)
"""The reference count is exactly one: the cluster, or table, can be written in place."""
COMPRESSED_BIT = np.uint64(1 << 62)
ZERO_BIT = np.uint64(1)


def words_of(data: bytes) -> Places:
    """The words of a table, as far as they are whole."""
    return np.frombuffer(data[: len(data) // 8 * 8], ">u8").astype(np.uint64)


def data_ranges(descriptor: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where an open file has data; the rest are holes. What cannot say so, as a block device cannot, is all data.

    :param end: not past the end of the file.
    :raise OSError: it cannot be found out. What may be data is never taken for a hole.
    """
    at = start
    while at < end:
        try:
            begin = os.lseek(descriptor, at, os.SEEK_DATA)
            stop = os.lseek(descriptor, begin, os.SEEK_HOLE) if begin < end else end
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            begin, stop = at, end
        if begin < end:
            yield begin, min(stop, end)
        at = stop


class Allocation:
    """Which parts of an image hold what, by guest address.

    :param descriptor: open for reading; stays the caller's.
    :raise UnhealthyError: header or tables are not what they may be.
    """

    granule: int
    """The smallest unit of allocation, in bytes."""
    cluster: int
    """What a write allocates, in bytes."""
    virtual_size: int

    def __init__(self, descriptor: int, path: str) -> None:
        self.descriptor = descriptor
        self.path = path

    def classes(self, start: int, end: int, granule: int) -> Classes:
        """For each granule from ``start`` to ``end`` (multiples of the cluster size) what the image has there."""
        raise NotImplementedError

    def places(self, start: int, end: int, granule: int) -> tuple[Classes, Places]:
        """As :meth:`classes`, and for each granule with data where in the file it lies, in bytes."""
        raise NotImplementedError

    def busy(self, window: int) -> set[int]:
        """The numbers of the windows of that many bytes in which anything may be allocated."""
        raise NotImplementedError


class RawAllocation(Allocation):
    """A raw image: holes read as zeroes, as QEMU reports them."""

    def __init__(self, descriptor: int, path: str) -> None:
        super().__init__(descriptor, path)
        self.granule = self.cluster = 4096
        self.virtual_size = os.lseek(descriptor, 0, os.SEEK_END)

    def _data(self, start: int, end: int) -> list[tuple[int, int]]:
        return list(data_ranges(self.descriptor, start, end))

    def classes(self, start: int, end: int, granule: int) -> Classes:
        found = np.full((end - start) // granule, ZERO, dtype=np.uint8)
        for begin, stop in self._data(start, min(end, self.virtual_size)):
            found[(begin - start) // granule : -(-(stop - start) // granule)] = DATA
        return found

    def places(self, start: int, end: int, granule: int) -> tuple[Classes, Places]:
        found = self.classes(start, end, granule)
        return found, np.arange(start, start + len(found) * granule, granule, dtype=np.uint64)

    def busy(self, window: int) -> set[int]:
        found: set[int] = set()
        for begin, stop in self._data(0, self.virtual_size):
            found.update(range(begin // window, -(-stop // window)))
        return found


class Qcow2Allocation(Allocation):
    """A state of a qcow2 image, the active one to begin with."""

    def __init__(self, descriptor: int, path: str) -> None:
        super().__init__(descriptor, path)
        self.header: Header = read_header(descriptor, path)
        self.cluster = self.header.cluster_size
        self.granule = self.cluster // 32 if self.header.extended_l2 else self.cluster
        self.virtual_size = self.header.virtual_size
        self.file_size = os.fstat(descriptor).st_size or os.lseek(descriptor, 0, os.SEEK_END)
        self.entry = 16 if self.header.extended_l2 else 8
        self.per_table = self.cluster // self.entry
        self.use_l1(self.header.l1_table_offset, self.header.l1_size)

    def use_l1(self, offset: int, entries: int) -> None:
        """Look at the state that this L1 table stands for: the active one, or an internal snapshot."""
        data = os.pread(self.descriptor, entries * 8, offset)
        if len(data) < entries * 8:
            raise self._bad("its L1 table lies past its end")
        words = words_of(data)
        self.l1 = words & OFFSET
        self.own_tables = (words & COPIED_BIT) != 0

    def _bad(self, what: str) -> UnhealthyError:
        return UnhealthyError(f"{self.path} is damaged: {what}", "look at it with 'qemu-img check'")

    @property
    def tables(self) -> int:
        """How many L2 tables there are."""
        return int(np.count_nonzero(self.l1))

    def busy(self, window: int) -> set[int]:
        covered = self.per_table * self.cluster
        found: set[int] = set()
        for index in np.flatnonzero(self.l1).tolist():
            found.update(range(index * covered // window, -(-(index + 1) * covered // window)))
        return found

    def table_there(self, start: int, end: int) -> npt.NDArray[np.bool_]:
        """For each L2 table that covers something from ``start`` to ``end`` whether there is one."""
        covered = self.per_table * self.cluster
        part = self.l1[start // covered : -(-end // covered)]
        missing = -(-end // covered) - start // covered - len(part)
        return np.concatenate([part != 0, np.zeros(max(0, missing), dtype=bool)])

    def entries(self, first: int, last: int) -> Places:
        """The L2 entries of the clusters from ``first`` up to ``last``, with their flags; two words each when extended.

        :raise UnhealthyError: a table lies past the end of the file.
        """
        width = self.entry // 8
        found = np.zeros((last - first) * width, dtype=np.uint64)
        at = first
        while at < last:
            table, place = divmod(at, self.per_table)
            count = min(self.per_table - place, last - at)
            offset = int(self.l1[table]) if table < len(self.l1) else 0
            if offset:
                data = os.pread(self.descriptor, count * self.entry, offset + place * self.entry)
                if offset % self.cluster or len(data) < count * self.entry:
                    raise self._bad(f"an L2 table at {offset}")
                found[(at - first) * width : (at - first + count) * width] = np.frombuffer(data, ">u8")
            at += count
        return found

    def classes(self, start: int, end: int, granule: int) -> Classes:
        entries = self.entries(start // self.cluster, -(-end // self.cluster))
        found = self._extended(entries) if self.header.extended_l2 else self.classes_of(entries)
        size = self.granule
        if size > granule:
            return np.repeat(found, size // granule)[: (end - start) // granule]
        assert size == granule, "the granule is the smallest of the row"
        return found[: (end - start) // granule]

    def places(self, start: int, end: int, granule: int) -> tuple[Classes, Places]:
        assert not self.header.extended_l2, "where a subcluster lies is not asked for"
        entries = self.entries(start // self.cluster, -(-end // self.cluster))
        found, offsets = self.classes_of(entries), entries & OFFSET
        count = (end - start) // granule
        if (parts := self.cluster // granule) > 1:
            inside = np.arange(parts, dtype=np.uint64) * np.uint64(granule)
            found, offsets = np.repeat(found, parts), (offsets[:, None] + inside).reshape(-1)
        return found[:count], offsets[:count]

    def classes_of(self, entries: Places) -> Classes:
        """What standard L2 entries say that the image has."""
        offsets = entries & OFFSET
        if not np.any(entries & (COMPRESSED_BIT | ZERO_BIT)):
            # Most tables are such, and a third of the time is enough for them.
            self._require_inside(offsets)
            plain: Classes = np.multiply(offsets != 0, DATA, dtype=np.uint8)
            return plain
        packed = (entries & COMPRESSED_BIT) != 0
        zero = ((entries & ZERO_BIT) != 0) & ~packed if self.header.version >= 3 else np.zeros(len(entries), dtype=bool)
        data = (offsets != 0) & ~packed & ~zero
        self._require_inside(offsets[data])
        found = np.zeros(len(entries), dtype=np.uint8)
        found[data] = DATA
        found[zero] = ZERO
        found[packed] = COMPRESSED
        return found

    def _extended(self, entries: Places) -> Classes:
        descriptors, bitmaps = entries[0::2], entries[1::2]
        packed = (descriptors & COMPRESSED_BIT) != 0
        self._require_inside((descriptors & OFFSET)[((descriptors & OFFSET) != 0) & ~packed])
        shifts = np.arange(32, dtype=np.uint64)
        there = (bitmaps[:, None] >> shifts) & ZERO_BIT
        zero = (bitmaps[:, None] >> (shifts + np.uint64(32))) & ZERO_BIT
        found = np.where(there != 0, DATA, np.where(zero != 0, ZERO, UNALLOCATED)).astype(np.uint8)
        found[packed] = COMPRESSED
        return found.reshape(-1)

    def _require_inside(self, offsets: Places) -> None:
        if len(offsets) and (int(offsets.max()) >= self.file_size or np.any(offsets & np.uint64(self.cluster - 1))):
            raise self._bad("an L2 entry points outside the file")


def open_allocation(descriptor: int, path: str, image_format: str) -> Allocation:
    """The allocation of an open image."""
    return Qcow2Allocation(descriptor, path) if image_format == "qcow2" else RawAllocation(descriptor, path)
