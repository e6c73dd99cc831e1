"""File systems of the tests' own, and processes that hold images."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.kit.disks import Disk


@contextlib.contextmanager
def mounted(folder: Path, kind: str, size: int) -> Iterator[Path]:
    """A new file system of so many bytes, mounted for the block; skips the test where that cannot be."""
    disk = Disk(folder, kind, size)
    try:
        yield disk.mount()
    finally:
        disk.remove()


@contextlib.contextmanager
def held(path: Path, image_format: str = "qcow2", *, read_only: bool = False) -> Iterator[int]:
    """A qemu-io that has the image open for the block; its process id."""
    words = ["qemu-io", "-f", image_format, *(["-r"] if read_only else []), str(path)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0)
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write("length\n")
        while "iB" not in process.stdout.readline():
            assert process.poll() is None, "qemu-io has ended"
        yield process.pid
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


@contextlib.contextmanager
def filled(folder: Path, leave: int) -> Iterator[Path]:
    """A file that takes all room of the file system but so many bytes."""
    path = folder / "filler"
    # What is still to be written has no room of its own yet.
    subprocess.run(["sync", "-f", folder], check=True)
    free = os.statvfs(folder)
    size = max(1, free.f_bfree * free.f_frsize - leave)
    with path.open("wb") as file:
        while True:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                # Some of what is free nobody is given: ext4 and btrfs keep it for themselves.
                if error.errno != errno.ENOSPC or size <= 1 << 20:
                    raise
                size -= 1 << 20
            else:
                break
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
