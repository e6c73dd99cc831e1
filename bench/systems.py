"""File systems of the bench's own, on loop devices."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from bench.rows import MIB

MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
OPTIONS = {"ext4": "noatime", "xfs": "noatime", "btrfs": "noatime,nodiscard"}
SMALLEST = 400 * MIB
_CLONE = 0x40049409
"""``FICLONE`` (include/uapi/linux/fs.h)."""
_LIBC = ctypes.CDLL(None, use_errno=True)


class Unavailable(RuntimeError):
    """A file system cannot be made here; the text says why."""


def run(*words: str | Path) -> str:
    """Run a program to its end; what it prints.

    :raise RuntimeError: it failed; the text is what it said.
    """
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, words))}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


class System:
    """A mounted file system."""

    def __init__(self, kind: str, place: Path) -> None:
        self.kind = kind
        self.place = place
        self._folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def sync(self) -> None:
        """All that was written to it is on its device."""
        if _LIBC.syncfs(self._folder) != 0:
            raise OSError(ctypes.get_errno(), "syncfs")

    def used(self) -> int:
        """How many bytes are in use, once it has really let go of what was removed (which btrfs and XFS do later)."""
        last, now = -1, -2
        for _ in range(50):
            self.sync()
            figures = os.fstatvfs(self._folder)
            last, now = now, (figures.f_blocks - figures.f_bfree) * figures.f_frsize
            if last == now:
                break
            time.sleep(0.2)
        return now

    def shares(self) -> bool:
        """Whether files can share blocks, found out by trying."""
        one, other = self.place / "shares.one", self.place / "shares.other"
        try:
            with one.open("w+b") as source, other.open("w+b") as target:
                source.write(b"x" * 65536)
                source.flush()
                try:
                    fcntl.ioctl(target.fileno(), _CLONE, source.fileno())
                except OSError:
                    return False
                return True
        finally:
            one.unlink()
            other.unlink()

    def close(self) -> None:
        """Let go of it."""
        os.close(self._folder)


@contextlib.contextmanager
def mounted(folder: Path, kind: str, size: int, *, direct: bool = True) -> Iterator[System]:
    """A new file system for the block.

    The file that is its disk has every block written beforehand, so that the first runs don't pay for the folder's own
    file system finding room; it has no name, so that nothing of it stays however this process ends.

    :param folder: where that file is.
    :param direct: the loop device goes past the page cache of the folder's file system.
    :raise Unavailable: it cannot be made or mounted here.
    """
    # btrfs takes no device that ends within a page.
    size = -(-max(size, SMALLEST) // MIB) * MIB
    free = os.statvfs(folder)
    if free.f_bavail * free.f_frsize < size + 512 * MIB:
        raise Unavailable(f"{folder} has no room for a file system of {size // MIB} MiB")
    disk, place = folder / f"{kind}.disk", folder / kind
    place.mkdir()
    try:
        # Written past the page cache, with the file kept from growing in small steps.
        run("fallocate", "-l", str(size), disk)
        run("dd", "if=/dev/zero", f"of={disk}", "bs=4M", f"count={size >> 22}", "oflag=direct", "conv=notrunc")
        loop = run("losetup", "--show", "-f", f"--direct-io={'on' if direct else 'off'}", disk).strip()
        try:
            run(*MAKE[kind], loop)
            run("mount", "-o", OPTIONS[kind], loop, place)
        finally:
            # It goes when the last that has it open does, which is the mount.
            run("losetup", "-d", loop)
    except RuntimeError as error:
        place.rmdir()
        raise Unavailable(str(error)) from error
    finally:
        disk.unlink(missing_ok=True)
    try:
        place.chmod(0o755)
        system = System(kind, place)
        try:
            yield system
        finally:
            system.close()
    finally:
        _unmount(place)
        place.rmdir()


def _unmount(place: Path) -> None:
    until = time.monotonic() + 10.0
    while subprocess.run(["umount", place], capture_output=True, check=False).returncode != 0:
        if time.monotonic() > until:
            run("umount", "-l", place)
            return
        time.sleep(0.1)
