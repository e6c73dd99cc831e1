"""Blocks that two files share: whether a file system can, and doing it.

It is asked by trying, not by the file system's name, and it is always the ioctl: ``copy_file_range`` copies in silence
where it cannot share. Source: ``ioctl_ficlonerange(2)``, ``ioctl_iflags(2)``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct

from snaptree.errors import IoError
from snaptree.images import durable

_FICLONE, _FICLONERANGE = 0x40049409, 0x4020940D
_GETFLAGS, _SETFLAGS = 0x80086601, 0x40086602
_NOCOW = 0x00800000
_COPIED_FLAGS = _NOCOW | 0x00000040 | 0x00000080 | 0x00000004
"""No copy on write, no dump, no access times, compressed: what a file keeps when another takes its place."""
_CANNOT = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM)


def block_size(path: str) -> int:
    """What is shared at the least, in bytes."""
    return os.statvfs(path).f_bsize


def can_share(folder: str) -> bool:
    """Whether files in the folder can share blocks: two files without names try it, and the folder stays as it is."""
    try:
        with contextlib.ExitStack() as stack:
            source, target = (os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600) for _ in range(2))
            stack.callback(os.close, source)
            stack.callback(os.close, target)
            durable.write_all(source, 0, b"\1" * block_size(folder))
            fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def copies_on_write(descriptor: int) -> bool:
    """Whether the file's blocks are copied on write, as far as that is known; files of the two kinds don't share."""
    return not _flags(descriptor) & _NOCOW


def _flags(descriptor: int) -> int:
    try:
        return int(struct.unpack("i", fcntl.ioctl(descriptor, _GETFLAGS, bytes(4)))[0])
    except OSError:
        return 0


def keep_flags(source: int, target: int) -> None:
    """Give an empty file the attributes of the one that it will take the place of, as far as the system lets us."""
    wanted = _flags(source) & _COPIED_FLAGS
    now = _flags(target)
    if now & _COPIED_FLAGS != wanted:
        with contextlib.suppress(OSError):
            fcntl.ioctl(target, _SETFLAGS, struct.pack("i", (now & ~_COPIED_FLAGS) | wanted))


def share_whole(source: int, target: int, path: str) -> None:
    """Let an empty file have the contents of another, without copying them.

    :raise IoError: these files cannot share.
    """
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        raise _explain(error, path) from error


def share_range(source: int, at: int, length: int, target: int, to: int, path: str) -> None:
    """Let a range of a file be a range of another, in whole blocks, or up to the source's end.

    :raise IoError: these files cannot share.
    """
    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("qQQQ", source, at, length, to))
    except OSError as error:
        raise _explain(error, path) from error


def _explain(error: OSError, path: str) -> Exception:
    if error.errno in _CANNOT:
        return IoError(
            f"{path} cannot be built of shared blocks: {error.strerror}", "merge with --merge commit or --merge pull"
        )
    return durable.explain(error, path, "share blocks with")
