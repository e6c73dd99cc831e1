"""The records that the tests' guest writes to its disks (``writer.c``), read from the bytes of a disk."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from tests.kit.qmp import Qmp

SIZE, SLOTS, RUN = 4096, 4096, 8
DISK_BYTES = 32 << 20
"""How large the guest's disks are; the records take the first half."""
_HEAD = struct.Struct("<8sQQ")
_NOTHING = bytes(SIZE)


def slot(number: int) -> int:
    """Where a record goes, as in ``writer.c``."""
    return (number // RUN * 13 % (SLOTS // RUN)) * RUN + number % RUN


def in_memory(qmp: Qmp, folder: Path) -> tuple[int, int]:
    """The record that a guest is at which stands still, and the disk that it was filled for, read from its memory."""
    file = folder / "ram"
    # Where q35 has its memory below 2 GiB.
    qmp("pmemsave", val=1 << 20, size=95 << 20, filename=str(file))
    content = file.read_bytes()
    file.unlink()
    found = {_HEAD.unpack_from(content, at.start()) for at in re.finditer(b"SNAPREC1", content)}
    # The word is in the program too; what follows it there is no record.
    numbers = [(number, disk) for _, number, disk in found if disk < 2 and 0 < number < 1 << 32]
    assert numbers, "there is no record in memory"
    return max(numbers)


@dataclass(frozen=True, slots=True)
class Records:
    """What was found on a disk: the highest number, and in sentences what keeps it from being a whole prefix."""

    last: int
    faults: tuple[str, ...]

    @property
    def prefix(self) -> int:
        """The number up to which all records are there (as many as fit), and none after it.

        :raise AssertionError: one is missing, torn or of another disk.
        """
        assert not self.faults, self.faults[:5]
        return self.last


def read_records(content: bytes, disk: int) -> Records:
    """The records on a disk, told what it shows from its first byte on.

    :param disk: 0 for vda, 1 for vdb.
    """
    found: dict[int, int] = {}
    faults: list[str] = []
    for at in range(SLOTS):
        data = content[at * SIZE : (at + 1) * SIZE]
        if data in (_NOTHING, b""):
            continue
        magic, number, of = _HEAD.unpack_from(data)
        if magic != b"SNAPREC1" or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
            faults.append(f"what is in slot {at} is no whole record")
        elif of != disk or slot(number) != at:
            faults.append(f"record {number} of disk {of} is in slot {at}")
        else:
            found[at] = number
    last = max(found.values(), default=0)
    for number in range(max(1, last - SLOTS + 1), last + 1):
        there = found.get(slot(number))
        if there != number:
            faults.append(f"record {number} is missing; in its place is {there or 'nothing'}, the last one is {last}")
    return Records(last, tuple(faults))
