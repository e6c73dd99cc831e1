"""Monitor sockets: connecting to one, and making one for a QEMU that is to be started."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct

from snaptree.errors import RefusedError, ToolError
from snaptree.images import durable, rights

CONNECT_SECONDS = 2.0
_CREDENTIALS = struct.Struct("3i")


@contextmanager
def _short(path: str) -> Iterator[str]:
    """Another path to the same place that fits into a socket's address (107 bytes), however long this one is."""
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


def dial(path: str) -> socket.socket | None:
    """Connect to a monitor; ``None`` when nothing listens there.

    Somebody listening says nothing of who it is, nor that it will greet us.

    :raise RefusedError: the path is no socket, or we may not connect to it.
    :raise ToolError: it takes no connection: another client holds it, and one waits already.
    """
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise RefusedError(f"{path} is not a socket", "give the path of QEMU's QMP socket with --qmp")
        with _short(path) as address:
            found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                _connect(found, address)
            except BaseException:
                found.close()
                raise
    except BlockingIOError as error:
        raise ToolError(f"{path} takes no connection", "is another client connected to the monitor?") from error
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
            return None
        hint = "check the owner and mode of the socket, or use sudo"
        raise RefusedError(f"cannot connect to {path}: {error.strerror}", hint) from error
    return found


def _connect(to: socket.socket, address: str) -> None:
    """Connect; while QEMU has not yet seen to the one before us, it takes nobody (EAGAIN)."""
    to.settimeout(0.0)
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            to.connect(address)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.005)


class Peer(Struct, frozen=True):
    """Who is at the other end, as the kernel says."""

    process: int
    user: int

    @property
    def trusted(self) -> bool:
        """Whether it is one of us, or root."""
        return self.user in (os.geteuid(), 0)


def peer_of(connection: socket.socket) -> Peer:
    """Who is at the other end of a connection."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(credentials)
    return Peer(process, user)


def bind(path: str) -> socket.socket:
    """Make a socket that only we may connect to, in a folder that is ours, in the place of one that nobody uses.

    Nobody listens yet: QEMU does so itself, which makes it known as the process at the other end.
    """
    durable.make_folder(os.path.dirname(path))
    durable.remove_small(path)
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        rights.keep_private(found.fileno())
        with _short(path) as address:
            found.bind(address)
    except BaseException:
        found.close()
        raise
    return found
