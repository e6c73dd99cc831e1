"""Hostile images, made by a grammar: in sound ones header, tables, names and snapshots say what they should not."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

NUMBERS = [0, 1, 2, 7, 8, 9, 16, 21, 22, 31, 63, 64, 255, 511, 512, 4095, 65535, 65536, 1 << 20, 1 << 31, (1 << 32) - 1]
LARGE = [*NUMBERS, 1 << 40, 1 << 55, 1 << 56, 1 << 62, 1 << 63, (1 << 64) - 1, (1 << 64) - 65536]
FIELDS = [(4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8),
          (72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1)]  # fmt: skip
NAMES = [
    b"/etc/passwd", b"../../../etc/shadow", b"json:{}", b'json:{"driver":"file","filename":"/etc/passwd"}',
    b"nbd://h/x", b"ssh://h/x", b"file:/etc/passwd", b"fat:rw:/", b"/dev/zero", b"/dev/stdin", b"/proc/self/mem",
    b"hostile.qcow2", b"./hostile.qcow2", b"pipe", b"link.qcow2", b"base.qcow2", b"base.qcow2\n",
    b"", b"\0", b"\xff\xfe", b"a" * 1023,
]  # fmt: skip
EXTENSIONS = [0, 0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441, 0x12345678, 0xFFFFFFFF]


def number(chance: random.Random, size: int) -> bytes:
    """A number that somebody may have got wrong, or meant to."""
    value = chance.choice(LARGE if size == 8 else NUMBERS) if chance.random() < 0.8 else chance.getrandbits(8 * size)
    return (value % (1 << (8 * size))).to_bytes(size, "big")


def make(sound: bytes, chance: random.Random) -> bytes:
    """A hostile image out of a sound one."""
    data = bytearray(sound)

    def put(offset: int, value: bytes) -> None:
        if offset + len(value) <= len(data):
            data[offset : offset + len(value)] = value

    for _ in range(chance.choice([1, 1, 1, 2, 3, 5])):
        kind = chance.randrange(8)
        if kind <= 2:
            offset, size = chance.choice(FIELDS)
            put(offset, number(chance, size))
        elif kind == 3:
            name = chance.choice(NAMES)
            place = chance.choice([112, 200, 504, 1024, 65000])
            put(place, name)
            put(8, struct.pack(">QI", place, chance.choice([len(name), len(name), 1023, 1024, 1 << 31, 0])))
        elif kind == 4:
            at = int.from_bytes(data[100:104], "big") if chance.random() < 0.8 else 104
            for _ in range(chance.choice([1, 1, 3, 500])):
                value = bytes(chance.choice([0, 3, 5, 8, 48]))
                size = chance.choice([len(value), len(value), 1 << 20, (1 << 32) - 1])
                put(at, struct.pack(">II", chance.choice(EXTENSIONS), size) + value)
                at += 8 + (len(value) + 7) // 8 * 8
        elif kind == 5:
            at = chance.randrange(0, len(data)) // 8 * 8
            put(at, number(chance, 8))
        elif kind == 6:
            place = chance.choice([0x10000, 0x50000, 512, 65536 * 6])
            entry = struct.pack(">QIHHIIQII", *(chance.choice(NUMBERS) % (1 << 16) for _ in range(9)))
            put(place, entry * chance.choice([1, 2, 50]))
            put(60, struct.pack(">IQ", chance.choice([1, 2, 65535, 65536, 65537, (1 << 32) - 1]), place))
        else:
            data = data[: chance.choice([0, 1, 3, 4, 72, 104, 111, 112, 511, 512, 65535, len(data) // 2])]
            if not data:
                break
    return bytes(data)


def sound_images(folder: Path) -> list[bytes]:
    """Sound images of several kinds, to begin with."""
    from tests.kit import images
    from tests.kit.images import MiB

    base = images.create(folder / "base.qcow2", MiB)
    found = [base.read_bytes()]
    kinds: list[dict[str, Any]] = [{}, {"compat": "0.10"}, {"extended_l2": "on"}, {"cluster_size": 512}]
    for count, options in enumerate(kinds):
        path = images.create(folder / f"sound-{count}.qcow2", MiB, backing=(base, "qcow2"), **options)
        images.io(path, "qcow2", "write -P 1 0 64k")
        images.run("qemu-img", "snapshot", "-c", "tag", path)
        found.append(path.read_bytes())
        path.unlink()
    return found
