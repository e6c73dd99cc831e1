"""Files as they are: who may read them, now and at every moment while something runs, and what is in them."""

from __future__ import annotations

import os
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ACL, DEFAULT_ACL, LABEL = "system.posix_acl_access", "system.posix_acl_default", "security.selinux"
OWNER, USER, GROUP, NAMED_GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
CHANGES = {
    "open", "mkdir", "fchmod", "chmod", "fchown", "chown", "setxattr", "removexattr", "rename", "replace", "link",
    "symlink", "unlink", "write", "pwrite", "close", "execute", "connect",
}  # fmt: skip
"""The functions after which it is looked who may read what."""


def packed(*entries: tuple[int, int, int]) -> bytes:
    """An ACL of ``(tag, permissions, id)``, as the system keeps it."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def acl(owner: int, group: int, other: int, mask: int, users: dict[int, int]) -> bytes:
    """An ACL with named users, as permission bits from 0 to 7."""
    named = [(USER, bits, user) for user, bits in sorted(users.items())]
    none = 0xFFFFFFFF
    return packed((OWNER, owner, none), *named, (GROUP, group, none), (MASK, mask, none), (OTHER, other, none))


def attribute(path: Path, name: str) -> bytes | None:
    """An extended attribute, if the file has it."""
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return None


def give(path: Path, name: str, value: bytes) -> None:
    """Set an extended attribute; skips the test where that cannot be."""
    try:
        os.setxattr(path, name, value)
    except OSError as error:
        pytest.skip(f"{name} cannot be set here: {error.strerror}")


def may(path: Path, user: int, group: int) -> int:
    """What the user with that one group may do with the file, as permission bits."""
    status = path.lstat()
    found = attribute(path, ACL)
    if found is None:
        shift = 6 if user == status.st_uid else 3 if group == status.st_gid else 0
        return (status.st_mode >> shift) & 7
    entries = list(struct.iter_unpack("<HHI", found[4:]))
    only = {tag: bits for tag, bits, _ in entries}
    mask = only.get(MASK, 7)
    if user == status.st_uid:
        return int(only[OWNER])
    for tag, bits, number in entries:
        if tag == USER and number == user:
            return int(bits & mask)
    groups = [
        bits
        for tag, bits, number in entries
        if (tag == GROUP and group == status.st_gid) or (tag == NAMED_GROUP and number == group)
    ]
    if groups:
        found_bits = 0
        for bits in groups:
            found_bits |= bits & mask
        return int(found_bits)
    return int(only[OTHER])


@dataclass(frozen=True)
class Rights:
    """Everything that says who may do what with a file."""

    owner: int
    group: int
    mode: int
    acl: bytes | None
    label: bytes | None


def rights(path: Path) -> Rights:
    """The rights of the file itself."""
    status = path.lstat()
    return Rights(
        status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode), attribute(path, ACL), attribute(path, LABEL)
    )


@contextmanager
def watched(look: Callable[[], None]) -> Iterator[list[int]]:
    """Call ``look`` after every call of the block that could change a file or its rights; how many there were."""
    count = [0]

    def event(frame: FrameType, kind: str, argument: Any) -> None:
        if kind == "c_return" and getattr(argument, "__name__", "") in CHANGES:
            count[0] += 1
            look()

    sys.setprofile(event)
    try:
        yield count
    finally:
        sys.setprofile(None)


def picture(folder: Path) -> dict[str, bytes | str]:
    """Every file in the folder with its contents, every link with where it leads."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }
