"""What an image holds where, read from its tables, is what QEMU says."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from tests.kit import images
from tests.kit.images import KiB, MiB

from snaptree.errors import UnhealthyError
from snaptree.images.facts import open_to_read
from snaptree.images.measure import measure_row
from snaptree.images.tables import COMPRESSED, DATA, UNALLOCATED, ZERO, open_allocation

KINDS: list[dict[str, Any]] = [
    {"cluster_size": 512},
    {"cluster_size": 4 * KiB},
    {"cluster_size": 64 * KiB},
    {"cluster_size": 2 * MiB},
    {"cluster_size": 64 * KiB, "compat": "0.10"},
    {"cluster_size": 16 * KiB, "extended_l2": "on"},
    {"cluster_size": 2 * MiB, "extended_l2": "on"},
    {"cluster_size": 64 * KiB, "refcount_bits": 1},
    {"cluster_size": 64 * KiB, "compression_type": "zstd"},
]


def classes_of(path: Path, image_format: str, granule: int) -> bytes:
    descriptor = open_to_read(str(path))
    try:
        allocation = open_allocation(descriptor, str(path), image_format)
        end = -(-allocation.virtual_size // allocation.cluster) * allocation.cluster
        return allocation.classes(0, end, granule).tobytes()
    finally:
        os.close(descriptor)


def classes_by_qemu(path: Path, granule: int, size: int) -> bytes:
    graph = {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": str(path)}}
    extents = json.loads(images.run("qemu-img", "map", "--output=json", "json:" + json.dumps(graph)))
    found = bytearray(-(-size // granule))
    for extent in extents:
        kind = UNALLOCATED
        if extent["compressed"]:
            kind = COMPRESSED
        elif extent["data"]:
            kind = DATA
        elif extent["present"] and extent["zero"]:
            kind = ZERO
        first, last = extent["start"] // granule, -(-(extent["start"] + extent["length"]) // granule)
        found[first:last] = bytes([kind]) * (last - first)
    return bytes(found)


@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))
def test_tables_are_read_as_qemu_reads_them(tmp_path: Path, options: dict[str, Any]) -> None:
    chance = random.Random(str(options))
    size = 24 * MiB + 5 * KiB
    path = images.create(tmp_path / "a.qcow2", size, **options)
    cluster = options["cluster_size"]
    commands = [f"write -c -P 5 {size // 2 // cluster * cluster} {cluster}"]
    for _ in range(40):
        length = chance.choice([512, 4 * KiB, 64 * KiB, 300 * KiB])
        start = chance.randrange(0, size - length) // 512 * 512
        kind = chance.choice(["write -P 7", "write -P 9", "write -z", "write -z -u", "discard"])
        if options.get("compat") == "0.10" and kind != "discard":
            kind = "write -P 7"
        commands.append(f"{kind} {start} {length}")
    images.io(path, "qcow2", *commands)
    granule = cluster // 32 if "extended_l2" in options else cluster

    assert classes_of(path, "qcow2", granule)[: -(-size // granule)] == classes_by_qemu(path, granule, size)


def test_raw_holes_are_zeroes(tmp_path: Path) -> None:
    # qemu-img itself writes to the first block.
    path = images.create(tmp_path / "a.img", MiB, "raw")
    images.io(path, "raw", "write -P 1 64k 64k", "write -P 1 512k 4k")
    found = classes_of(path, "raw", 4 * KiB)
    assert {at for at, kind in enumerate(found) if kind == DATA} == {0, *range(16, 32), 128}, (
        "qemu-img writes to the first block"
    )
    assert set(found) == {DATA, ZERO}


@pytest.mark.parametrize("lower", KINDS, ids=lambda options: "-".join(map(str, options.values())))
def test_what_a_merge_moves_is_foretold(tmp_path: Path, lower: dict[str, Any]) -> None:
    """A commit's bytes by what it changes, told in advance, against the clusters that the upper layer shows."""
    base = images.create(tmp_path / "base.qcow2", 8 * MiB, **lower)
    top = images.create(tmp_path / "top.qcow2", 8 * MiB, backing=(base, "qcow2"))
    images.io(base, "qcow2", "write -P 1 0 1M")
    images.io(top, "qcow2", "write -P 2 512k 64k", "write -P 3 4M 130k", "write -z 6M 128k")
    before = images.own_data(base)

    facts = measure_row([(str(base), "qcow2"), (str(top), "qcow2")])

    unit = max(4 * KiB, min(lower["cluster_size"], 64 * KiB))
    assert facts.commit_bytes == 64 * KiB + -(-192 * KiB // unit) * unit
    assert facts.commit_zeroes == 128 * KiB
    held = MiB if "extended_l2" in lower else max(MiB, lower["cluster_size"])
    assert facts.pull_bytes == held - 64 * KiB
    images.run("qemu-img", "commit", "-q", "-f", "qcow2", top)
    grown = images.own_data(base) - before
    assert 0 <= facts.commit_grows - grown <= 2 * lower["cluster_size"] + 64 * KiB


def test_damaged_tables_are_an_error_and_no_crash(tmp_path: Path) -> None:
    path = images.create(tmp_path / "a.qcow2", MiB)
    images.io(path, "qcow2", "write -P 1 0 128k")
    for offset in (0x30000, 0x40000):  # L1, first L2
        spoiled = tmp_path / f"{offset}.qcow2"
        data = bytearray(path.read_bytes())
        data[offset : offset + 8] = (1 << 63 | 1 << 55).to_bytes(8, "big")
        spoiled.write_bytes(data)
        with pytest.raises(UnhealthyError):
            measure_row([(str(spoiled), "qcow2"), (str(path), "qcow2")])
