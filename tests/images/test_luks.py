"""LUKS headers that are not what they should be: found before anything is done with them, in bounded time."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.kit import images, luks
from tests.kit.rights import picture
from tests.kit.scene import SLOT, Scene

from snaptree.images.facts import read_facts
from snaptree.images.gate import luks_header_at
from snaptree.images.header import read_header


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = images.create(tmp_path_factory.mktemp("locked") / "web1.qcow2", 8 * SLOT, **luks.OPTIONS)
    return path.read_bytes()


def where(data: bytes) -> tuple[int, int, int]:
    """Where an image says where its LUKS header is, and what it says."""
    at = data.index(struct.pack(">II", 0x0537BE77, 16)) + 8
    return (at, *struct.unpack_from(">QQ", data, at))


def put(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


BROKEN: dict[str, Callable[[bytes, int, int], bytes]] = {
    "no pointer": lambda data, at, offset: put(data, at - 8, struct.pack(">I", 0x12345678)),
    "a short pointer": lambda data, at, offset: put(data, at - 4, struct.pack(">I", 8)),
    "at nothing": lambda data, at, offset: put(data, at, struct.pack(">Q", 0)),
    "within a cluster": lambda data, at, offset: put(data, at, struct.pack(">Q", offset + 512)),
    "past the end": lambda data, at, offset: put(data, at, struct.pack(">Q", 1 << 40)),
    "past what may be": lambda data, at, offset: put(data, at, struct.pack(">Q", 1 << 60)),
    "at something else": lambda data, at, offset: put(data, at, struct.pack(">Q", 0x10000)),
    "too short": lambda data, at, offset: put(data, at + 8, struct.pack(">Q", 591)),
    "too long": lambda data, at, offset: put(data, at + 8, struct.pack(">Q", (16 << 20) + 1)),
    "longer than the file": lambda data, at, offset: put(data, at + 8, struct.pack(">Q", 16 << 20)),
    "of another version": lambda data, at, offset: put(data, offset + 6, struct.pack(">H", 2)),
    "cut": lambda data, at, offset: data[: offset + 300],
    "hours of hashing for a passphrase": lambda data, at, offset: put(data, offset + 212, b"\xff\xff\xff\xff"),
    "hours of hashing for the digest": lambda data, at, offset: put(data, offset + 164, b"\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_header_that_is_broken(scene: Scene, locked: bytes, what: str) -> None:
    """The image is damaged, for every command; a machine that has it already gets no overlay with that header."""
    key = luks.key_file(scene.folder)
    (scene.disks / "web1.qcow2").write_bytes(locked)
    scene(f"add web1 --disk vda=web1.qcow2 --key {key}")
    at, offset, _ = where(locked)
    (scene.disks / "web1.qcow2").write_bytes(BROKEN[what](locked, at, offset))
    (scene.disks / "web2.qcow2").write_bytes(BROKEN[what](locked, at, offset))
    before = picture(scene.disks)

    facts = read_facts(str(scene.disks / "web1.qcow2"), "qcow2")

    assert facts.problem == "damaged" and "LUKS" in facts.detail, facts
    for line in ("snapshot web1 s1", "snapshot web1 s1 --internal", "branch web1 b1", "add web2 --disk vda=web2.qcow2"):
        assert "LUKS" in scene(line, status=7).err
    assert "none of the machine's layers is encrypted" in scene(f"set web1 --key {key}", status=6).err
    assert picture(scene.disks) == before
    assert "damaged" in {each["kind"] for each in scene.findings()}


def test_a_place_for_a_passphrase_that_is_not_in_use(scene: Scene, locked: bytes) -> None:
    """What it says of hashing is nothing that anybody does."""
    _, offset, _ = where(locked)
    (scene.disks / "web1.qcow2").write_bytes(put(locked, offset + 208 + 48 + 4, b"\xff\xff\xff\xff"))
    scene(f"add web1 --disk vda=web1.qcow2 --key {luks.key_file(scene.folder)}")
    scene("snapshot web1 s1")
    scene("delete web1 s1")
    assert scene.findings() == []


def test_what_is_taken_over_is_the_header_to_the_last_byte(tmp_path: Path, locked: bytes) -> None:
    path = tmp_path / "web1.qcow2"
    path.write_bytes(locked)
    _, offset, length = where(locked)

    found = luks_header_at(str(path))

    whole = bytearray(found.length)
    for at, piece in found.pieces:
        whole[at : at + len(piece)] = piece
    assert bytes(whole) == locked[offset : offset + length]
    with path.open("rb") as file:
        assert read_header(file.fileno(), str(path)).encrypted


def test_no_key_is_tried_on_what_the_gate_refuses(scene: Scene) -> None:
    """An image that keeps its data in a file of somebody's is nothing for QEMU to open, whatever it is opened for."""
    key = luks.key_file(scene.folder)
    scene.image("web1.qcow2", **luks.OPTIONS)
    scene(f"add web1 --disk vda=web1.qcow2 --key {key}")
    (scene.disks / "web1.qcow2").unlink()
    scene.image("web1.qcow2", data_file=str(scene.folder / "victim"), **luks.OPTIONS)
    (scene.folder / "victim").unlink()
    (scene.folder / "victim").mkdir()

    said = scene(f"set web1 --key {key}", status=6)

    assert "none of the machine's layers is encrypted" in said.err, said
