"""Empty overlays made by hand, judged by qemu-img."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snaptree.errors import UsageError
from snaptree.images.header import EXTENSION_BACKING_FORMAT, read_header
from snaptree.images.layout import empty_overlay

SIZES = [512, 65536, 1 << 30, (10 << 30) + 512, 1 << 40, 1 << 46]


def make(path: Path, size: int, **options: Any) -> None:
    writes, length = empty_overlay(size, **options)
    with path.open("wb") as file:
        for offset, data in writes:
            file.seek(offset)
            file.write(data)
            assert offset + len(data) <= length
        file.truncate(length)


def alone(path: Path) -> str:
    """The image without what its header names: ``check`` would open that, too."""
    return "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": str(path)}})


def check(path: Path) -> dict[str, Any]:
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", alone(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert not found.get("leaks") and not found.get("corruptions") and not found["check-errors"]
    return found


def info(path: Path) -> dict[str, Any]:
    done = subprocess.run(
        ["qemu-img", "info", "-f", "qcow2", "--output=json", str(path)], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("cluster_bits", range(9, 22))
def test_every_cluster_size_is_clean(tmp_path: Path, cluster_bits: int) -> None:
    path = tmp_path / "o.qcow2"
    for size in SIZES:
        per_l2 = (1 << cluster_bits) // 8 << cluster_bits
        if -(-size // per_l2) * 8 > 32 << 20:
            with pytest.raises(UsageError, match="too large"):
                empty_overlay(size, cluster_bits=cluster_bits)
            continue
        make(path, size, cluster_bits=cluster_bits)
        check(path)
        found = info(path)
        assert (found["virtual-size"], found["cluster-size"]) == (size, 1 << cluster_bits)


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_every_refcount_width_is_clean(tmp_path: Path, refcount_bits: int, cluster_bits: int) -> None:
    path = tmp_path / "o.qcow2"
    size = min(1 << 40, 1 << (2 * cluster_bits + 16))
    make(path, size, cluster_bits=cluster_bits, refcount_bits=refcount_bits)
    check(path)
    assert info(path)["format-specific"]["data"]["refcount-bits"] == refcount_bits


@pytest.mark.parametrize("cluster_bits", [14, 16, 21])
def test_extended_l2_and_features(tmp_path: Path, cluster_bits: int) -> None:
    path = tmp_path / "o.qcow2"
    make(
        path, 1 << 40, cluster_bits=cluster_bits, extended_l2=True, lazy_refcounts=True, compression="zstd",
        backing_name="base.img", backing_format="raw",
    )  # fmt: skip
    check(path)
    found = info(path)
    data = found["format-specific"]["data"]
    assert data["extended-l2"] and data["lazy-refcounts"] and data["compression-type"] == "zstd"
    assert (found["backing-filename"], found["backing-filename-format"]) == ("base.img", "raw")


def test_what_cannot_be_is_refused() -> None:
    for options in ({"cluster_bits": 8}, {"cluster_bits": 22}, {"cluster_bits": 13, "extended_l2": True},
                    {"refcount_bits": 3}, {"compression": "lz4"}, {"backing_name": "x" * 1024},
                    {"cluster_bits": 9, "backing_name": "x" * 400}):  # fmt: skip
        with pytest.raises(UsageError):
            empty_overlay(1 << 20, **options)
    for size in (-512, 1000):
        with pytest.raises(UsageError):
            empty_overlay(size)


def test_the_backing_format_lies_in_the_first_sector(tmp_path: Path) -> None:
    path = tmp_path / "o.qcow2"
    make(path, 1 << 30, backing_name="b" * 1023, backing_format="qcow2")
    descriptor = os.open(path, os.O_RDONLY)
    found = read_header(descriptor, str(path))
    os.close(descriptor)
    magic, at, data = found.extensions[0]
    assert magic == EXTENSION_BACKING_FORMAT and at + len(data) <= 512
    assert found.backing == "b" * 1023


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cluster_bits=st.integers(9, 16),
    refcount_order=st.integers(0, 6),
    sectors=st.integers(1, 4096),
    extended=st.booleans(),
    data=st.data(),
)
def test_overlays_show_their_base_and_take_writes(
    tmp_path: Path, cluster_bits: int, refcount_order: int, sectors: int, extended: bool, data: st.DataObject
) -> None:
    base, path = tmp_path / "base.img", tmp_path / "o.qcow2"
    extended = extended and cluster_bits >= 14
    content = bytearray(os.urandom(256) * 2 * sectors)
    base.write_bytes(content)
    make(
        path, sectors * 512, cluster_bits=cluster_bits, refcount_bits=1 << refcount_order, extended_l2=extended,
        backing_name="base.img", backing_format="raw",
    )  # fmt: skip
    commands: list[str] = []
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, sectors - 1))
        count = data.draw(st.integers(1, min(sectors - at, 256)))
        commands += ["-c", f"write -P 0x5a {at * 512} {count * 512}"]
        content[at * 512 : (at + count) * 512] = b"\x5a" * (count * 512)
    if commands:
        subprocess.run(["qemu-io", "-f", "qcow2", *commands, str(path)], check=True, capture_output=True)
    check(path)
    expected = tmp_path / "expected.img"
    expected.write_bytes(content)
    same = subprocess.run(["qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, expected], check=False)
    assert same.returncode == 0
