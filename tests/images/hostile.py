"""Hostile images, made by a grammar: in sound ones header, tables, names and snapshots say what they should not."""

from __future__ import annotations

import os
import random
import socket
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
    b"", b"\0", b"\xff\xfe", b"a" * 1023, b"../" * 340 + b"etc", b"a/" * 511, b"loop.qcow2", b"folder", b"socket",
    b"/dev/fd/0", b"/proc/self/fd/0", b"nbd+unix:///?socket=socket", b"blkdebug::base.qcow2", b"host_device:/dev/sda",
    b"\x1b]0;title\x07.qcow2", b"\x1b[2J", b"\xc2\x9b2J.qcow2", b"\x7f.qcow2", b"\xe2\x80\xae.qcow2", b"\xff.qcow2",
    b"base.qcow2\x1b[31m", b"./base.qcow2", b"folder/../base.qcow2", b"outside/secret.qcow2",
    b"../outside/secret.qcow2",
]  # fmt: skip
FORMATS = [b"qcow2", b"raw", b"raw", b"vmdk", b"luks", b"host_device", b"", b"\x1b[2J", b"\xff", b"qcow2\0raw"]
"""Some of the names are files that :func:`surroundings` makes."""
TAGS = [
    b"tag",
    b"tag",
    b"",
    b"1",
    b"\x1b[2J",
    b"\xc2\x9b2J",
    b"\xff",
    b"a\nb",
    b"../x",
    b"x" * 1000,
    b"main",
    b"\xe2\x80\xae",
]
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
        kind = chance.randrange(14)
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
        elif kind == 8:
            name, form = chance.choice(NAMES), chance.choice(FORMATS)
            extension = struct.pack(">II", EXTENSIONS[1], len(form)) + form + bytes(-len(form) % 8)
            start = int.from_bytes(data[100:104], "big") if data[4:8] == b"\0\0\0\3" else 72
            put(start, extension + bytes(8) + name)
            put(8, struct.pack(">QI", start + len(extension) + 8, len(name)))
        elif kind == 9:
            place = chance.choice([0x10000, 0x50000, 512])
            names = [chance.choice(TAGS) for _ in range(chance.choice([1, 2, 40]))]
            put(place, b"".join(_bitmap(each, chance) for each in names))
            size = chance.choice([4096, 16 << 20, 1 << 40])
            put(104, struct.pack(">IIIIQQ", EXTENSIONS[3], 24, chance.choice([len(names), 65535]), 0, size, place))
            put(88, struct.pack(">Q", 1))
        elif kind == 10:
            name = chance.choice(NAMES)
            put(72, struct.pack(">Q", chance.choice([4, 4, 4 | 1, 2, 1])))
            put(104, struct.pack(">II", EXTENSIONS[5], len(name)) + name)
        elif kind == 11:
            put(32, struct.pack(">I", chance.choice([1, 2])))
            place, length = chance.choice([0x10000, 0x50000, *LARGE]), chance.choice([592, 4096, 2068480, *LARGE])
            put(place, b"LUKS\xba\xbe\0\1" + bytes(156) + chance.choice([b"\0\0\1\0", b"\xff" * 4]) * 100)
            start = int.from_bytes(data[100:104], "big") if chance.random() < 0.8 else 104
            put(start, struct.pack(">IIQQ", EXTENSIONS[4], 16, place, length))
        elif kind == 12:
            bits = chance.choice([9, 16, 21])
            entries = chance.choice([1 << 22, (1 << 22) - 1, 1 << 20, 3])
            size = min(entries << (2 * bits - 3), (1 << 63) - chance.choice([1, 512, 1 << 21]))
            put(20, struct.pack(">IQ", bits, size))
            put(36, struct.pack(">IQ", entries, 0x30000 if bits < 21 else 1 << 21))
        elif kind == 13:
            place = chance.choice([0x10000, 0x50000])
            names = [chance.choice(TAGS) for _ in range(chance.choice([1, 2, 300]))]
            put(place, b"".join(_snapshot(number, each, chance) for number, each in enumerate(names)))
            put(60, struct.pack(">IQ", len(names), place))
        else:
            data = data[: chance.choice([0, 1, 3, 4, 72, 104, 111, 112, 511, 512, 65535, len(data) // 2])]
            if not data:
                break
    return bytes(data)


def _bitmap(name: bytes, chance: random.Random) -> bytes:
    """An entry of a bitmap directory."""
    fields = (chance.choice(LARGE), chance.choice(NUMBERS), chance.choice([0, 1, 2]), 1, 16, len(name), 0)
    entry = struct.pack(">QIIBBHI", *fields) + name
    return entry + bytes(-len(entry) % 8)


def _snapshot(number: int, name: bytes, chance: random.Random) -> bytes:
    """An entry of the table of internal snapshots."""
    identity = str(number + 1).encode()
    table, entries = chance.choice([0x30000, 0, 1 << 40]), chance.choice([1, 0, 1 << 22])
    extra = struct.pack(">QQ", 0, chance.choice([1 << 20, 1 << 20, 0, (1 << 63) - 1]))
    seconds = chance.choice([0, 1 << 31, (1 << 32) - 1])
    fixed = struct.pack(">QIHHIIQII", table, entries, len(identity), len(name), seconds, seconds, 0, 0, len(extra))
    entry = fixed + extra + identity + name
    return entry + bytes(-len(entry) % 8)


def surroundings(folder: Path, sound: bytes) -> None:
    """What hostile images in the folder name: images, links, a pipe, a socket, a folder, and a folder beside it."""
    os.mkfifo(folder / "pipe")
    (folder / "link.qcow2").symlink_to("/etc/passwd")
    (folder / "folder").mkdir()
    (folder / "outside").symlink_to("../outside")
    outside = folder.parent / "outside"
    outside.mkdir()
    for path in (outside / "secret.qcow2", folder / "\x9b2J.qcow2", folder / "\x7f.qcow2", folder / "\u202e.qcow2"):
        path.write_bytes(sound)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.qcow2")).write_bytes(sound)
    with socket.socket(socket.AF_UNIX) as server:
        place = os.open(folder, os.O_PATH)
        server.bind(f"/proc/self/fd/{place}/socket")
        os.close(place)
    loop = bytearray(sound)
    loop[112 : 112 + 13] = b"hostile.qcow2"
    loop[8:20] = struct.pack(">QI", 112, 13)
    (folder / "loop.qcow2").write_bytes(loop)


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
