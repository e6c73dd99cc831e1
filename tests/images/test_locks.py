"""QEMU's locks and ours keep out whom they should."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.images import MiB
from tests.kit.space import held

from snaptree.errors import BusyError
from snaptree.images import locks
from snaptree.images.locks import ImageLock, MachineLock, probe, who_has_open

F_OFD_SETLK = 37


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return images.create(tmp_path / "a.qcow2", MiB)


def qemu_io(path: Path, *options: str) -> int:
    return subprocess.run(["qemu-io", *options, "-c", "length", path], capture_output=True, check=False).returncode


@pytest.mark.parametrize(("mode", "reads", "writes"), [("read", True, False), ("exclusive", False, False)])
def test_qemu_keeps_out_while_we_hold(path: Path, mode: str, reads: bool, writes: bool) -> None:
    lock = ImageLock(str(path), mode)
    try:
        found = probe(str(path))
        assert found is not None and found.reading and found.writing == (mode == "exclusive")
        assert (qemu_io(path, "-r") == 0) == reads
        assert (qemu_io(path) == 0) == writes
    finally:
        lock.release()
    assert qemu_io(path) == 0


def test_we_keep_out_while_qemu_holds(path: Path) -> None:
    with held(path) as process:
        found = probe(str(path))
        assert found is not None and found.writing
        for mode in ("read", "exclusive"):
            with pytest.raises(BusyError):
                ImageLock(str(path), mode)
        assert who_has_open([str(path)]) == {str(path): (f"qemu-io ({process})",)}
    assert probe(str(path)) is None
    with held(path, read_only=True):
        ImageLock(str(path), "read").release()
        with pytest.raises(BusyError):
            ImageLock(str(path), "exclusive")


def test_who_does_not_share_what_we_use_keeps_us_out(path: Path) -> None:
    """QEMU does so with the consistent reading of what it commits across, and does nothing there itself."""
    with path.open("rb") as file:
        unshared = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 200, 1, 0)
        fcntl.fcntl(file, F_OFD_SETLK, unshared)
        with pytest.raises(BusyError):
            ImageLock(str(path), "read")
    ImageLock(str(path), "read").release()


def test_machines_exclude_each_other_all_or_none(tmp_path: Path) -> None:
    paths = [str(images.create(tmp_path / f"{name}.qcow2", MiB)) for name in "abc"]
    first, second = MachineLock(), MachineLock()
    first.acquire(paths[1:2])
    with pytest.raises(BusyError, match=r"b\.qcow2"):
        second.acquire(paths)
    third = MachineLock()
    third.acquire([paths[0], paths[2]])
    first.release()
    third.release()
    second.acquire([*paths, paths[0]])
    second.release()


def test_a_link_is_the_same_image(tmp_path: Path, path: Path) -> None:
    again = tmp_path / "again.qcow2"
    again.hardlink_to(path)
    first, second = MachineLock(), MachineLock()
    first.acquire([str(path), str(again)])
    with pytest.raises(BusyError):
        second.acquire([str(again)])
    first.release()


def test_what_may_only_be_read_is_locked_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that is mounted read-only, say."""
    before = os.open

    def reading_only(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return before(path, flags, *rest)

    monkeypatch.setattr(os, "open", reading_only)
    first, second = MachineLock(), MachineLock()
    first.acquire([str(path)])
    with pytest.raises(BusyError):
        second.acquire([str(path)])
    first.release()
    second.acquire([str(path)])
    second.release()


def test_what_was_replaced_meanwhile_is_locked_by_its_new_inode(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever had it locked puts another file in its place between our opening and our locking it."""
    take = locks._take
    new = images.create(tmp_path / "new.qcow2", MiB)

    def replaced_first(descriptor: int, *, writable: bool) -> bool:
        if new.exists():
            new.rename(path)
        return take(descriptor, writable=writable)

    monkeypatch.setattr(locks, "_take", replaced_first)
    first, second = MachineLock(), MachineLock()
    first.acquire([str(path)])
    with pytest.raises(BusyError):
        second.acquire([str(path)])
    first.release()
