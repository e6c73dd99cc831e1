"""Locks on image files: QEMU's own, and one of snaptree's.

QEMU marks what it does with an image by open-file-description locks on single bytes (``block/file-posix.c``): byte
100 + i says that permission i is used, 200 + i that it is not shared with others; i is 0 consistent read, 1 write,
2 write unchanged, 3 resize. All are read locks, so that several can hold them; conflicts are found by asking whether
somebody holds the counterpart.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from functools import partial

from msgspec import Struct

from snaptree.errors import BusyError, CancelledError, IoError, NotFoundError, RefusedError
from snaptree.images.workers import run_together
from snaptree.paths import opened_at

_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_FLOCK = struct.Struct("hhqqi4x")
_USED, _UNSHARED = 100, 200
_PERMISSIONS = range(4)
_MODES: dict[str, tuple[frozenset[int], frozenset[int]]] = {
    # mode: (permissions used, permissions not shared)
    "read": (frozenset({0}), frozenset({1, 3})),
    "exclusive": (frozenset({0, 1, 3}), frozenset({0, 1, 2, 3})),
}
_TRIES = 100
"""So often a file that was replaced before it was locked is opened anew at once."""
OWN_BYTE = 0x736E6170
"""snaptree's own lock is on this byte ("snap"), far from QEMU's; images may be shorter than that."""


def _lock(descriptor: int, kind: int, byte: int, command: int = _F_OFD_SETLK) -> tuple[int, int]:
    """Set, release or test a lock on one byte; the type and process that a test finds."""
    request = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
    found = fcntl.fcntl(descriptor, command, request)
    kind, _, _, _, process = _FLOCK.unpack(found)
    return kind, process


def _held(descriptor: int, byte: int) -> bool:
    """Whether somebody else holds a lock on the byte."""
    return _lock(descriptor, fcntl.F_WRLCK, byte, _F_OFD_GETLK)[0] != fcntl.F_UNLCK


class ImageLock:
    """QEMU's image locks on one file, held until :meth:`release`.

    ``read`` keeps writers away, ``exclusive`` everybody.

    :raise BusyError: another process uses the file in a way that does not go with it.
    :raise OSError: the file cannot be opened.
    """

    def __init__(self, path: str, mode: str) -> None:
        self.path = path
        self.mode = mode
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        used, unshared = _MODES[mode]
        try:
            for permission in used:
                _lock(self._descriptor, fcntl.F_RDLCK, _USED + permission)
            for permission in unshared:
                _lock(self._descriptor, fcntl.F_RDLCK, _UNSHARED + permission)
            for permission in used:
                if _held(self._descriptor, _UNSHARED + permission):
                    raise BusyError(f"{path} is in use by another process")
            for permission in unshared:
                if _held(self._descriptor, _USED + permission):
                    raise BusyError(f"{path} is in use by another process")
        except BaseException:
            self.release()
            raise

    def let_inherit(self, *, inherit: bool) -> None:
        """Whether programs that are started from now on hold the locks too, as long as they run."""
        os.set_inheritable(self._descriptor, inherit)

    def release(self) -> None:
        """Give the locks up."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Conflict(Struct, frozen=True):
    """How another process uses an image."""

    reading: bool
    writing: bool


def probe(path: str) -> Conflict | None:
    """How other processes use the image by QEMU's locks; ``None`` when nobody does. Nothing is locked."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        used = [_held(descriptor, _USED + permission) for permission in _PERMISSIONS]
    finally:
        os.close(descriptor)
    if not any(used):
        return None
    return Conflict(reading=used[0], writing=used[1] or used[3])


CLOSERS = 3
"""So many threads at most help to close files that were removed."""


def worked_on(path: str) -> bool:
    """Whether a snaptree has its own lock on the image. Nothing is locked."""
    try:
        descriptor = os.open(opened_at(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return _held(descriptor, OWN_BYTE)
    finally:
        os.close(descriptor)


class MachineLock:
    """snaptree's own lock on a machine: on the images themselves, so that two state folders exclude each other.

    It is a write lock on one byte that QEMU does not use; where a file cannot be opened for writing it is ``flock``.
    Files are locked in the order of their inodes, all or none.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], int] = {}

    def acquire(self, paths: Collection[str], wait: float = 0.0, cancelled: threading.Event | None = None) -> None:
        """Lock all the files, waiting for so many seconds at most.

        :raise BusyError: another operation has one of them.
        :raise CancelledError: ``cancelled`` was set while it waited.
        """
        deadline = time.monotonic() + max(0.0, wait)
        while True:
            for _ in range(_TRIES):
                taken, replaced = self._try(paths)
                if taken is None:
                    return
                if not replaced:
                    break
            if time.monotonic() >= deadline:
                hint = "try again later, or wait for it with --wait SECONDS"
                raise BusyError(f"another snaptree operation works on {taken}", hint)
            if cancelled is not None and cancelled.is_set():
                raise CancelledError(f"stopped while waiting for another snaptree operation on {taken}")
            time.sleep(min(0.05, max(0.0, deadline - time.monotonic())))

    def extend(self, paths: Iterable[str]) -> None:
        """Lock more files, without waiting.

        :raise BusyError: another operation has one of them.
        """
        self.acquire(list(paths), 0.0)

    def _try(self, paths: Collection[str]) -> tuple[str | None, bool]:
        """Lock all; the path that is taken, if any (then none of these is locked), or names another file by now."""
        opened: dict[tuple[int, int], tuple[int, str, bool]] = {}
        try:
            for path in paths:
                descriptor, writable = _open_for_lock(path)
                status = os.fstat(descriptor)
                key = (status.st_dev, status.st_ino)
                if key in self._held or key in opened:
                    os.close(descriptor)
                else:
                    opened[key] = (descriptor, path, writable)
            for key in sorted(opened):
                descriptor, path, writable = opened[key]
                if not _take(descriptor, writable=writable):
                    return path, False
                if not _is_still(descriptor, path):
                    return path, True
            self._held.update({key: descriptor for key, (descriptor, _, _) in opened.items()})
            opened = {}
            return None, False
        finally:
            for descriptor, _, _ in opened.values():
                os.close(descriptor)

    def release(self) -> None:
        """Give everything up.

        Where a file has been removed meanwhile its blocks are freed now, and its pages in memory, which for a large one
        takes longer than all else: several at once.
        """
        removed = [each for each in self._held.values() if os.fstat(each).st_nlink == 0]
        for descriptor in self._held.values():
            if descriptor not in removed:
                os.close(descriptor)
        self._held.clear()
        run_together((partial(os.close, each) for each in removed), min(len(removed) - 1, CLOSERS))


