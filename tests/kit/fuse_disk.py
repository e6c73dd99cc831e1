"""A file that keeps every request made to it, served by FUSE: one request after the other, in the order they come.

``python -m tests.kit.fuse_disk DISK LOG MOUNTPOINT`` runs until it is unmounted. What is asked of MOUNTPOINT (a file)
is done to DISK and written to LOG: for each request :data:`RECORD` (offset, length, kind) and, for a write, its bytes.
Numbers and structures are those of include/uapi/linux/fuse.h, protocol 7.31. (QEMU's ``blklogwrites`` under its own
FUSE export would do the same, but in QEMU 10.0.2 two writes at once can get each other's data there.)
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from typing import BinaryIO

RECORD = struct.Struct("<QQQ")
WRITE, FLUSH, DISCARD = 1, 2, 3

_HEAD, _ANSWER = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
_FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE, _STATFS, _RELEASE = 2, 3, 4, 14, 15, 16, 17, 18
_FSYNC, _FLUSH, _INIT, _INTERRUPT, _DESTROY, _BATCH_FORGET, _FALLOCATE = 20, 25, 26, 36, 38, 42, 43
_FOPEN_DIRECT_IO = 1
_MAX_WRITE = 1 << 20
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16


class FuseDisk:
    """The server."""

    def __init__(self, disk: str, log: str, mountpoint: str) -> None:
        self.disk = os.open(disk, os.O_RDWR)
        self.log: BinaryIO = open(log, "ab", buffering=0)  # noqa: SIM115 - it lives as long as the server
        self.size = os.fstat(self.disk).st_size
        self.fuse = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self.fuse},rootmode=100600,user_id=0,group_id=0,allow_other,max_read={_MAX_WRITE}"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"snaptree-test", os.fsencode(mountpoint), b"fuse", 0, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), "mount")

    def serve(self) -> None:
        """Answer until it is unmounted."""
        while True:
            try:
                request = os.read(self.fuse, _MAX_WRITE + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                raise
            _, kind, number, *_ = _HEAD.unpack_from(request)
            if kind in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                continue
            failed, answer = self.answer(kind, memoryview(request)[_HEAD.size :])
            os.write(self.fuse, _ANSWER.pack(_ANSWER.size + len(answer), -failed, number) + answer)
            if kind == _DESTROY:
                return

    def answer(self, kind: int, body: memoryview) -> tuple[int, bytes]:
        """What one request gets: an error number, and the bytes of the answer."""
        if kind == _INIT:
            ahead = struct.unpack_from("<4I", body)[2]
            # Version, read-ahead, flags (max_pages), background, congestion, largest write, unit of time, pages …
            return 0, struct.pack("<IIIIHHIIHH8I", 7, 31, ahead, 1 << 22, 16, 12, _MAX_WRITE, 1, 256, 0, *[0] * 8)
        if kind in (_GETATTR, _SETATTR):
            times, mode = (0, 0, 0, 0, 0, 0), 0o100600
            head = struct.pack("<QII", 0, 0, 0)
            return 0, head + struct.pack(
                "<6Q10I", 1, self.size, self.size // 512, *times[:3], *times[:3], mode, 1, 0, 0, 0, 512, 0
            )
        if kind == _OPEN:
            return 0, struct.pack("<QII", 1, _FOPEN_DIRECT_IO, 0)
        if kind == _READ:
            _, offset, length = struct.unpack_from("<QQI", body)
            return 0, os.pread(self.disk, length, offset)
        if kind == _WRITE:
            _, offset, length = struct.unpack_from("<QQI", body)
            data = bytes(body[40 : 40 + length])
            os.pwrite(self.disk, data, offset)
            self.log.write(RECORD.pack(offset, length, WRITE) + data)
            return 0, struct.pack("<II", length, 0)
        if kind == _FALLOCATE:
            _, offset, length, mode = struct.unpack_from("<QQQI", body)
            if not mode & (_PUNCH_HOLE | _ZERO_RANGE):
                return errno.EOPNOTSUPP, b""
            os.pwrite(self.disk, bytes(length), offset)
            self.log.write(RECORD.pack(offset, length, DISCARD))
            return 0, b""
        if kind == _FSYNC:
            self.log.write(RECORD.pack(0, 0, FLUSH))
            return 0, b""
        if kind in (_FLUSH, _RELEASE, _DESTROY):
            return 0, b""
        return errno.ENOSYS, b""


if __name__ == "__main__":
    FuseDisk(*sys.argv[1:]).serve()
