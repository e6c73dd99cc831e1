"""Owner, group, label, ACL and mode of new files: those of the file that they come from, or take the place of."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from snaptree.paths import opened_at

_ACL, _LABEL = "system.posix_acl_access", "security.selinux"


def copy_rights(descriptor: int, like: str) -> None:
    """Give an open file that only we may read the owner, group, label, ACL and mode of another, in this order.

    At no moment may anybody read it who may not read the other. Without the right to give a file away, owner and group
    stay ours, and group and others get nothing.

    :raise OSError: the other is a symbolic link, but to a block device, or not there.
    """
    like = opened_at(like)
    status = os.lstat(like)
    if stat.S_ISLNK(status.st_mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), like)
    mode = stat.S_IMODE(status.st_mode) & 0o777
    acl = _attribute(like, _ACL)
    mine = os.fstat(descriptor)
    if (mine.st_uid, mine.st_gid) != (status.st_uid, status.st_gid):
        try:
            os.fchown(descriptor, status.st_uid, status.st_gid)
        except PermissionError:
            try:
                os.fchown(descriptor, -1, status.st_gid)
            except PermissionError:
                mode, acl = mode & 0o700, None
    label = _attribute(like, _LABEL)
    if label is not None:
        with suppress(OSError):
            os.setxattr(descriptor, _LABEL, label)
    if not _set_acl(descriptor, acl):
        # The mode's group bits were the ACL's mask: they would let the whole group in, or whom the folder's ACL names.
        mode &= 0o700
    os.fchmod(descriptor, mode)


def copy_notes(source: str | int, target: str | int) -> None:
    """Give a file the ``user.`` attributes of the one whose place it takes, as far as the system lets us.

    They are what people and programs have written about a file; nothing rests on them.
    """
    with suppress(OSError):
        for name in os.listxattr(source):
            if name.startswith("user."):
                os.setxattr(target, name, os.getxattr(source, name))


def can_give(status: os.stat_result) -> bool:
    """Whether a new file of ours can have that one's owner and group."""
    me = os.geteuid()
    return me == 0 or (status.st_uid == me and status.st_gid in (os.getegid(), *os.getgroups()))


def alike(path: str, other: str) -> bool:
    """Whether two files have the same owner, group and mode."""
    mine, theirs = os.lstat(path), os.lstat(other)
    return (mine.st_uid, mine.st_gid, mine.st_mode & 0o777) == (theirs.st_uid, theirs.st_gid, theirs.st_mode & 0o777)


def _attribute(path: str, name: str) -> bytes | None:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return None


def _set_acl(descriptor: int, acl: bytes | None) -> bool:
    """Give the file the ACL, or none where its folder has given it one; whether it has what it should."""
    try:
        if acl is not None:
            os.setxattr(descriptor, _ACL, acl)
        else:
            os.removexattr(descriptor, _ACL)
    except OSError as error:
        return acl is None and error.errno in (errno.ENODATA, errno.EOPNOTSUPP)
    return True


def keep_private(descriptor: int) -> None:
    """Keep an open file, or the name that a socket will have, for us only."""
    os.fchmod(descriptor, 0o600)