def _open_for_lock(path: str) -> tuple[int, bool]:
    flags = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(opened_at(path), os.O_RDWR | flags), True
    except (PermissionError, OSError) as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
            raise _unlockable(path, error) from error
    try:
        return os.open(opened_at(path), os.O_RDONLY | flags), False
    except OSError as error:
        raise _unlockable(path, error) from error


def _unlockable(path: str, error: OSError) -> Exception:
    if error.errno == errno.ENOENT:
        return NotFoundError(f"there is no {path}", "check the path; 'snaptree verify' says what is missing")
    if error.errno in (errno.EACCES, errno.EPERM):
        return RefusedError(f"not allowed to open {path}", "check its owner and mode, or use sudo")
    if error.errno == errno.ELOOP:
        return RefusedError(f"{path} is a symbolic link now", "put the image itself in its place again")
    return IoError(f"{path} cannot be locked: {error.strerror}")


def _is_still(descriptor: int, path: str) -> bool:
    """Whether the path still names the open file: whoever had it locked may have put another in its place."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(opened_at(path)))
    except OSError:
        return False


def _take(descriptor: int, *, writable: bool) -> bool:
    try:
        if writable:
            _lock(descriptor, fcntl.F_WRLCK, OWN_BYTE)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK):
            return False
        raise
    return True


def who_has_open(paths: Iterable[str], besides: int = 0, guest: str = "") -> dict[str, tuple[str, ...]]:
    """The other processes that have each file open, as ``name (pid)``, as far as we may see them.

    :param besides: a process that may.
    :param guest: whoever has this file open may, too.
    """
    wanted: dict[tuple[int, int], str] = {}
    for path in paths:
        if (status := _status(path)) is not None:
            wanted[status.st_dev, status.st_ino] = path
    allowed = {(status.st_dev, status.st_ino)} if guest and (status := _status(guest)) else set()
    found: dict[str, list[str]] = {}
    for process in _others():
        opened = open_in(process) if process != besides else frozenset()
        for path in [wanted[inode] for inode in opened & wanted.keys() if not opened & allowed]:
            found.setdefault(path, []).append(f"{_name_of(process)} ({process})")
    return {path: tuple(sorted(set(names))) for path, names in found.items()}


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def users_of(path: str) -> frozenset[int]:
    """The other processes that have a file open, as far as we may see them."""
    status = _status(path)
    if status is None:
        return frozenset()
    return frozenset(each for each in _others() if (status.st_dev, status.st_ino) in open_in(each))


def _others() -> Iterator[int]:
    """The processes besides this one."""
    return (int(each) for each in os.listdir("/proc") if each.isdigit() and int(each) != os.getpid())


def open_in(process: int) -> frozenset[tuple[int, int]]:
    """The files and block devices that a process has open, by device and inode, as far as we may see them."""
    found: set[tuple[int, int]] = set()
    folder = f"/proc/{process}/fd"
    with suppress(OSError):
        for descriptor in os.listdir(folder):
            with suppress(OSError):
                status = os.stat(f"{folder}/{descriptor}")
                if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
                    found.add((status.st_dev, status.st_ino))
    return frozenset(found)


def _name_of(process: int) -> str:
    try:
        with open(f"/proc/{process}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "a process"
