"""Making, replacing and removing files so that they are on disk when a function has returned.

This module does this, with ``small`` for small files, and nothing else may. A new file has its name only once it is
whole, synced, and has the owner, mode, ACL and label that it should have; it is never more readable than that, not
even for a moment. An fsync that fails is final: Linux forgets the dirty pages, so that a second one says nothing
(fsyncgate).

It promises what the file system promises for fsync and rename; on network file systems without them it promises less.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeAlias

from snaptree.errors import CancelledError, ExistsError, IoError, NoSpaceError, RefusedError, SnaptreeError
from snaptree.images.inode import inode_of, is_still
from snaptree.images.rights import copy_rights
from snaptree.paths import opened_at

Claim: TypeAlias = Callable[[str, int, int], None]
"""Told of a new file before it has its name: its temporary path, generation and inode."""

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_COPIED_AT_ONCE = 64 << 20
_ZEROED_AT_ONCE = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


def explain(error: OSError, path: str, doing: str) -> SnaptreeError:
    """The error of ours that says what the system's error means."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return NoSpaceError(f"no room to {doing} {path}: {reason}", "free some room on that file system")
    if error.errno == errno.EEXIST:
        return ExistsError(f"{path} exists already", "move it away, or choose another name")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RefusedError(f"not allowed to {doing} {path}: {reason}", "check its owner and mode, or use sudo")
    return IoError(f"cannot {doing} {path}: {reason}", "look at the kernel's log for the device")


@contextmanager
def explained(path: str, doing: str) -> Iterator[None]:
    """Turn the system's errors of the block into ours."""
    try:
        yield
    except OSError as error:
        raise explain(error, path, doing) from error
    except MemoryError as error:
        raise IoError(f"not enough memory to {doing} {path}", "free some memory, or raise the limit on it") from error


# ---- syncing ------------------------------------------------------------------------------------------------------


def sync(descriptor: int, path: str) -> None:
    """Bring a file's data and size to disk. A failure is final."""
    with explained(path, "sync"):
        os.fsync(descriptor)


