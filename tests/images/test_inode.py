"""Telling a file from another one, also after its device has another number."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.kit.disks import Disk

from snaptree.images import durable
from snaptree.images.inode import inode_of, is_still


def test_the_same_file_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("a")
    known = inode_of(str(path))
    path.rename(tmp_path / "b")
    assert is_still(str(tmp_path / "b"), *known)
    path.write_text("other")
    assert not is_still(str(path), *known)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_after_a_reboot_the_device_may_have_another_number(kind: str, tmp_path: Path) -> None:
    disk = Disk(tmp_path, kind, 304 << 20)
    other = Disk(tmp_path, "btrfs", 128 << 20)
    try:
        path = disk.mount() / "a"
        path.write_text("a")
        before, known = path.stat().st_dev, inode_of(str(path))
        assert known[0] != 0
        disk.unmount()
        other.mount()
        disk.mount()
        assert path.stat().st_dev != before
        assert is_still(str(path), *known)
        assert durable.remove(str(path), known)
    finally:
        disk.remove()
        other.remove()


def test_an_inode_number_given_to_another_file(tmp_path: Path) -> None:
    disk = Disk(tmp_path, "ext4", 48 << 20)
    try:
        path = disk.mount() / "a"
        path.write_text("a")
        known = inode_of(str(path))
        number = 0
        for _ in range(50):
            path.unlink()
            path.write_text("another")
            number = os.stat(path).st_ino
            if number == known[1]:
                break
        assert number == known[1], "ext4 gives the number again at once"
        assert not is_still(str(path), *known)
        assert not durable.remove(str(path), known)
    finally:
        disk.remove()


def test_where_it_is_not_known_the_number_decides(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("a")
    _, number = inode_of(str(path))
    assert is_still(str(path), 0, number)
    assert not is_still(str(path), 0, number + 1)
