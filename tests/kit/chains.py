"""Random chains of images, and merging a part of each by the mover: everything that it may meet, in miniature."""

from __future__ import annotations

import os
import random
import shutil
import struct
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tests.kit import images
from tests.kit.images import KiB, MiB

from snaptree.images.facts import read_facts
from snaptree.images.mover import copying, mapping, merging, sharing
from snaptree.images.mover.copying import Watch
from snaptree.images.mover.cost import foreseen
from snaptree.images.mover.merging import Merge, merge

CLUSTERS = (512, 2 * KiB, 4 * KiB, 64 * KiB, 64 * KiB, 64 * KiB, 256 * KiB, 2 * MiB)
BEYOND = 5 << 40
"""Where the data of some chains lies, to try offsets past 4 TiB."""


@dataclass
class Chain:
    """Images that stand on one another, lowest first, as ``(path, format)``; ``internals`` are tags by path."""

    folder: Path
    files: list[tuple[str, str]] = field(default_factory=list)
    internals: dict[str, str] = field(default_factory=dict)

    def sizes(self) -> list[int]:
        """What each shows, in bytes."""
        return [read_facts(path, form).virtual_size for path, form in self.files]


def make(chance: random.Random, folder: Path) -> Chain:
    """Two to five layers of random cluster and virtual sizes, with data, zeroes and discarded clusters."""
    chain = Chain(folder)
    usual = chance.choice((1, 3, 5)) * MiB + chance.choice((0, 512, 4096, 70 * 512))
    for number in range(chance.randint(2, 5)):
        raw = number == 0 and chance.random() < 0.3
        path = folder / f"layer{number}.{'raw' if raw else 'qcow2'}"
        size = usual if chance.random() < 0.6 else chance.choice((1, 2, 4, 6)) * MiB + chance.choice((0, 512, 9 * KiB))
        _layer(chance, chain, path, size, raw=raw)
    return chain


def _layer(chance: random.Random, chain: Chain, path: Path, size: int, *, raw: bool) -> None:
    form, width = ("raw" if raw else "qcow2"), 16
    if raw:
        images.create(path, size, "raw")
    else:
        options: dict[str, Any] = {"cluster_size": chance.choice(CLUSTERS)}
        if chance.random() < 0.15:
            # No internal snapshots in these: the planner does not let them grow.
            options["compat"], width = "0.10", 0
        elif chance.random() < 0.4:
            options["refcount_bits"] = width = chance.choice((1, 2, 4, 8, 32, 64))
        images.create(path, size, backing=chain.files[-1] if chain.files else None, **options)
    _write(chance, path, form, size, chance.randint(0, 7))
    if not raw and width >= 8 and not chain.files and chance.random() < 0.4:
        # Its clusters and tables are not to be written in place.
        images.run("qemu-img", "snapshot", "-c", "kept", path)
        chain.internals[str(path)] = "kept"
        _write(chance, path, form, size, chance.randint(0, 2))
    chain.files.append((str(path), form))


