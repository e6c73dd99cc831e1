"""Having the page cache written back while more is written, so that the sync at the end finds little to do.

Source: ``sync_file_range(2)``. It makes nothing durable by itself: whoever needs that syncs afterwards all the same.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from contextlib import suppress

from snaptree.paths import opened_at

_WAIT_BEFORE, _WRITE = 1, 2
_NOT_HERE = (errno.EINVAL, errno.ENOSYS, errno.ESPIPE, errno.EOPNOTSUPP)


def begin(descriptor: int, offset: int = 0, length: int = 0) -> None:
    """Begin to write back a range of a file, in bytes; without a length all that follows."""
    _sync_range(descriptor, offset, length, _WRITE)


def wait(descriptor: int, offset: int, length: int) -> None:
    """Wait until a range that has been begun is on the device.

    A failure of writing back is told once for each open file: it would be gone when the sync at the end asks.

    :raise OSError: it could not be written.
    """
    _sync_range(descriptor, offset, length, _WAIT_BEFORE)


def begin_file(path: str) -> None:
    """Begin to write back what another program writes to a file. Whether that succeeds is for its sync to say."""
    with suppress(OSError):
        descriptor = os.open(opened_at(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            begin(descriptor)
        finally:
            os.close(descriptor)


@functools.cache
def _system() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _sync_range(descriptor: int, offset: int, length: int, flags: int) -> None:
    done = _system().sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(flags))
    if done != 0 and (number := ctypes.get_errno()) not in _NOT_HERE:
        raise OSError(number, os.strerror(number))