def sync_file(path: str) -> None:
    """Bring to disk what another program wrote to the file."""
    with explained(path, "sync"):
        descriptor = os.open(opened_at(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_folder(path: str) -> None:
    """Bring the names in the file's folder to disk."""
    folder = os.path.dirname(path)
    with explained(folder, "sync"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- making files -------------------------------------------------------------------------------------------------


def temporary_path(path: str, token: str) -> str:
    """The hidden name under which the operation makes the file of that path; the same after a crash."""
    folder, base = os.path.split(path)
    short = os.fsdecode(os.fsencode(base)[-80:])
    return os.path.join(folder, f".snaptree-{token}-{short}")


def prepare_file(path: str, like: str, token: str, writes: Iterable[tuple[int, bytes]], length: int) -> str:
    """Make the hidden file that will have the path, with rights and first contents; its temporary path."""
    temporary = temporary_path(path, token)
    with explained(path, "make"):
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            copy_rights(descriptor, like)
            os.ftruncate(descriptor, length)
            for offset, data in writes:
                write_all(descriptor, offset, data)
            os.fsync(descriptor)
        except BaseException:
            os.unlink(temporary)
            raise
        finally:
            os.close(descriptor)
    return temporary


def publish(temporary: str, path: str) -> None:
    """Give a prepared file its name, unless something has it.

    :raise ExistsError: something has it.
    """
    sync_file(temporary)
    with explained(path, "make"):
        rename_new(temporary, path)
    sync_folder(path)


def make_file(path: str, writes: Iterable[tuple[int, bytes]], length: int, like: str, claim: Claim, token: str) -> None:
    """Make a whole file and then give it its name.

    :param like: the file whose owner, mode, ACL and label it gets.
    :param claim: is told of the file before it has its name.
    :raise ExistsError: something has the name.
    :raise NoSpaceError: there is no room.
    """
    temporary = prepare_file(path, like, token, writes, length)
    try:
        with explained(path, "make"):
            claim(temporary, *inode_of(temporary))
            rename_new(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path)


def copy_into(source: str, target: str, *, cancelled: Callable[[], bool] = lambda: False) -> None:
    """Copy what the source file holds into a prepared file, holes as holes, with shared blocks where the system can.

    :func:`publish` brings it to disk.

    :raise CancelledError: ``cancelled`` said so.
    """
    with opened_for_writing(target) as writing, explained(target, "copy to"):
        reading = os.open(opened_at(source), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            length = os.fstat(reading).st_size
            os.ftruncate(writing, length)
            at = 0
            while at < length:
                try:
                    at = os.lseek(reading, at, os.SEEK_DATA)
                except OSError as error:
                    if error.errno == errno.ENXIO:
                        break
                    raise
                end = os.lseek(reading, at, os.SEEK_HOLE)
                while at < end:
                    if cancelled():
                        raise CancelledError(f"stopped while {source} was being copied")
                    at += _copy_range(reading, writing, at, min(end - at, _COPIED_AT_ONCE))
        finally:
            os.close(reading)


def _copy_range(reading: int, writing: int, at: int, length: int) -> int:
    try:
        count = os.copy_file_range(reading, writing, length, at, at)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        count = 0
    if count:
        return count
    data = os.pread(reading, length, at)
    if not data:
        raise OSError(errno.EIO, "the file became shorter while it was being copied")
    write_all(writing, at, data)
    return len(data)


def write_all(descriptor: int, offset: int, data: bytes | memoryview) -> None:
    """Write all of the data at the offset."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view = view[count:]
        offset += count


@contextmanager
def opened_for_writing(path: str) -> Iterator[int]:
    """A descriptor for changing a file in place; follows no link but to a block device, never makes a file."""
    with explained(path, "open"):
        descriptor = os.open(opened_at(path), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_in_place(descriptor: int, offset: int, data: bytes, path: str) -> None:
    """Change bytes of a file that is there."""
    with explained(path, "write to"):
        write_all(descriptor, offset, data)


_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2


def punch_hole(descriptor: int, offset: int, length: int, path: str) -> bool:
    """Give the blocks of a range back to the file system; it reads as zeroes then. Whether the system could."""
    mode = ctypes.c_int(_FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE)
    if _system().fallocate64(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise explain(OSError(number, os.strerror(number)), path, "punch holes into")
        return False
    return True


def write_zeroes(descriptor: int, offset: int, length: int, path: str) -> None:
    """Let a range within the file read as zeroes, without blocks where the system can."""
    if not punch_hole(descriptor, offset, length, path):
        for start in range(offset, offset + length, _ZEROED_AT_ONCE):
            write_in_place(descriptor, start, bytes(min(_ZEROED_AT_ONCE, offset + length - start)), path)


def set_length(descriptor: int, length: int, path: str) -> None:
    """Let the file have that length; what is new reads as zeroes."""
    with explained(path, "write to"):
        os.ftruncate(descriptor, length)


# ---- names --------------------------------------------------------------------------------------------------------


@functools.cache
def _system() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _renameat2(source: str, target: str, flags: int) -> None:
    done = _system().renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags))
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), source, None, target)


def rename_new(source: str, target: str) -> None:
    """Rename, unless something has the target's name.

    :raise FileExistsError: something has.
    """
    try:
        _renameat2(source, target, _RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        # The file system cannot; a hard link is as exclusive.
        os.link(source, target, follow_symlinks=False)
        os.unlink(source)


def replace(temporary: str, path: str) -> None:
    """Let a prepared file, which is on disk, take the place of what the path names, in one rename."""
    with explained(path, "replace"):
        os.rename(temporary, path)
    sync_folder(path)


def exchange(one: str, other: str) -> None:
    """Let two files or folders of one folder change names, in one step.

    :raise RefusedError: the file system cannot.
    """
    with explained(other, "replace"):
        try:
            _renameat2(one, other, _RENAME_EXCHANGE)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
            hint = "move it to a local file system"
            raise RefusedError(f"the file system of {other} cannot exchange two names", hint) from error
    sync_folder(other)


def put_in_place(source: str, target: str) -> None:
    """Let ``target`` name the file that ``source`` names, replacing what it named, in one rename; ``source`` stays.

    Doing it twice is the same as once.
    """
    with explained(target, "replace"):
        if os.path.exists(target) and os.path.samestat(os.lstat(source), os.lstat(target)):
            sync_folder(target)
            return
        hidden = temporary_path(target, "name")
        with suppress(FileNotFoundError):
            os.unlink(hidden)
        os.link(source, hidden, follow_symlinks=False)
        os.rename(hidden, target)
    sync_folder(target)


def remove(path: str, identity: tuple[int, int] | None) -> bool:
    """Remove a file if it still is the one meant (generation and inode); whether it was there.

    What is gone already, or is another file by now, is left alone.
    """
    with explained(path, "remove"):
        try:
            if identity is not None and not is_still(path, *identity):
                return False
            os.unlink(path)
        except FileNotFoundError:
            _sync_gone(path)
            return False
    sync_folder(path)
    return True


def _sync_gone(path: str) -> None:
    """What is gone may have been removed by a process that was killed before it had synced that."""
    if os.path.isdir(os.path.dirname(path)):
        sync_folder(path)


def keep_name(path: str, token: str) -> None:
    """Give what the path names, a socket say, a hidden second name, so that it can have its name again."""
    with explained(path, "link"):
        os.link(path, temporary_path(path, token), follow_symlinks=False)


def discard_temporary(path: str, token: str) -> None:
    """Remove what an operation had prepared for the path, if anything."""
    remove_small(temporary_path(path, token))


# ---- small files and folders --------------------------------------------------------------------------------------


def make_folder(path: str) -> None:
    """Make a folder for us only, with those above it that are missing, unless it is there."""
    if os.path.isdir(path):
        # Made by a process, perhaps, that was killed before it had synced it; one that is ours can be synced.
        with suppress(RefusedError):
            sync_folder(path)
        return
    with explained(path, "make"):
        make_folder(os.path.dirname(path))
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
    sync_folder(path)


def remove_small(path: str) -> None:
    """Remove a small file or a folder; what is gone already is no error."""
    with explained(path, "remove"):
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            _sync_gone(path)
            return
        if stat.S_ISDIR(mode):
            import shutil

            shutil.rmtree(path)
        else:
            os.unlink(path)
    sync_folder(path)
