"""Changing backing names in place: the result as QEMU sees it, and every state that a crash can leave."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snaptree.errors import RefusedError
from snaptree.images.header import EXTENSION_BACKING_FORMAT, Header, read_header
from snaptree.images.header_write import SECTOR, RepointWrites, repoint_writes
from snaptree.images.layout import empty_overlay

names = st.text("abcdefgh./-_ü", min_size=1, max_size=300).filter(lambda name: not name.startswith("/"))


def qemu_img(*arguments: str) -> str:
    return subprocess.run(["qemu-img", *arguments], check=True, capture_output=True, text=True).stdout


def create(path: Path, options: str, backing: str | None, backing_format: str = "qcow2") -> None:
    arguments = ("-u", "-b", backing, "-F", backing_format) if backing is not None else ()
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, *arguments, str(path), "1M")


def header_of(path: Path) -> Header:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_header(descriptor, str(path))
    finally:
        os.close(descriptor)


def planned(path: Path, name: str | None, image_format: str | None) -> RepointWrites | None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return repoint_writes(descriptor, str(path), name, image_format)
    finally:
        os.close(descriptor)


def carry_out(path: Path, writes: RepointWrites) -> None:
    with path.open("r+b") as file:
        for offset, data in writes.ordered():
            file.seek(offset)
            file.write(data)


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qemu_img("info", "-U", "-f", "qcow2", "--output=json", str(path)))
    return found


def check(path: Path) -> None:
    """Without what the header names: ``check`` would open that, too."""
    file = {"driver": "file", "filename": str(path)}
    qemu_img("check", "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": file}))


def others(header: Header) -> list[tuple[int, bytes]]:
    return [(magic, data) for magic, _, data in header.extensions if magic != EXTENSION_BACKING_FORMAT]


def require_crash_safe(path: Path, writes: RepointWrites, name: str | None) -> None:
    """Each write up to the last leaves the old header, in whichever order and however far its sectors arrive."""
    assert writes.atomic
    *before, (offset, last) = writes.ordered()
    assert offset == 0 and len(last) <= SECTOR
    content = path.read_bytes()
    old = header_of(path)
    torn = path.with_suffix(".torn")
    for at, data in before:
        first = at // SECTOR
        sectors = list(range(first, (at + len(data) - 1) // SECTOR + 1))
        for arrived in itertools.chain.from_iterable(itertools.combinations(sectors, n) for n in range(3)):
            state = bytearray(content)
            for sector in arrived:
                begin, end = max(at, sector * SECTOR), min(at + len(data), (sector + 1) * SECTOR)
                state[begin:end] = data[begin - at : end - at]
            torn.write_bytes(state)
            found = header_of(torn)
            assert (found.backing, found.backing_format, others(found)) == (
                old.backing, old.backing_format, others(old),
            )  # fmt: skip
    torn.unlink(missing_ok=True)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster", [512, 4096, 65536])
@pytest.mark.parametrize(("old", "new"), [("base.qcow2", "b.img"), ("b", "a-longer-name.qcow2"), (None, "b.qcow2")])
@pytest.mark.parametrize("new_format", ["raw", "qcow2"])
def test_like_rebase(tmp_path: Path, compat: str, cluster: int, old: str | None, new: str, new_format: str) -> None:
    path, other = tmp_path / "o.qcow2", tmp_path / "rebased.qcow2"
    if compat == "1.1" and cluster == 512:
        writes, length = empty_overlay(
            1 << 20, cluster_bits=9, backing_name=old, backing_format="qcow2" if old is not None else None
        )
        path.write_bytes(bytes(length))
        carry_out(path, RepointWrites(tuple(writes), True, b""))
    else:
        create(path, f"compat={compat},cluster_size={cluster}", old)
    other.write_bytes(path.read_bytes())
    before = header_of(path)
    writes_ = planned(path, new, new_format)
    assert writes_ is not None
    if writes_.atomic:
        require_crash_safe(path, writes_, new)
    else:
        assert old is None or cluster == 512 or compat == "0.10"
    carry_out(path, writes_)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", new, "-F", new_format, str(other))
    mine, theirs = info(path), info(other)
    for key in ("backing-filename", "backing-filename-format", "virtual-size", "format-specific"):
        assert mine[key] == theirs[key]
    assert others(header_of(path)) == others(before)
    check(path)
    assert planned(path, new, new_format) is None


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_dropping_the_backing_file_is_one_sector(tmp_path: Path, compat: str) -> None:
    path = tmp_path / "o.qcow2"
    create(path, f"compat={compat}", "base.qcow2")
    writes = planned(path, None, None)
    assert writes is not None and writes.atomic and len(writes.writes) == 1
    carry_out(path, writes)
    assert header_of(path).backing is None
    assert "backing-filename" not in info(path)
    check(path)
    assert planned(path, None, None) is None


def test_bitmaps_encryption_and_unknown_extensions_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "o.qcow2"
    secret = "secret,id=s,data=abc"
    create(tmp_path / "base.qcow2", "compat=1.1", None)
    qemu_img(
        "create", "-q", "-f", "qcow2", "--object", secret, "-u", "-b", "base.qcow2", "-F", "qcow2",
        "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", str(path), "1M",
    )  # fmt: skip
    before = header_of(path)
    assert before.encrypted
    for name, image_format in (("elsewhere.img", "raw"), ("again.qcow2", "qcow2"), (None, None), ("back.img", "raw")):
        writes = planned(path, name, image_format)
        assert writes is not None
        carry_out(path, writes)
        found = header_of(path)
        assert found.backing == name and others(found) == others(before)
    plain = tmp_path / "p.qcow2"
    create(plain, "compat=1.1", "base.qcow2")
    qemu_img("bitmap", "--add", "-f", "qcow2", str(plain), "daily")
    writes = planned(plain, "other.img", "raw")
    assert writes is not None and writes.atomic
    carry_out(plain, writes)
    assert info(plain)["format-specific"]["data"]["bitmaps"][0]["name"] == "daily"


def test_extensions_without_an_end_mark(tmp_path: Path) -> None:
    """Only the old name ends them; a name put elsewhere would turn what follows into extensions."""
    path = tmp_path / "o.qcow2"
    create(path, "compat=0.10", None)
    content = bytearray(path.read_bytes())
    old = b"\x00\x00\x00\x01\x00\x00\x00\x08old.qcow"  # Looks like an extension.
    content[72 : 72 + len(old)] = old.replace(b"\0", b"n")
    content[8:20] = (72).to_bytes(8, "big") + len(old).to_bytes(4, "big")
    path.write_bytes(content)
    assert header_of(path).extensions == ()
    writes = planned(path, "new.qcow2", "qcow2")
    assert writes is not None and not writes.atomic and writes.redo
    carry_out(path, writes)
    found = header_of(path)
    assert (found.backing, found.backing_format, others(found)) == ("new.qcow2", "qcow2", [])


def test_no_room_is_said_clearly(tmp_path: Path) -> None:
    writes, length = empty_overlay(1 << 20, cluster_bits=9, backing_name="b", backing_format="raw")
    path = tmp_path / "o.qcow2"
    path.write_bytes(bytes(length))
    carry_out(path, RepointWrites(tuple(writes), True, b""))
    for name in ("x" * 450, "x" * 1024):
        with pytest.raises(RefusedError) as caught:
            planned(path, name, "raw")
        assert "does not fit" in caught.value.message and caught.value.hint
    longest = planned(path, "x" * (512 - 112 - 16 - 8), "raw")
    assert longest is not None
    carry_out(path, longest)
    assert info(path)["backing-filename"] == "x" * (512 - 112 - 16 - 8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cluster_bits=st.sampled_from([9, 10, 12, 16]),
    first=st.one_of(st.none(), names),
    changes=st.lists(st.one_of(st.none(), st.tuples(names, st.sampled_from(["raw", "qcow2"]))), max_size=6),
)
def test_any_row_of_changes(
    tmp_path: Path, cluster_bits: int, first: str | None, changes: list[tuple[str, str] | None]
) -> None:
    path = tmp_path / "o.qcow2"
    try:
        writes, length = empty_overlay(
            1 << 20,
            cluster_bits=cluster_bits,
            backing_name=first,
            backing_format="qcow2" if first is not None else None,
        )
    except Exception:
        return
    path.write_bytes(bytes(length))
    carry_out(path, RepointWrites(tuple(writes), True, b""))
    tail = path.read_bytes()[1 << cluster_bits :]
    for change in changes:
        name, image_format = change or (None, None)
        try:
            planned_ = planned(path, name, image_format)
        except RefusedError:
            assert cluster_bits == 9
            continue
        if planned_ is not None:
            if planned_.atomic:
                require_crash_safe(path, planned_, name)
            else:
                assert planned_.writes == ((0, planned_.redo),)
            carry_out(path, planned_)
        found = header_of(path)
        assert found.backing == name
        assert name is None or found.backing_format == image_format
        assert path.read_bytes()[1 << cluster_bits :] == tail
    check(path)
