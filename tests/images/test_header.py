"""The header reader against images that QEMU made, and against headers that nobody should make."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snaptree.errors import UnhealthyError
from snaptree.images import header as headers
from snaptree.images.facts import read_facts


def qemu_img(*arguments: str) -> str:
    return subprocess.run(["qemu-img", *arguments], check=True, capture_output=True, text=True).stdout


def read(path: Path) -> headers.Header:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return headers.read_header(descriptor, str(path))
    finally:
        os.close(descriptor)


def hashed(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return headers.header_hash(descriptor, headers.read_header(descriptor, str(path)))
    finally:
        os.close(descriptor)


def image(tmp_path: Path, *options: str, size: str = "64M", name: str = "a.qcow2") -> Path:
    path = tmp_path / name
    qemu_img("create", "-q", "-f", "qcow2", *options, str(path), size)
    return path


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("version", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster", [512, 65536, 2 << 20])
def test_reads_what_qemu_wrote(tmp_path: Path, version: str, cluster: int) -> None:
    image(tmp_path, name="base.qcow2")
    path = image(
        tmp_path, "-o", f"compat={version},cluster_size={cluster}", "-b", "base.qcow2", "-F", "qcow2", name="o.qcow2"
    )
    found = read(path)
    assert found.version == (2 if version == "0.10" else 3)
    assert (found.cluster_size, found.virtual_size, found.refcount_bits) == (cluster, 64 << 20, 16)
    assert (found.backing, found.backing_format) == ("base.qcow2", "qcow2")
    assert not (found.dirty or found.corrupt or found.external_data or found.extended_l2 or found.encrypted)


def test_reads_features(tmp_path: Path) -> None:
    path = image(tmp_path, "-o", "extended_l2=on,lazy_refcounts=on,compression_type=zstd,refcount_bits=64")
    found = read(path)
    assert found.extended_l2 and found.lazy_refcounts
    assert (found.compression, found.refcount_bits) == ("zstd", 64)
    data = image(tmp_path, "-o", f"data_file={tmp_path / 'd.raw'}", name="d.qcow2")
    assert read(data).external_data
    assert read_facts(str(data), "qcow2").problem == "external-data"


def test_reads_internal_snapshots_and_bitmaps(tmp_path: Path) -> None:
    path = image(tmp_path)
    assert not read_facts(str(path), "qcow2").written
    qemu_img("snapshot", "-c", "one", str(path))
    qemu_img("resize", "-q", str(path), "128M")
    qemu_img("snapshot", "-c", "two", str(path))
    facts = read_facts(str(path), "qcow2")
    assert facts.written and facts.bitmaps == ()
    assert [(each.name, each.virtual_size) for each in facts.internals] == [("one", 64 << 20), ("two", 128 << 20)]
    assert abs(facts.internals[0].created - time.time()) < 120
    assert facts.unchanged_since == ("two",)
    qemu_img("bitmap", "--add", str(path), "daily")
    assert read_facts(str(path), "qcow2").bitmaps == ("daily",)


def test_written_since_an_internal_snapshot(tmp_path: Path) -> None:
    path = image(tmp_path)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 64k", str(path)], check=True, capture_output=True)
    qemu_img("snapshot", "-c", "one", str(path))
    assert read_facts(str(path), "qcow2").unchanged_since == ("one",)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 64k", str(path)], check=True, capture_output=True)
    assert read_facts(str(path), "qcow2").unchanged_since == ()


def test_the_hash_finds_writes_but_not_a_new_backing_name(tmp_path: Path) -> None:
    image(tmp_path, name="base.qcow2")
    image(tmp_path, name="other.qcow2")
    path = image(tmp_path, "-b", "base.qcow2", "-F", "qcow2", name="o.qcow2")
    before = hashed(path)
    qemu_img("rebase", "-u", "-b", "other.qcow2", "-F", "qcow2", str(path))
    assert hashed(path) == before
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 512", str(path)], check=True, capture_output=True)
    written = hashed(path)
    assert written != before
    qemu_img("snapshot", "-c", "one", str(path))
    assert hashed(path) not in (before, written)


HOSTILE = [
    (20, struct.pack(">I", 8), "clusters of 2"),
    (20, struct.pack(">I", 22), "clusters of 2"),
    (20, struct.pack(">I", 0xFFFFFFFF), "clusters of 2"),
    (24, struct.pack(">Q", 1 << 63), "virtual size"),
    (24, struct.pack(">Q", 1 << 50), "too small"),
    (32, struct.pack(">I", 9), "not known"),
    (36, struct.pack(">I", 0xFFFFFFFF), "L1 table"),
    (36, struct.pack(">I", 0), "too small"),
    (40, struct.pack(">Q", 12345), "L1 table at"),
    (40, struct.pack(">Q", 1 << 60), "L1 table at"),
    (48, struct.pack(">Q", 7), "refcount table"),
    (56, struct.pack(">I", 0xFFFFFFFF), "refcount table"),
    (60, struct.pack(">IQ", 0xFFFFFFFF, 65536), "internal snapshots"),
    (60, struct.pack(">IQ", 1, 1 << 63), "internal snapshots"),
    (60, struct.pack(">IQ", 1, 17), "internal snapshots"),
    (72, struct.pack(">Q", 1 << 40), "features"),
    (96, struct.pack(">I", 7), "reference counts"),
    (100, struct.pack(">I", 105), "header of"),
    (100, struct.pack(">I", 1 << 20), "header of"),
    (4, struct.pack(">I", 4), "version 4"),
    (8, struct.pack(">QI", 1 << 40, 5), "backing file name"),
    (8, struct.pack(">QI", 500, 1024), "backing file name"),
    (8, struct.pack(">QI", 65530, 100), "backing file name"),
    (8, struct.pack(">QI", 4, 5), "backing file name"),
    (112, struct.pack(">II", 0xE2792ACA, 1 << 30), "extension"),
    (104, b"\x07", "compression"),
]


@pytest.mark.parametrize(("offset", "data", "says"), HOSTILE)
def test_refuses_hostile_headers(tmp_path: Path, offset: int, data: bytes, says: str) -> None:
    path = image(tmp_path)
    patch(path, offset, data)
    with pytest.raises(UnhealthyError) as caught:
        read(path)
    assert says in caught.value.message and str(path) in caught.value.message and caught.value.hint
    assert read_facts(str(path), "qcow2").problem == "damaged"


def test_a_backing_format_that_is_said_twice_is_refused(tmp_path: Path) -> None:
    path = image(tmp_path)
    twice = struct.pack(">II8s", 0xE2792ACA, 3, b"raw") + struct.pack(">II8s", 0xE2792ACA, 5, b"qcow2") + bytes(8)
    patch(path, 112, twice)
    with pytest.raises(UnhealthyError, match="twice"):
        read(path)


def test_many_snapshots_with_huge_tables_cost_little(tmp_path: Path) -> None:
    """65,536 snapshots that all name one L1 table of 32 MiB: 2 TiB to read, if it were read."""
    path = image(tmp_path)
    entry = struct.pack(">QIHHIIQII", 1 << 30, 4 << 20, 1, 1, 0, 0, 0, 0, 16) + struct.pack(">QQ", 0, 64 << 20) + b"aa"
    entry = entry.ljust(64, b"\0")
    patch(path, 1 << 26, entry * 65_536)
    patch(path, 60, struct.pack(">IQ", 65_536, 1 << 26))
    os.truncate(path, (1 << 30) + (64 << 20))
    begin = time.monotonic()
    script = (
        "import re, sys; from snaptree.images.facts import read_facts; facts = read_facts(sys.argv[1], 'qcow2');"
        "print(len(facts.internals), re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    )
    said = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert time.monotonic() - begin < 5
    count, kibibytes = map(int, said.stdout.split())
    assert count == 65_536
    assert kibibytes < 400 << 10


def test_offsets_that_no_file_has_are_facts_and_no_errors(tmp_path: Path) -> None:
    path = image(tmp_path)
    entry = struct.pack(">QIHHIIQII", (1 << 64) - (1 << 16), 1, 1, 1, 0, 0, 0, 0, 0) + b"aa"
    patch(path, 1 << 26, entry)
    patch(path, 60, struct.pack(">IQ", 1, 1 << 26))
    assert read_facts(str(path), "qcow2").problem == "damaged"
    other = image(tmp_path, name="b.qcow2")
    qemu_img("bitmap", "--add", str(other), "daily")
    found = next(at for magic, at, _ in read(other).extensions if magic == headers.EXTENSION_BITMAPS)
    patch(other, found + 16, b"\xff" * 8)
    assert read_facts(str(other), "qcow2").problem == "damaged"


def test_problems_have_names(tmp_path: Path) -> None:
    path = image(tmp_path)
    assert read_facts(str(tmp_path / "none.qcow2"), "qcow2").problem == "missing"
    assert not read_facts(str(tmp_path / "none.qcow2"), "qcow2").exists
    assert read_facts(str(tmp_path), "qcow2").problem == "unreadable"
    os.mkfifo(tmp_path / "fifo")
    assert read_facts(str(tmp_path / "fifo"), "raw").problem == "unreadable"
    (tmp_path / "link.qcow2").symlink_to(path)
    assert read_facts(str(tmp_path / "link.qcow2"), "qcow2").problem == "unreadable"
    (tmp_path / "text.qcow2").write_bytes(b"hello")
    assert read_facts(str(tmp_path / "text.qcow2"), "qcow2").problem == "not-qcow2"
    assert read_facts(str(tmp_path / "text.qcow2"), None).problem == "not-qcow2"
    patch(path, 72, struct.pack(">Q", 2))
    facts = read_facts(str(path), None)
    assert facts.corrupt and facts.problem == "corrupt"
    patch(path, 72, struct.pack(">Q", 1))
    assert read_facts(str(path), None).dirty and not read_facts(str(path), None).problem
    os.truncate(path, 65536 * 2)
    assert read_facts(str(path), "qcow2").problem == "truncated"


def test_a_raw_image_is_never_looked_into(tmp_path: Path) -> None:
    path = image(tmp_path, name="disk.img")
    os.truncate(path, 1_000_001)
    facts = read_facts(str(path), "raw")
    assert (facts.format, facts.virtual_size, facts.backing, facts.problem) == ("raw", 1_000_448, None, "")
    assert facts.identity is not None and facts.identity.header == ""
    assert read_facts(str(path), None).problem == "unknown-format"


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 700), st.binary(min_size=1, max_size=16)), min_size=1, max_size=6))
def test_no_header_makes_reading_facts_fail(tmp_path: Path, changes: list[tuple[int, bytes]]) -> None:
    seed = tmp_path / "seed.qcow2"
    if not seed.exists():
        image(tmp_path, name="base.qcow2")
        image(tmp_path, "-b", "base.qcow2", "-F", "qcow2", name="seed.qcow2")
        qemu_img("snapshot", "-c", "one", str(seed))
        qemu_img("bitmap", "--add", str(seed), "daily")
    path = tmp_path / "fuzzed.qcow2"
    content = bytearray(seed.read_bytes())
    for offset, data in changes:
        content[offset : offset + len(data)] = data
    path.write_bytes(content)
    begin = time.monotonic()
    facts = read_facts(str(path), "qcow2")
    assert time.monotonic() - begin < 2
    assert bool(facts.problem) == bool(facts.detail)


def test_reading_facts_is_cheap(tmp_path: Path) -> None:
    path = str(image(tmp_path, size="1T"))
    best = 1.0
    for _ in range(50):
        begin = time.perf_counter()
        read_facts(path, "qcow2")
        best = min(best, time.perf_counter() - begin)
    assert best < 0.001
