"""The mover on real images: thousands of random chains, and the cases that chance would seldom find.

``SNAPTREE_CHAINS`` says how many chains, ``SNAPTREE_SEED`` with which seed to begin.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.kit import chains, images
from tests.kit.images import GiB, KiB, MiB
from tests.kit.space import mounted

from snaptree.errors import CancelledError, NoSpaceError, NotFoundError, RefusedError, UnhealthyError
from snaptree.images import holes
from snaptree.images.mover import mapping, sharing, target
from snaptree.images.mover.copying import Watch
from snaptree.images.mover.cost import foreseen
from snaptree.images.mover.limiting import Limiter
from snaptree.images.mover.merging import Merge, merge
from snaptree.images.mover.sharing import can_share

Row = tuple[tuple[str, str], ...]


def chains_wanted(usual: int) -> tuple[int, int]:
    """How many, and the first seed."""
    return int(os.environ.get("SNAPTREE_CHAINS", usual)), int(os.environ.get("SNAPTREE_SEED", "0") or "0")


def try_chains(count: int, first: int, places: list[str]) -> Counter[str]:
    """So many chains, in two processes, shared out to the folders."""
    done: Counter[str] = Counter()
    step = 25
    with ProcessPoolExecutor(2) as processes:
        work = [
            processes.submit(chains.many, range(start, min(start + step, first + count)), places[number % len(places)])
            for number, start in enumerate(range(first, first + count, step))
        ]
        for each in work:
            done += each.result()
    return done


@contextlib.contextmanager
def file_systems(folder: Path, *kinds: str) -> Iterator[list[str]]:
    with contextlib.ExitStack() as stack:
        yield [str(stack.enter_context(mounted(folder, kind, 512 * MiB))) for kind in kinds]


def test_random_chains_show_the_same_when_they_are_merged(tmp_path: Path) -> None:
    count, first = chains_wanted(80)
    with file_systems(tmp_path, "xfs") as (xfs,):
        done = try_chains(count, first, [images.SCRATCH or str(tmp_path), xfs])
    print(dict(done))
    assert sum(done.values()) == count
    assert len(done) >= min(6, count // 10), f"too little was tried: {done}"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_thousands_of_random_chains_show_the_same_when_they_are_merged(tmp_path: Path) -> None:
    count, first = chains_wanted(5000)
    with file_systems(tmp_path, "xfs", "btrfs", "ext4") as places:
        done = try_chains(count, first + 100_000, [images.SCRATCH or str(tmp_path), *places])
    print(dict(done))
    assert sum(done.values()) == count
    assert len(done) == 8, f"not everything was tried: {done}"


# ---- cases of their own ---------------------------------------------------------------------------------------------


def pair(folder: Path, size: int = 4 * MiB, **options: Any) -> Row:
    """A base and an overlay, both empty."""
    base = images.create(folder / "base.qcow2", size, **options)
    top = images.create(folder / "top.qcow2", size, backing=(base, "qcow2"), **options)
    return ((str(base), "qcow2"), (str(top), "qcow2"))


def test_clusters_past_4_tib(tmp_path: Path) -> None:
    row = pair(tmp_path, chains.BEYOND + 4 * MiB)
    images.io(row[0][0], "qcow2", f"write -P 1 {chains.BEYOND} 192k")
    images.io(row[1][0], "qcow2", f"write -P 2 {chains.BEYOND + 64 * KiB} 64k", "write -P 3 1M 64k")
    for into in (1, 0):
        merge(Merge(row, (), into), Watch())
        assert images.problems(row[into][0]) == {}
    for pattern, start in ((1, 0), (2, 64 * KiB), (1, 128 * KiB)):
        images.io(row[0][0], "qcow2", f"read -P {pattern} {chains.BEYOND + start} 64k")
    images.io(row[0][0], "qcow2", "read -P 3 1M 64k", f"read -P 0 {2 * MiB} 1M")


@pytest.mark.parametrize("bits", [1, 8, 64])
def test_reference_counts_find_room_in_a_longer_table(tmp_path: Path, bits: int) -> None:
    """Clusters of 512 bytes: one cluster of the table has room for 64 blocks, which soon is too little."""
    row = pair(tmp_path, 24 * MiB, cluster_size=512, refcount_bits=bits)
    images.io(row[1][0], "qcow2", "write -P 5 0 20M")
    merge(Merge(row, (), 0), Watch())
    assert images.problems(row[0][0]) == {}
    images.io(row[0][0], "qcow2", "read -P 5 0 20M", "read -P 0 20M 4M")
    # The table is where QEMU expects it, too, when it takes more clusters.
    images.io(row[0][0], "qcow2", "write -P 6 20M 4M")
    assert images.problems(row[0][0]) == {}


def test_a_longer_layer_gives_the_lower_one_a_longer_l1_table(tmp_path: Path) -> None:
    base = images.create(tmp_path / "base.qcow2", MiB)
    top = images.create(tmp_path / "top.qcow2", 40 * GiB, backing=(base, "qcow2"), cluster_size=4096)
    row: Row = ((str(base), "qcow2"), (str(top), "qcow2"))
    images.io(base, "qcow2", "write -P 1 0 1M")
    images.io(top, "qcow2", "write -P 2 39G 64k", "write -P 3 512k 4k")
    merge(Merge(row, (), 0), Watch())
    assert images.info(base)["virtual-size"] == 40 * GiB
    assert images.problems(base) == {}
    images.io(base, "qcow2", "read -P 2 39G 64k", "read -P 3 512k 4k", "read -P 1 520k 504k", "read -P 0 1M 1G")


def test_a_disk_that_its_small_clusters_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """QEMU opens no image with an L1 table of more than 32 MiB."""
    base = images.create(tmp_path / "base.qcow2", MiB, cluster_size=512)
    top = images.create(tmp_path / "top.qcow2", 200 * GiB, backing=(base, "qcow2"))
    images.io(base, "qcow2", "write -P 1 0 1M")
    images.io(top, "qcow2", "write -P 2 0 64k")
    before = base.read_bytes()
    with pytest.raises(RefusedError, match="clusters of 512 bytes"):
        merge(Merge(((str(base), "qcow2"), (str(top), "qcow2")), (), 0), Watch())
    assert base.read_bytes() == before
    images.io(top, "qcow2", "read -P 2 0 64k", "read -P 1 64k 960k", "read -P 0 1M 1M")


def test_the_table_of_reference_counts_never_becomes_too_long_for_qemu(tmp_path: Path) -> None:
    """It has at most 8 MiB, which twice the room would exceed."""
    row = pair(tmp_path, 4 * MiB, cluster_size=512, refcount_bits=64)
    images.io(row[1][0], "qcow2", "write -P 2 2M 64k")
    os.truncate(row[0][0], 17 * GiB)
    merge(Merge(row, (), 0), Watch())
    images.io(row[0][0], "qcow2", "read -P 2 2M 64k")
    os.truncate(row[0][0], 32 * GiB)
    images.io(row[1][0], "qcow2", "write -P 3 3M 64k")
    with pytest.raises(RefusedError, match="reference counts"):
        merge(Merge(row, (), 0), Watch())
    images.io(row[1][0], "qcow2", "read -P 2 2M 64k", "read -P 3 3M 64k")


def test_what_lies_past_the_end_of_a_layer_does_not_show_when_it_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped merge leaves there what it has brought, and an internal snapshot with memory its memory."""
    monkeypatch.setattr(mapping, "WINDOW_GRANULES", 16)
    base = images.create(tmp_path / "base.qcow2", MiB, cluster_size=4096)
    images.create(tmp_path / "top.qcow2", 32 * MiB, backing=(base, "qcow2"), cluster_size=4096)
    row: Row = ((str(base), "qcow2"), (str(tmp_path / "top.qcow2"), "qcow2"))
    images.io(row[1][0], "qcow2", "write -P 1 0 64k", "write -P 2 20M 8M")

    def fill(self: target.Qcow2Target, size: int) -> None:
        self.finish_round()
        raise NoSpaceError("the last write")

    with monkeypatch.context() as stopped:
        stopped.setattr(target.Qcow2Target, "finish", fill)
        with pytest.raises(NoSpaceError):
            merge(Merge(row, (), 0), Watch())
    # The guest has gone back to nothing there.
    images.create(tmp_path / "top.qcow2", 32 * MiB, backing=(base, "qcow2"), cluster_size=4096)
    images.io(row[1][0], "qcow2", "write -P 3 1M 64k")
    shown = images.read(row[1][0])
    merge(Merge(row, (), 0), Watch())
    assert images.read(row[0][0]) == shown
    assert images.problems(row[0][0]) == {}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_device_that_cannot_tell_its_holes_is_all_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Block devices say EINVAL; what fails otherwise is no hole either, and stops the merge."""
    device = tmp_path / "device"
    device.write_bytes(b"\7" * MiB)
    lower = images.create(tmp_path / "lower.qcow2", MiB, backing=(device, "raw"))
    upper = images.create(tmp_path / "upper.qcow2", MiB, backing=(lower, "qcow2"), cluster_size=4096)
    images.io(upper, "qcow2", "write -P 1 0 4k")
    shown = images.read(upper)
    seek = os.lseek

    def like_a_device(descriptor: int, offset: int, whence: int) -> int:
        if whence in (os.SEEK_DATA, os.SEEK_HOLE) and os.path.samestat(os.fstat(descriptor), device.stat()):
            raise OSError(number, os.strerror(number))
        return seek(descriptor, offset, whence)

    monkeypatch.setattr(os, "lseek", like_a_device)
    row, below = ((str(lower), "qcow2"), (str(upper), "qcow2")), ((str(device), "raw"),)
    with contextlib.nullcontext() if number == errno.EINVAL else pytest.raises(OSError, match=os.strerror(number)):
        merge(Merge(row, below, 0), Watch())
    assert images.read(upper) == shown
    if number == errno.EINVAL:
        assert images.read(lower) == shown


COPIED = 1 << 63


def damaged(path: str, what: str) -> None:
    """Write into the tables of a small image what QEMU itself would not write over."""
    data = Path(path).read_bytes()

    def word(at: int) -> int:
        return int.from_bytes(data[at : at + 8], "big")

    l1, table = word(40), word(48)
    l2, block = word(l1) & ~COPIED, word(table)
    entry = l2 + 2 * 8
    at, value = {
        "data on the L1 table": (entry, l1 | COPIED),
        "data on an L2 table": (entry, l2 | COPIED),
        "zeroes on a refcount block": (entry, block | COPIED | 1),
        "zeroes past the end": (entry, len(data) // (64 * KiB) * 64 * KiB + MiB | COPIED | 1),
        "zeroes between clusters": (entry, l2 + 64 * KiB + 512 | COPIED | 1),
        "counts on the L1 table": (table, l1),
        "counts far away": (table, 1 << 50),
        "L2 tables on the L1 table": (l1, l1 | COPIED),
        "the refcount table on the L1 table": (48, l1),
    }[what]
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(value.to_bytes(8, "big"))
        if not what.startswith(("data", "zeroes")):
            # Found at once: bits that whoever writes has to clear are not cleared either.
            file.seek(88)
            file.write((1 << 7).to_bytes(8, "big"))


@pytest.mark.parametrize(
    "what",
    [
        "data on the L1 table",
        "data on an L2 table",
        "zeroes on a refcount block",
        "zeroes past the end",
        "zeroes between clusters",
        "counts on the L1 table",
        "counts far away",
        "L2 tables on the L1 table",
        "the refcount table on the L1 table",
    ],
)
def test_no_table_is_overwritten_however_damaged_the_image_is(tmp_path: Path, what: str) -> None:
    row = pair(tmp_path)
    images.io(row[0][0], "qcow2", "write -P 1 0 1M")
    images.io(row[1][0], "qcow2", "write -P 2 128k 64k")
    damaged(row[0][0], what)
    before = Path(row[0][0]).read_bytes()
    with pytest.raises(UnhealthyError, match="damaged"):
        merge(Merge(row, (), 0), Watch())
    assert Path(row[0][0]).read_bytes() == before


@pytest.mark.parametrize("count", [0, 2])
def test_only_what_is_counted_once_is_written_in_place(tmp_path: Path, count: int) -> None:
    """The flag that says so may be wrong: two places of the disk in one cluster, say."""
    row = pair(tmp_path)
    images.io(row[0][0], "qcow2", "write -P 1 0 256k")
    images.io(row[1][0], "qcow2", "write -P 2 128k 64k")
    data = Path(row[0][0]).read_bytes()
    l2 = int.from_bytes(data[int.from_bytes(data[40:48], "big") :][:8], "big") & ~COPIED
    block = int.from_bytes(data[int.from_bytes(data[48:56], "big") :][:8], "big")
    first = data[l2 : l2 + 8]
    with open(row[0][0], "r+b") as file:
        file.seek(l2 + 2 * 8)
        file.write(first)
        file.seek(block + (int.from_bytes(first, "big") & ~COPIED) // (64 * KiB) * 2)
        file.write(count.to_bytes(2, "big"))
    merge(Merge(row, (), 0), Watch())
    images.io(row[0][0], "qcow2", "read -P 1 0 128k", "read -P 2 128k 64k", "read -P 1 192k 64k")


def test_a_cluster_past_the_end_of_the_file_that_is_counted_is_not_taken(tmp_path: Path) -> None:
    """A power cut may leave an internal snapshot's cluster there: all of it reads as zeroes."""
    row = pair(tmp_path)
    images.io(row[0][0], "qcow2", "write -P 1 0 128k", "write -P 9 1M 64k", "write -z 1M 64k")
    images.io(row[1][0], "qcow2", "write -P 2 128k 64k")
    images.run("qemu-img", "snapshot", "-c", "then", row[0][0])
    end = os.stat(row[0][0]).st_size
    data = Path(row[0][0]).read_bytes()
    block = int.from_bytes(data[int.from_bytes(data[48:56], "big") :][:8], "big")
    with open(row[0][0], "r+b") as file:
        file.seek(block + -(-end // (64 * KiB)) * 2)
        file.write((1).to_bytes(2, "big"))
    merge(Merge(row, (), 0), Watch())
    taken = {each["offset"] for each in images.map_of(row[0][0])}
    assert -(-end // (64 * KiB)) * 64 * KiB not in taken
    assert images.problems(row[0][0]) == {"leaks": 1}


def test_a_point_is_the_first_of_its_name_and_never_the_active_state(tmp_path: Path) -> None:
    source = images.create(tmp_path / "source.qcow2", MiB)
    for pattern in (1, 2):
        images.io(source, "qcow2", f"write -P {pattern} 0 64k")
        images.run("qemu-img", "snapshot", "-c", "same", source)
    images.io(source, "qcow2", "write -P 3 0 64k")
    new = images.create(tmp_path / "new.qcow2", MiB)
    row: Row = ((str(source), "qcow2"), (str(new), "qcow2"))
    with pytest.raises(NotFoundError, match="'gone'"):
        merge(Merge(row, (), 1, copy=str(new), tag="gone"), Watch())
    merge(Merge(row, (), 1, copy=str(new), tag="same"), Watch())
    images.io(new, "qcow2", "read -P 1 0 64k")


def test_a_source_that_is_cut_within_a_large_block_is_shared(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(mounted(tmp_path, "xfs", 512 * MiB))
        row = pair(folder)
        images.io(row[0][0], "qcow2", "write -P 1 0 256k")
        images.io(row[1][0], "qcow2", "write -P 2 128k 64k")
        os.truncate(row[1][0], os.stat(row[1][0]).st_size - 64 * KiB + 20 * KiB)
        shown = images.read(row[1][0])
        asked: list[int] = []
        share = sharing.share_range

        def shared(source: int, at: int, length: int, target: int, to: int, path: str) -> None:
            asked.append(length)
            share(source, at, length, target, to, path)

        copy = chains.copy_of(row[0][0])
        with pytest.MonkeyPatch.context() as patch:
            status = os.fstatvfs

            class Large:
                f_bsize = 16 * KiB

            patch.setattr(sharing, "share_range", shared)
            patch.setattr(os, "fstatvfs", lambda descriptor: Large() if status(descriptor) else None)
            merge(Merge(row, (), 0, copy, share=True), Watch())
        assert asked == [16 * KiB]
        assert images.read(copy) == shown


@pytest.mark.parametrize("what", ["internal", "longer", "counts"])
def test_the_room_for_tables_is_foretold(tmp_path: Path, what: str) -> None:
    """Tables that an internal snapshot needs as they are, an L1 table that grows, and one of reference counts."""
    base = images.create(tmp_path / "base.qcow2", 8 * MiB, cluster_size=512)
    top = images.create(tmp_path / "top.qcow2", (2 * GiB if what == "longer" else 8 * MiB), backing=(base, "qcow2"))
    images.io(base, "qcow2", f"write -P 1 0 {8 if what == 'internal' else 2}M")
    if what == "internal":
        images.run("qemu-img", "snapshot", "-c", "then", base)
        images.io(top, "qcow2", *(f"write -P 2 {each * 64 * KiB} 64k" for each in range(0, 128, 4)))
    else:
        images.io(top, "qcow2", f"write -P 2 {2 * MiB} {6 * MiB if what == 'counts' else 64 * KiB}")
    row: Row = ((str(base), "qcow2"), (str(top), "qcow2"))
    before = base.stat().st_size
    told = foreseen(row).commit_grows
    merge(Merge(row, (), 0), Watch())
    grown = base.stat().st_size - before
    assert grown <= told <= grown * 1.2, (grown, told)


def test_what_a_stopped_pull_has_copied_is_given_back(tmp_path: Path) -> None:
    row = pair(tmp_path, 64 * MiB)
    images.io(row[0][0], "qcow2", "write -P 1 0 48M")
    before = -(-os.stat(row[1][0]).st_size // 65536) * 65536
    moved: list[int] = []
    with pytest.raises(CancelledError):
        merge(Merge(row, (), 1), Watch(moved.append, lambda: len(moved) > 2))
    assert sum(moved) > 0
    assert images.problems(row[1][0]) == {}
    holes.cut_tail(row[1][0])
    assert os.stat(row[1][0]).st_size == before
    images.io(row[1][0], "qcow2", "read -P 1 0 48M")


def test_the_limit_holds(tmp_path: Path) -> None:
    row = pair(tmp_path, 64 * MiB)
    images.io(row[0][0], "qcow2", "write -P 1 0 48M")
    began = time.monotonic()
    merge(Merge(row, (), 1), Watch(limiter=Limiter(32 * MiB)))
    # The first piece goes at once.
    assert time.monotonic() - began > (48 - 8 * 2) / 32


def test_holes_stay_holes(tmp_path: Path) -> None:
    """Clusters that are there and have no blocks need none in the copy; where data was, zeroes come."""
    row = pair(tmp_path, 64 * MiB)
    images.io(row[0][0], "qcow2", "write -P 1 0 16M")
    images.io(row[1][0], "qcow2", "write -P 2 0 64M")
    _punch(row[1][0])
    before = os.stat(row[0][0]).st_blocks
    merge(Merge(row, (), 0), Watch())
    assert os.stat(row[0][0]).st_blocks < before
    images.io(row[0][0], "qcow2", "read -P 0 0 64M")
    assert images.problems(row[0][0]) == {}


def _punch(path: str) -> None:
    """Take the blocks of all data away; the tables stay."""
    from snaptree.images import durable

    with durable.opened_for_writing(path) as descriptor:
        for entry in images.map_of(path):
            durable.punch_hole(descriptor, entry["offset"], entry["length"], path)


@pytest.mark.parametrize("used", ["data", "compressed", "internal", "table"])
def test_no_hole_is_punched_into_what_is_used_and_counted_as_free(tmp_path: Path, used: str) -> None:
    """A crash under an unsafe cache leaves such counts, and "qemu-img check" mends them."""
    image = images.create(tmp_path / "image.qcow2", 4 * MiB)
    images.io(image, "qcow2", "write -P 1 0 256k", "write -c -P 2 1M 64k")
    first = images.map_of(image)[0]["offset"]
    images.run("qemu-img", "snapshot", "-c", "then", image)
    images.io(image, "qcow2", "write -P 3 0 64k", "write -P 4 2M 64k", "write -P 5 3M 64k", "discard 3M 64k")
    places = {each["start"]: each["offset"] for each in images.map_of(image)}
    l1 = int.from_bytes(image.read_bytes()[40:48], "big")
    l2 = int.from_bytes(image.read_bytes()[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    packed = int.from_bytes(image.read_bytes()[l2 + 16 * 8 :][:8], "big") & ((1 << 54) - 1)
    place = {"data": places[2 * MiB], "compressed": packed, "internal": first, "table": l2}[used]
    shown, then = images.read(image), images.read(image, tag="then")
    assert holes.punch_free(str(image)) > 0, "what is free for certain is given back"
    assert (images.read(image), images.read(image, tag="then")) == (shown, then)

    with image.open("r+b") as file:
        table = int.from_bytes(image.read_bytes()[48:56], "big")
        file.seek(int.from_bytes(image.read_bytes()[table : table + 8], "big") + place // (64 * KiB) * 2)
        file.write(bytes(2))
    before = image.read_bytes()
    assert images.problems(image)
    assert holes.punch_free(str(image)) == 0
    assert image.read_bytes() == before


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "ext4"])
def test_a_full_disk_stops_a_merge_and_everything_shows_the_same(tmp_path: Path, kind: str) -> None:
    with mounted(tmp_path, kind, 512 * MiB) as folder:
        row = pair(folder, 600 * MiB)
        chunk = 180 * MiB
        images.io(row[0][0], "qcow2", f"write -P 1 0 {chunk}")
        with (folder / "filler").open("wb") as filler:
            free = os.statvfs(folder)
            os.posix_fallocate(filler.fileno(), 0, free.f_bavail * free.f_frsize - 40 * MiB)
        if can_share(str(folder)):
            # Sharing needs no room for data.
            assert foreseen(row).unshared == ""
        else:
            with pytest.raises(NoSpaceError):
                merge(Merge(row, (), 1), Watch())
        assert images.problems(row[1][0]) == {}
        images.io(row[1][0], "qcow2", f"read -P 1 0 {chunk}")


def test_file_systems_are_asked_by_trying(tmp_path: Path) -> None:
    with file_systems(tmp_path, "xfs", "btrfs", "ext4") as (xfs, btrfs, ext4):
        assert can_share(xfs) and can_share(btrfs)
        assert not can_share(ext4)
        assert os.listdir(xfs) == os.listdir(btrfs) == []


def test_what_only_qemu_can_merge_is_named(tmp_path: Path) -> None:
    plain = images.create(tmp_path / "plain.qcow2", MiB)
    kinds: dict[str, dict[str, Any]] = {"extended": {"extended_l2": "on"}}
    for name, options in kinds.items():
        top = images.create(tmp_path / f"{name}.qcow2", MiB, backing=(plain, "qcow2"), **options)
        why = foreseen(((str(plain), "qcow2"), (str(top), "qcow2"))).by_qemu
        assert "extended L2" in why
    packed = images.create(tmp_path / "packed.qcow2", MiB, backing=(plain, "qcow2"))
    images.io(packed, "qcow2", "write -c -P 1 0 64k")
    assert "compressed" in foreseen(((str(plain), "qcow2"), (str(packed), "qcow2"))).by_qemu
    # What is compressed beneath is not touched, and no reason.
    above = images.create(tmp_path / "above.qcow2", MiB, backing=(packed, "qcow2"))
    higher = images.create(tmp_path / "higher.qcow2", MiB, backing=(above, "qcow2"))
    images.io(higher, "qcow2", "write -P 1 0 64k")
    assert foreseen(((str(above), "qcow2"), (str(higher), "qcow2")), ((str(packed), "qcow2"),)).by_qemu == ""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_huge_image_needs_little_memory(tmp_path: Path) -> None:
    """10 TiB with 1 TiB allocated in each of two layers: tables only, the data is a hole."""
    row: Row = tuple((str(path), "qcow2") for path in chains.huge_pair(tmp_path, 10 << 40, 1 << 40))
    program = (
        "import resource, sys; from snaptree.images.mover.copying import Watch; "
        "from snaptree.images.mover.cost import foreseen; from snaptree.images.mover.merging import Merge, merge; "
        "row = tuple((path, 'qcow2') for path in sys.argv[1:]); "
        "told = foreseen(row).commit_bytes; assert merge(Merge(row, (), 0), Watch()) == told, told; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peak = int(images.run(sys.executable, "-c", program, *(path for path, _ in row))) << 10
    assert peak < 200 << 20, f"{peak >> 20} MiB"
    print(f"{peak >> 20} MiB")
