"""The private folder of sockets on which operations are asked how they are, and told what to do.

A socket is there as long as its process lives; one that a killed process has left refuses connections, and is removed
by whoever finds it. None is ever synced. Paths of any length will do, and no link is followed: everything goes by
descriptors.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from snaptree.errors import RefusedError
from snaptree.images import rights
from snaptree.qemu.dialling import peer_of

FOLDER = "operations"
SUFFIX = ".sock"
_UNFINISHED_SECONDS = 60.0
"""So old a socket is that was made and never began to listen: its process was killed between."""


@contextmanager
def _folder(state: str, *, make: bool) -> Iterator[int]:
    """The folder, open; it is ours and no other user's.

    :raise OSError: it is not there, or is a link.
    :raise RefusedError: somebody else could put sockets there.
    """
    path = os.path.join(state, FOLDER)
    if make:
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if status.st_uid not in (os.geteuid(), 0) and os.geteuid() != 0:
            raise RefusedError(f"{path} belongs to another user", "choose a state folder of your own (SNAPTREE_STATE)")
        if make and status.st_uid == os.geteuid() and status.st_mode & 0o077:
            os.fchmod(descriptor, 0o700)
        elif status.st_mode & 0o022:
            raise RefusedError(f"others may write to {path}", f"keep it to yourself: chmod 700 {path}")
        yield descriptor
    finally:
        os.close(descriptor)


class Listening:
    """A socket that listens in the state folder; ``name`` is its file's. Whoever has it closes it.

    :raise OSError: there can be none (a file system without sockets, a link in the way).
    :raise RefusedError: the folder is not to be trusted.
    """

    def __init__(self, state: str) -> None:
        token = os.urandom(8).hex()
        self.name = token + SUFFIX
        self._state = state
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            with _folder(state, make=True) as folder:
                _sweep(folder)
                rights.keep_private(self.socket.fileno())
                self.socket.bind(f"/proc/self/fd/{folder}/{token}")
                # It has the name by which others find it only once it listens: what refuses connections is dead.
                self.socket.listen(64)
                os.rename(token, self.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            self.socket.close()
            raise

    def remove(self) -> None:
        """Remove its name: nobody new finds it."""
        with suppress(OSError, RefusedError), _folder(self._state, make=False) as folder:
            os.unlink(self.name, dir_fd=folder)


def _sweep(folder: int) -> None:
    """Remove sockets whose processes were killed."""
    for name in os.listdir(folder):
        with suppress(OSError):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISSOCK(status.st_mode):
                continue
            if name.endswith(SUFFIX):
                with suppress(BlockingIOError):
                    _connect(folder, name).close()
            elif time.time() - status.st_ctime > _UNFINISHED_SECONDS:
                os.unlink(name, dir_fd=folder)


def _connect(folder: int, name: str) -> socket.socket:
    """Connect without waiting; one that nobody listens on any more is removed.

    :raise BlockingIOError: too many others wait to be heard.
    :raise ConnectionRefusedError: nobody listens.
    :raise OSError: it is no socket of ours.
    """
    place = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        if not stat.S_ISSOCK(os.fstat(place).st_mode):
            raise FileNotFoundError(name)
        found.connect(f"/proc/self/fd/{place}")
        return found
    except BaseException as error:
        found.close()
        if isinstance(error, ConnectionRefusedError):
            with suppress(OSError):
                os.unlink(name, dir_fd=folder)
        raise
    finally:
        os.close(place)


def names(state: str) -> tuple[str, ...]:
    """The sockets that there are; none where no operation has ever listened.

    :raise RefusedError: the folder is not to be trusted.
    """
    try:
        with _folder(state, make=False) as folder:
            return tuple(sorted(name for name in os.listdir(folder) if name.endswith(SUFFIX)))
    except OSError:
        return ()


def connect(state: str, name: str, seconds: float) -> socket.socket | None:
    """Connect to one of the sockets; ``None`` when nobody listens there, or somebody who is not to be trusted.

    :raise TimeoutError: it takes nobody in that time.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            with _folder(state, make=False) as folder:
                found = _connect(folder, name)
        except BlockingIOError:
            if time.monotonic() > until:
                raise TimeoutError(name) from None
            time.sleep(0.02)
            continue
        except (OSError, RefusedError):
            return None
        if peer_of(found).trusted or os.geteuid() == 0:
            return found
        found.close()
        return None
