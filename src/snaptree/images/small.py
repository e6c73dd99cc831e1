"""Small files and folders of small files, copied whole: firmware state.

With ``durable``, which has what it does this with, the one place that changes files.
"""

from __future__ import annotations

import os
import stat

from snaptree.images import durable
from snaptree.images.rights import copy_rights


def copy(source: str, target: str, like: str, token: str) -> None:
    """Copy a small file or a folder of small files whole, to a name that nothing has.

    Links are not followed: they are copied as links.
    """
    temporary = durable.temporary_path(target, token)
    durable.remove_small(temporary)
    with durable.explained(target, "copy to"):
        _copy(source, temporary, like)
        _sync_tree(temporary)
        durable.rename_new(temporary, target)
    durable.sync_folder(target)


def replace(source: str, target: str, token: str) -> None:
    """Put a copy of a small file or folder in the place of another, in one rename; the old one goes."""
    temporary = prepare(source, target, token)
    if os.path.isdir(target) and not os.path.islink(target):
        durable.exchange(temporary, target)
    else:
        durable.replace(temporary, target)
    durable.remove_small(temporary)


def prepare(source: str, target: str, token: str) -> str:
    """Make a copy of a small file or folder under the hidden name of another, with the rights of that; the name."""
    temporary = durable.temporary_path(target, token)
    durable.remove_small(temporary)
    with durable.explained(target, "replace"):
        _copy(source, temporary, target if os.path.lexists(target) else source)
        _sync_tree(temporary)
    return temporary


def same(one: str, other: str) -> bool:
    """Whether two small files, or folders of small files, hold the same; where one is not there they do not."""
    try:
        if os.path.isdir(one) or os.path.isdir(other):
            names = sorted(os.listdir(one))
            return names == sorted(os.listdir(other)) and all(
                same(os.path.join(one, name), os.path.join(other, name)) for name in names
            )
        with open(one, "rb") as first, open(other, "rb") as second:
            while (data := first.read(1 << 20)) == second.read(1 << 20):
                if not data:
                    return True
        return False
    except (FileNotFoundError, NotADirectoryError):
        return False


def _copy(source: str, target: str, like: str) -> None:
    mode = os.lstat(source).st_mode
    if stat.S_ISLNK(mode):
        os.symlink(os.readlink(source), target)
    elif stat.S_ISDIR(mode):
        os.mkdir(target, 0o700)
        for name in sorted(os.listdir(source)):
            inside = os.path.join(source, name)
            _copy(inside, os.path.join(target, name), inside)
        _rights_of_top(target, like)
    elif stat.S_ISREG(mode):
        reading = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                copy_rights(writing, like)
                while data := os.read(reading, 1 << 20):
                    view = memoryview(data)
                    while view:
                        view = view[os.write(writing, view) :]
            finally:
                os.close(writing)
        finally:
            os.close(reading)


def _rights_of_top(path: str, like: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        copy_rights(descriptor, like)
    finally:
        os.close(descriptor)


def _sync_tree(path: str) -> None:
    if os.path.islink(path):
        return
    if os.path.isdir(path):
        for name in os.listdir(path):
            _sync_tree(os.path.join(path, name))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
