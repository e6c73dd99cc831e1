"""The order in which the mover writes: whatever a power cut leaves of a merge, everything shows what it showed.

Each merge is recorded, write by write and sync by sync. What is on disk after a cut is all that came before a sync, and
any of what came after it, whole or torn.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.images import KiB, MiB

from snaptree.images import durable
from snaptree.images.mover import mapping, merging
from snaptree.images.mover.copying import Watch
from snaptree.images.mover.merging import Merge, merge

BLOCK = 4 * KiB
"""A write is torn between two of these: file systems rely on those being whole."""
SAMPLES = 5
"""So many random choices of what was not synced yet are looked at after each sync."""


@dataclass(frozen=True)
class Write:
    """A change of the file: bytes that are written there, or its length when there are none."""

    at: int
    data: bytes | None = None


@dataclass
class Recorded:
    """What a merge did to the file: between two syncs the writes of one epoch."""

    before: bytes
    epochs: list[list[Write]] = field(default_factory=lambda: [[]])

    def left(self, chance: random.Random) -> Iterator[bytes]:
        """What the file may hold after a power cut."""
        there = bytearray(self.before)
        for epoch in self.epochs:
            for chosen in ([], *([_some(epoch, chance) for _ in range(SAMPLES)] if epoch else [])):
                found = bytearray(there)
                for each in chosen:
                    _apply(found, each)
                yield bytes(found)
            for each in epoch:
                _apply(there, each)
        yield bytes(there)


def _some(epoch: list[Write], chance: random.Random) -> list[Write]:
    likely, found = chance.choice((0.1, 0.5, 0.9)), list[Write]()
    for each in epoch:
        if each.data is not None and len(each.data) > BLOCK and chance.random() < 0.3:
            start, end = sorted(chance.choices(range(0, len(each.data) + 1, BLOCK), k=2))
            found.append(Write(each.at + start, each.data[start:end]))
        elif chance.random() < likely:
            found.append(each)
    return found


def _apply(content: bytearray, write: Write) -> None:
    end = write.at + len(write.data or b"")
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    if write.data is None:
        del content[end:]
    else:
        content[write.at : end] = write.data


def recorded(path: str, work: Merge, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Carry out the merge, and record what it does to the file."""
    found = Recorded(Path(path).read_bytes())
    pwrite, ftruncate, fsync, punch_hole = os.pwrite, os.ftruncate, os.fsync, durable.punch_hole

    def is_it(descriptor: int) -> bool:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))

    def writing(descriptor: int, data: bytes, offset: int) -> int:
        if is_it(descriptor):
            found.epochs[-1].append(Write(offset, bytes(data)))
        return pwrite(descriptor, data, offset)

    def cutting(descriptor: int, length: int) -> None:
        if is_it(descriptor):
            found.epochs[-1].append(Write(length))
        ftruncate(descriptor, length)

    def punching(descriptor: int, offset: int, length: int, name: str) -> bool:
        if is_it(descriptor):
            found.epochs[-1].append(Write(offset, bytes(length)))
        return punch_hole(descriptor, offset, length, name)

    def syncing(descriptor: int) -> None:
        if is_it(descriptor):
            found.epochs.append([])
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", writing)
        patched.setattr(os, "ftruncate", cutting)
        patched.setattr(os, "fsync", syncing)
        patched.setattr(durable, "punch_hole", punching)
        merge(work, Watch())
    return found


Row = tuple[tuple[str, str], ...]


def usual(folder: Path) -> Row:
    """Data in new places and old ones, and zeroes where data was."""
    base = images.create(folder / "base.qcow2", MiB)
    images.io(base, "qcow2", "write -P 1 0 512k")
    top = images.create(folder / "top.qcow2", MiB, backing=(base, "qcow2"))
    images.io(top, "qcow2", "write -P 2 128k 128k", "write -P 3 768k 64k", "write -z 320k 64k")
    return (str(base), "qcow2"), (str(top), "qcow2")


def with_a_point(folder: Path) -> Row:
    """The lower layer has an internal snapshot that needs its tables and clusters as they are."""
    row = usual(folder)
    images.run("qemu-img", "snapshot", "-c", "kept", row[0][0])
    return row


def longer(folder: Path) -> Row:
    """The lower layer's L1 table has to grow, and so has the disk."""
    base = images.create(folder / "base.qcow2", 64 * KiB, cluster_size=512)
    images.io(base, "qcow2", "write -P 1 0 64k")
    top = images.create(folder / "top.qcow2", 4 * MiB, backing=(base, "qcow2"), cluster_size=512)
    images.io(top, "qcow2", "write -P 2 32k 64k", "write -P 3 3M 4k")
    return (str(base), "qcow2"), (str(top), "qcow2")


def many_clusters(folder: Path) -> Row:
    """Counts need new blocks, and a longer table of them."""
    base = images.create(folder / "base.qcow2", 4 * MiB, cluster_size=512, refcount_bits=64)
    images.io(base, "qcow2", "write -P 1 0 32k")
    top = images.create(folder / "top.qcow2", 4 * MiB, backing=(base, "qcow2"), cluster_size=512, refcount_bits=64)
    images.io(top, "qcow2", "write -P 2 16k 2M", "write -P 3 3M 16k", "write -z 4k 8k")
    return (str(base), "qcow2"), (str(top), "qcow2")


def raw(folder: Path) -> Row:
    """The lower layer is raw, and shorter than the disk."""
    base = images.create(folder / "base.img", 256 * KiB, "raw")
    images.io(base, "raw", "write -P 1 0 256k")
    top = images.create(folder / "top.qcow2", MiB, backing=(base, "raw"))
    images.io(top, "qcow2", "write -P 2 128k 256k", "write -z 0 64k")
    return (str(base), "raw"), (str(top), "qcow2")


@pytest.mark.parametrize("into", [0, 1], ids=["commit", "pull"])
@pytest.mark.parametrize("make", [usual, with_a_point, longer, many_clusters, raw], ids=lambda each: each.__name__)
def test_a_power_cut_in_a_merge_changes_nothing(
    make: Callable[[Path], Row], into: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = make(tmp_path)
    base, top = row[0][0], row[1][0]
    shown, then = images.read(top), images.read(base, "qcow2", "kept") if make is with_a_point else b""
    target, target_format = row[into]
    # Several rounds, whose counts are put down while the next one writes.
    monkeypatch.setattr(merging, "ROUND", 1)
    monkeypatch.setattr(mapping, "WINDOW_GRANULES", 2048 if make is many_clusters else 64)

    found = recorded(target, Merge(row, (), into), monkeypatch)

    assert found.epochs[-1] == [], "what was written last has not been synced"
    assert sum(map(len, found.epochs)) > 1
    done = Path(target).read_bytes()
    states = list(found.left(random.Random(into)))
    assert states[-1] == done
    for content in dict.fromkeys(states):
        Path(target).write_bytes(content)
        assert images.read(top) == shown
        if then:
            assert images.read(base, "qcow2", "kept") == then
        if target_format == "qcow2":
            assert images.problems(target).keys() <= {"leaks"}
    Path(target).write_bytes(done)
    assert images.read(*row[into]) == shown
