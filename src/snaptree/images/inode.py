"""Which file a path names, so that it can be told after a reboot, when devices may have other numbers."""

from __future__ import annotations

import fcntl
import functools
import os
import stat
import struct

_FS_IOC_GETVERSION = 0x80087601
"""``_IOR('v', 1, long)`` (include/uapi/linux/fs.h): ext4, XFS, btrfs and others answer it."""


def generation_of(descriptor: int) -> int:
    """The inode's generation: another one each time that the number is given to a new file; 0 where it is not known."""
    try:
        found = fcntl.ioctl(descriptor, _FS_IOC_GETVERSION, bytes(8))
    except OSError:
        return 0
    # The number says long, but what is written is an int.
    return int(struct.unpack_from("I", found)[0])


@functools.cache
def boot() -> int:
    """The number of this run of the system, which the nodes of block devices have for a generation: the next one makes
    them anew."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return int(file.read(8), 16)
    except (OSError, ValueError):
        return 0


def inode_of(path: str) -> tuple[int, int]:
    """Generation and number of the inode that the path itself names, be it a link.

    :raise OSError: there is none.
    """
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        return 0, status.st_ino
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        return 0, status.st_ino
    try:
        return generation_of(descriptor), os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)


def is_still(path: str, generation: int, inode: int) -> bool:
    """Whether the path names that inode; a generation that is not known, now or then, says nothing.

    Some file systems (NFS, FUSE, older tmpfs) don't tell generations: there a new file with the old one's number and
    path is taken for it.

    :raise OSError: there is nothing at the path.
    """
    now, number = inode_of(path)
    return number == inode and (now == generation or 0 in (now, generation))
