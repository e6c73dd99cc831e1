"""The state file: SQLite, one for all standalone machines of a state folder."""

from __future__ import annotations

import os
import sqlite3
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from snaptree.errors import StateError

SCHEMA = 1
_OWN = ("firmware", "qemu", "operations")
"""The folders that snaptree makes beside the state file."""
_TABLES = """
CREATE TABLE machine (name TEXT PRIMARY KEY, config TEXT NOT NULL, active TEXT NOT NULL);
CREATE TABLE layer (
    machine TEXT NOT NULL, id INTEGER NOT NULL, disk TEXT NOT NULL, path TEXT NOT NULL, format TEXT NOT NULL,
    parent INTEGER, owned INTEGER NOT NULL, virtual_size INTEGER NOT NULL, half_merged INTEGER NOT NULL,
    made INTEGER NOT NULL, identity TEXT, PRIMARY KEY (machine, id));
CREATE INDEX layer_path ON layer (path);
CREATE TABLE snapshot (
    machine TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (machine, name));
CREATE TABLE branch (machine TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (machine, name));
CREATE TABLE memory (machine TEXT NOT NULL, id INTEGER NOT NULL, value TEXT NOT NULL, PRIMARY KEY (machine, id));
CREATE TABLE root (
    machine TEXT NOT NULL, disk TEXT NOT NULL, path TEXT NOT NULL, format TEXT NOT NULL, PRIMARY KEY (machine, disk));
CREATE TABLE operation (
    id INTEGER PRIMARY KEY AUTOINCREMENT, machine TEXT NOT NULL, operation TEXT NOT NULL, summary TEXT NOT NULL,
    steps TEXT NOT NULL, no_return INTEGER NOT NULL, way TEXT, state TEXT NOT NULL, step INTEGER NOT NULL,
    started REAL NOT NULL, ended REAL, bytes INTEGER NOT NULL DEFAULT 0, detail TEXT NOT NULL DEFAULT '');
CREATE INDEX operation_machine ON operation (machine, state);
CREATE TABLE claim (
    operation INTEGER NOT NULL, path TEXT NOT NULL, generation INTEGER NOT NULL, inode INTEGER NOT NULL,
    PRIMARY KEY (path, generation, inode));
CREATE TABLE note (
    operation INTEGER NOT NULL, step INTEGER NOT NULL, about TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (operation, step, about)
);
"""


def default_state() -> str:
    """The state folder: ``$SNAPTREE_STATE``, ``/var/lib/snaptree`` for root, the XDG state folder otherwise."""
    chosen = os.environ.get("SNAPTREE_STATE")
    if chosen:
        return os.path.abspath(chosen)
    if os.geteuid() == 0:
        return "/var/lib/snaptree"
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):
        # The XDG Base Directory specification has relative paths ignored.
        base = os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(base, "snaptree")


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_USED: weakref.WeakSet[Database] = weakref.WeakSet()


def close_all() -> None:
    """Close every state file that is open in this process: SQLite clears up after itself then."""
    for each in list(_USED):
        each.close()


_PATIENCE = 10.0
"""So many seconds another process is waited for."""


