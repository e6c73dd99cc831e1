"""Disks of the tests' own with a file system on them, whose power can fail."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest
from tests.kit import images

MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-b", "4096"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
SMALLEST = {"ext4": 48 << 20, "xfs": 304 << 20, "btrfs": 128 << 20}
SHUTDOWN = 0x8004587D
"""``FS_IOC_SHUTDOWN`` (include/uapi/linux/fs.h), the same on ext4 and XFS."""
_NO_LOG_FLUSH = struct.pack("I", 2)


class Disk:
    """A disk with a new file system, not mounted yet; skips the test where that cannot be.

    :param folder: where the file lies that is the disk, and the mount point.
    :param kind: ``ext4``, ``xfs`` or ``btrfs``.
    """

    def __init__(self, folder: Path, kind: str, size: int) -> None:
        if os.geteuid() != 0:
            pytest.skip("mounting needs root")
        tool = shutil.which(MAKE[kind][0], path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if tool is None:
            pytest.skip(f"{MAKE[kind][0]} is not installed")
        self.path = folder / f"{kind}.disk"
        self.place = folder / f"{kind}.mount"
        with self.path.open("wb") as file:
            file.truncate(size)
        self.place.mkdir()
        images.run(tool, *MAKE[kind][1:], self.path)

    @property
    def source(self) -> Path:
        """What is mounted."""
        return self.path

    def mount(self) -> Path:
        """Mount it; the mount point."""
        loop = [] if self.source.is_block_device() else ["-o", "loop"]
        done = subprocess.run(["mount", *loop, self.source, self.place], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"loop devices cannot be mounted here: {done.stderr.strip()}")
        return self.place

    def unmount(self, seconds: float = 20.0) -> None:
        """Unmount it, as soon as the last process has let go of it."""
        until = time.monotonic() + seconds
        while True:
            done = subprocess.run(["umount", self.place], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return
            assert time.monotonic() < until, done.stderr
            time.sleep(0.01)

    def shut_down(self) -> None:
        """The power fails: nothing reaches the disk any more, until it is mounted again."""
        descriptor = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, _NO_LOG_FLUSH)
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """All that was written is on the disk."""
        images.run("sync", "-f", self.place)

    def remove(self) -> None:
        """Unmount it whoever uses it, and remove it."""
        if os.path.ismount(self.place):
            subprocess.run(["umount", "-l", self.place], check=True)
        self.path.unlink()
        self.place.rmdir()
