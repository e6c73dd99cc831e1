"""Disks of the tests' own with a file system on them, whose power can fail."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
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
_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE, _AUTOCLEAR = 0x4C82, 0x4C0A, 4
_LOOP_CONFIG = struct.Struct("=I4x52xI176x64x")
"""``struct loop_config`` (include/uapi/linux/loop.h): the file's descriptor, and the flags."""
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def loop_device(path: Path) -> Iterator[Path]:
    """The file as a block device; it goes with the last one who has it open or mounted."""
    with path.open("r+b") as file, open("/dev/loop-control", "rb") as control:
        while True:
            device = Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
            with device.open("r+b", buffering=0) as loop:
                try:
                    fcntl.ioctl(loop, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(file.fileno(), _AUTOCLEAR))
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise
                    continue
                yield device
                return


class Disk:
    """A disk with a new file system, not mounted yet; skips the test where that cannot be.

    :param folder: where the file lies that is the disk, and the mount point.
    :param kind: ``ext4``, ``xfs`` or ``btrfs``.
    """

    patience = 120.0
    """So many seconds a mount is tried: where another process has a mount namespace of its own, made since the file
    system was mounted here, it is mounted there as well, and XFS mounts each UUID once."""

    def __init__(self, folder: Path, kind: str, size: int) -> None:
        if os.geteuid() != 0:
            pytest.skip("mounting needs root")
        tool = shutil.which(MAKE[kind][0], path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if tool is None:
            pytest.skip(f"{MAKE[kind][0]} is not installed")
        self.kind = kind
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
        """Mount it; the mount point.

        A file gets a loop device of its own each time: ``mount -o loop`` takes one that has it still, and with it what
        the system remembers of the file as it was.
        """
        until = time.monotonic() + self.patience
        while True:
            with self._device() as device:
                if _libc.mount(os.fsencode(device), os.fsencode(self.place), self.kind.encode(), 0, None) == 0:
                    return self.place
                reason = ctypes.get_errno()
            if reason != errno.EINVAL:
                pytest.skip(f"disks cannot be mounted here: {os.strerror(reason)}")
            assert time.monotonic() < until, f"{self.source} cannot be mounted: see the kernel's log"
            time.sleep(0.05)

    @contextlib.contextmanager
    def _device(self) -> Iterator[Path]:
        """The block device; that of a file goes with the last one who has it open or mounted."""
        if self.source.is_block_device():
            yield self.source
            return
        with loop_device(self.source) as path:
            yield path

    def unmount(self, seconds: float = 20.0) -> None:
        """Unmount it, as soon as the last process has let go of it.

        Where it is mounted in another mount namespace as well, it is written to when that goes: what is put there
        meanwhile would be spoilt.
        """
        until = time.monotonic() + seconds
        while _libc.umount2(os.fsencode(self.place), 0) != 0:
            assert ctypes.get_errno() == errno.EBUSY and time.monotonic() < until, os.strerror(ctypes.get_errno())
            time.sleep(0.005)
        until = time.monotonic() + self.patience
        while not self.source.is_block_device() and self._is_attached():
            assert time.monotonic() < until, f"{self.path} is mounted somewhere else as well"
            time.sleep(0.005)

    def _is_attached(self) -> bool:
        """Whether a loop device has the file still."""
        for each in Path("/sys/block").glob("loop*/loop/backing_file"):
            with contextlib.suppress(OSError):
                if each.read_text().strip() == str(self.path.resolve()):
                    return True
        return False

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


@contextlib.contextmanager
def seen_by_all(kind: str, size: int) -> Iterator[Path]:
    """A disk's folder that every user sees; for a libvirtd it is to be there before that is started."""
    folder = Path(tempfile.mkdtemp(prefix="snaptree-disk-", dir=images.SCRATCH))
    folder.chmod(0o755)
    disk = Disk(folder, kind, size)
    try:
        yield disk.mount()
    finally:
        disk.remove()
        folder.rmdir()