def _keep_a_log(connection: sqlite3.Connection) -> None:
    """Have the file write ahead; where processes come to a new file at once, one of them makes it so.

    SQLite waits for nobody there, since each of them has read the file already: the others are told that it is locked.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.005)


class Database:
    """The state file of one state folder.

    WAL with ``synchronous=FULL``: a transaction that has returned is on disk. Nothing is made before the first write:
    reading commands on an empty state folder leave it as it is.

    :raise StateError: on use, when the folder or file cannot be used or was written by a newer version.
    """

    def __init__(self, folder: str) -> None:
        self.folder = os.path.abspath(folder)
        self.path = os.path.join(self.folder, "state.sqlite")
        self._connection: sqlite3.Connection | None = None
        _USED.add(self)

    def exists(self) -> bool:
        """Whether anything has been remembered yet.

        :raise StateError: the state folder is none, or may not be looked into.
        """
        try:
            os.stat(self.path)
        except FileNotFoundError:
            return False
        except NotADirectoryError as error:
            raise StateError(
                f"{self.folder} is not a folder", "choose another state folder with SNAPTREE_STATE"
            ) from error
        except OSError as error:
            # Not to be taken for one in which nothing has been remembered.
            raise StateError(
                f"the state folder {self.folder} cannot be used: {error}",
                "choose another one with SNAPTREE_STATE, or mend its permissions",
            ) from error
        return True

    def open(self) -> sqlite3.Connection:
        """The connection, opened (and the file made) on first use."""
        if self._connection is None:
            try:
                self._connection = self._connect()
            except (OSError, sqlite3.Error) as error:
                raise StateError(
                    f"the state folder {self.folder} cannot be used: {error}",
                    "choose another one with SNAPTREE_STATE, or mend its permissions",
                ) from error
        return self._connection

    def close(self) -> None:
        """Close the file; a later use opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __del__(self) -> None:
        # The connection may be in a cycle, and outlive us until the next collection, or the end.
        self.close()

    def sync(self) -> None:
        """Bring to disk what another process has committed, and was killed before it had synced it."""
        try:
            # SQLite's locks are on its other files: this one can be closed again.
            descriptor = os.open(self.path + "-wal", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise StateError(
                f"{self.path} cannot be synced: {error}", "look at the kernel's log for the device"
            ) from error
        finally:
            os.close(descriptor)

    def _make_folder(self) -> None:
        """Make the state folder, and those above it that are missing, for us only, whatever the umask.

        One of ours that is there and more open, and its files, are made as private as one that snaptree makes; not one
        that has other things in it.
        """
        missing, above = list[str](), self.folder
        while not os.path.isdir(above):
            missing.append(above)
            above = os.path.dirname(above)
        for folder in reversed(missing):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            _sync_folder(os.path.dirname(folder))
        own = all(name in _OWN or name.startswith("state.sqlite") for name in os.listdir(self.folder))
        for path, mode in (
            *([(self.folder, 0o700)] if own else []),
            *((self.path + each, 0o600) for each in ("", "-wal", "-shm")),
        ):
            try:
                status = os.stat(path)
            except FileNotFoundError:
                continue
            if status.st_uid == os.geteuid() and status.st_mode & 0o777 & ~mode:
                os.chmod(path, status.st_mode & mode)

    def _connect(self) -> sqlite3.Connection:
        self._make_folder()
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "it is not writable")
        # SQLite makes its files with the umask; the folder is private, and the file is made so beforehand. One that is
        # there must not be opened here: closing it would drop the locks that SQLite holds on it in this process, and
        # another process would take itself for the last one and remove the write-ahead log.
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        except FileExistsError:
            if not os.path.isfile(self.path) or os.path.islink(self.path):
                raise PermissionError(1, f"{self.path} is no plain file") from None
        connection = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
        _keep_a_log(connection)
        connection.execute("PRAGMA synchronous=FULL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            connection.close()
            raise StateError(
                f"{self.path} was written by a newer snaptree (schema {version}, this one knows {SCHEMA})",
                "use the newer snaptree, or another state folder with SNAPTREE_STATE",
            )
        if version < SCHEMA:
            connection.execute("BEGIN IMMEDIATE")
            if connection.execute("PRAGMA user_version").fetchone()[0] < SCHEMA:
                for statement in _TABLES.split(";"):
                    if statement.strip():
                        connection.execute(statement)
                connection.execute(f"PRAGMA user_version={SCHEMA}")
            connection.execute("COMMIT")
        return connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction that is on disk when the block has ended, or has not happened."""
        connection = self.open()
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise StateError(
                f"{self.path} cannot be written: {error}", "free some room or mend the state folder, then try again"
            ) from error

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """All that the block reads is of one moment."""
        connection = self.open()
        try:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise StateError(f"{self.path} cannot be read: {error}", "is it a state file of snaptree?") from error

    def rows(self, query: str, values: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        """The rows of a query; none when nothing has been remembered yet."""
        if self._connection is None and not self.exists():
            return []
        try:
            return self.open().execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StateError(f"{self.path} cannot be read: {error}", "is it a state file of snaptree?") from error