def _write(chance: random.Random, path: Path, form: str, size: int, count: int) -> None:
    commands = []
    for _ in range(count):
        start = chance.randrange(size // 512) * 512
        start = start // 65536 * 65536 if chance.random() < 0.5 else start
        length = min(size - start, chance.choice((512, 4 * KiB, 64 * KiB, 200 * KiB, MiB)))
        kind = f"write -P {chance.randint(1, 255)}"
        if form != "raw":
            kind = chance.choices((kind, "write -z", "write -z -u", "discard"), (65, 20, 10, 5))[0]
        commands.append(f"{kind} {start} {length}")
    if commands:
        images.io(path, form, *commands)


def one(seed: int, place: str) -> str:
    """Make a chain, merge a part of it, and compare all that is to stay; what was done, in a word.

    The mover's limits are made small, so that small images have several windows and rounds.
    """
    chance = random.Random(seed)
    before = mapping.WINDOW_GRANULES, merging.ROUND, copying.PIECE
    mapping.WINDOW_GRANULES = chance.choice((1, 8, 64, 1 << 18))
    merging.ROUND = chance.choice((1, MiB, 64 * MiB))
    copying.PIECE = chance.choice((64 * KiB, 8 * MiB))
    folder = Path(tempfile.mkdtemp(prefix=f"chain{seed}-", dir=place))
    try:
        return _merge(chance, make(chance, folder))
    except BaseException as error:
        error.add_note(f"chain {seed} in {place}")
        raise
    finally:
        mapping.WINDOW_GRANULES, merging.ROUND, copying.PIECE = before
        shutil.rmtree(folder)


def _merge(chance: random.Random, chain: Chain) -> str:
    files = chain.files
    lowest = chance.randint(0, len(files) - 2)
    highest = chance.randint(lowest + 1, len(files) - 1)
    row, below = tuple(files[lowest : highest + 1]), tuple(reversed(files[:lowest]))
    into = chance.choice((0, len(row) - 1))
    top, target = row[-1], row[into]
    shown = images.read(*top)
    kept = {path: images.read(path, "qcow2", tag) for path, tag in chain.internals.items()}
    qemu = _merged_by_qemu(chain, row) if chance.random() < 0.8 else None
    # Last: to XFS, what was read of a raw file's reserved blocks is no hole any more.
    facts = foreseen(row, below)
    assert not facts.by_qemu, facts.by_qemu
    share = not facts.unshared and chance.random() < 0.7
    copy = copy_of(target[0]) if share else None
    moved: list[int] = []
    copied = merge(Merge(row, below, into, copy, share), Watch(moved=moved.append))
    told = (facts.share_bytes if share else (facts.commit_bytes, facts.pull_bytes))[into != 0]
    assert copied == told, f"{copied} bytes were copied and {told} foretold"
    assert sum(moved) == (facts.commit_bytes, facts.pull_bytes)[into != 0]
    if copy is not None:
        os.rename(copy, target[0])
    assert images.read(*top) == shown, "the top shows something else while it stands on the lower layers"
    if target[1] == "qcow2":
        assert images.problems(target[0]) == {}
    if into != 0:
        under = ["-b", os.path.abspath(below[0][0]), "-F", below[0][1]] if below else ["-b", ""]
        images.run("qemu-img", "rebase", "-u", *under, target[0])
    merged = images.read(*target)
    assert merged[: len(shown)] == shown, "what was merged shows something else"
    if qemu is not None:
        assert qemu == shown, "QEMU merges to something else"
    for path, bytes_then in kept.items():
        assert images.read(path, "qcow2", "kept") == bytes_then, "an internal snapshot has changed"
    return (
        ("share" if share else "copy") + (" down" if into == 0 else " up") + (", as QEMU" if qemu is not None else "")
    )


def copy_of(path: str) -> str:
    """A copy that shares all blocks with the file."""
    copy = f"{path}.copy"
    with open(path, "rb") as source, open(copy, "x+b") as target:
        sharing.share_whole(source.fileno(), target.fileno(), path)
    return copy


def _merged_by_qemu(chain: Chain, row: tuple[tuple[str, str], ...]) -> bytes | None:
    """What ``qemu-img commit`` makes of a copy of the chain.

    ``None`` where it is known to go wrong, with a layer that is shorter than one above it, or cannot shrink.
    """
    sizes = chain.sizes()
    if len(set(sizes)) > 1:
        return None
    folder = chain.folder / "qemu"
    folder.mkdir()
    for path, _ in chain.files:
        shutil.copy(path, folder)
    top, base = folder / Path(row[-1][0]).name, folder / Path(row[0][0]).name
    images.run("qemu-img", "commit", "-q", "-f", row[-1][1], "-b", base, "-d", top)
    merged = images.read(base, row[0][1])
    shutil.rmtree(folder)
    return merged


def huge_pair(folder: Path, size: int, allocated: int) -> tuple[Path, Path]:
    """A base and an overlay with so many bytes allocated in each, half of them in the same places.

    Only headers and tables are written: all data is a hole.
    """
    base, top = folder / "huge.qcow2", folder / "huge-top.qcow2"
    images.create(base, size)
    images.create(top, size, backing=(base, "qcow2"))
    covered = 64 * KiB * 8192
    tables = allocated // covered
    for path, first in ((base, 0), (top, tables // 2)):
        _fill(path, first, tables)
    return base, top


def _fill(path: Path, first: int, tables: int) -> None:
    """Let the image have so many full L2 tables from the first on, with clusters in a row, and count all of them."""
    cluster, per_table, per_block = 64 * KiB, 8192, 32 * KiB
    with path.open("r+b") as file:
        header = file.read(104)
        (l1_at,) = struct.unpack_from(">Q", header, 40)
        old = -(-path.stat().st_size // cluster)
        data = old + tables
        used = data + tables * per_table
        blocks = -(-used // per_block) + 1
        table_clusters = -(-blocks * 8 // cluster)
        table_at = used
        total = used + table_clusters + blocks
        copied = np.uint64(1 << 63)
        for number in range(tables):
            start = np.uint64((data + number * per_table) * cluster)
            entries = start + np.arange(per_table, dtype=np.uint64) * np.uint64(cluster) | copied
            file.seek((old + number) * cluster)
            file.write(entries.astype(">u8").tobytes())
        l1 = (np.arange(old, old + tables, dtype=np.uint64) * np.uint64(cluster)) | copied
        file.seek(l1_at + first * 8)
        file.write(l1.astype(">u8").tobytes())
        counts = np.zeros(blocks * per_block, dtype=">u2")
        counts[:total] = 1
        # The refcount table and block that it was made with are given up.
        counts[[1, 2]] = 0
        file.seek((table_at + table_clusters) * cluster)
        file.write(counts.tobytes())
        places = np.arange(table_at + table_clusters, total, dtype=np.uint64) * np.uint64(cluster)
        file.seek(table_at * cluster)
        file.write(places.astype(">u8").tobytes())
        file.seek(48)
        file.write(struct.pack(">QI", table_at * cluster, table_clusters))


def many(numbers: range, place: str) -> Counter[str]:
    """Try all of these seeds; how often each kind of merge came."""
    return Counter(one(number, place) for number in numbers)
