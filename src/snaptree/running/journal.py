"""The journal of one operation: each step is said durably before it is taken."""

from __future__ import annotations

import sqlite3
import time

from msgspec import Struct

from snaptree.model.layer import Identity, Layer, LayerId
from snaptree.planning.plan import Plan
from snaptree.planning.steps import Forget, Record, Register
from snaptree.store import operations, trees
from snaptree.store.database import Database
from snaptree.store.operations import Claim


class LogEntry(Struct, frozen=True):
    """One operation of the past, for ``snaptree log``.

    ``state`` is ``done``, ``undone``, ``paused`` or ``running`` (also of one that was killed); times are in seconds
    since the epoch, ``bytes`` is what was moved.
    """

    id: int
    operation: str
    summary: str
    state: str
    started: float
    ended: float | None
    bytes: int
    detail: str


def log(database: Database, machine: str) -> tuple[LogEntry, ...]:
    """The machine's operations, oldest first."""
    return tuple(
        LogEntry(each.id, each.operation, each.summary, each.state, each.started, each.ended, each.bytes, each.detail)
        for each in operations.history(database, machine)
    )


class Journal:
    """What the executor tells of one operation. Every method returns when its word is on disk.

    Each word is a sync, so that what belongs together is one. What ``remember`` and ``keep`` are told goes with the
    word that the next step begins: a crash between the two repeats the step, and with it what it has found out. The
    first step begins with the operation, and after a change of the tree, which is on disk when it is done, the next
    step begins with it, or the operation ends.
    """

    def __init__(self, database: Database, machine: str, operation: int, token: str, step: int = 0) -> None:
        self.database = database
        self.machine = machine
        self.operation = operation
        self.token = token
        self.step = step
        self.moved = 0
        self._identities: dict[LayerId, Identity] = {}
        self._notes: list[tuple[int, str, str]] = []
        self._last: int | None = None
        self._ended = False
        self._doubtful = False

    @classmethod
    def begin(cls, database: Database, machine: str, plan: Plan) -> Journal:
        """Put the plan into the journal; its first step is about to be taken."""
        now = time.time()
        with database.transaction() as connection:
            number = operations.begin(connection, machine, plan, now)
        journal = cls(database, machine, number, token_of(number, now))
        journal._last = len(plan.steps) - 1
        return journal

    @classmethod
    def resume(cls, database: Database, operation: operations.Operation) -> Journal:
        """Go on with an operation that was killed."""
        token = token_of(operation.id, operation.started)
        return cls(database, operation.machine, operation.id, token, operation.step)

    def layer(self, number: LayerId) -> Layer | None:
        """One layer of the stored tree."""
        return trees.layer_by_id(self.database, self.machine, number)

    def frozen_at(self, paths: tuple[str, ...]) -> tuple[Layer, ...]:
        """The layers of the stored tree at these paths whose identity is kept."""
        return trees.frozen_at(self.database, self.machine, paths)

    def owned(self, path: str) -> bool:
        """Whether a machine owns a layer at the path."""
        return bool(trees.owners_of(self.database, path))

    def machine_known(self) -> bool:
        """Whether the machine is in the state file."""
        return self.machine in trees.names(self.database)

    def take(self, step: int) -> None:
        """A step is about to be taken."""
        if step == self.step and not (self._identities or self._notes):
            return
        self._doubtful = True
        with self.database.transaction() as connection:
            self._flush(connection)
            operations.take_step(connection, self.operation, step)
        self._doubtful = False
        self.step = step

    def turn_back(self) -> None:
        """What was done is undone from now on, although the word that was said last may count.

        Where SQLite could not sync its log, what it had written to it counts all the same when somebody reads the log
        anew: the step that was never taken would be finished by recovery, and what has been undone taken for done.
        """
        if self._doubtful:
            with self.database.transaction() as connection:
                operations.turn_back(connection, self.operation)
            self._doubtful = False

    def end(self, state: str, detail: str = "") -> None:
        """The operation has come to an end."""
        if self._ended and state == operations.DONE:
            return
        with self.database.transaction() as connection:
            self._flush(connection)
            operations.end(connection, self.operation, state, time.time(), self.moved, detail)

    def remember(self, layer: LayerId, identity: Identity) -> None:
        """Keep, with the word that the next step begins, what a frozen layer looks like now."""
        self._identities[layer] = identity

    def keep(self, path: str, value: str) -> None:
        """Keep, with the next word, what later steps must know of a file that this one has worked on."""
        self._notes.append((self.step, path, value))

    def _flush(self, connection: sqlite3.Connection) -> None:
        for layer, identity in self._identities.items():
            trees.put_identity(connection, self.machine, layer, identity)
        self._identities.clear()
        for step, path, value in self._notes:
            operations.put_note(connection, self.operation, step, path, value)
        self._notes.clear()

    def record(self, step: Record, identities: dict[LayerId, Identity]) -> None:
        """Change the tree."""
        with self.database.transaction() as connection:
            trees.apply_delta(connection, self.machine, step.delta)
            for layer, identity in identities.items():
                trees.put_identity(connection, self.machine, layer, identity)
            if self._last is None:
                return
            if self.step < self._last:
                operations.take_step(connection, self.operation, self.step + 1)
            else:
                operations.end(connection, self.operation, operations.DONE, time.time(), self.moved)
        self._ended = self.step == self._last
        self.step = min(self.step + 1, self._last)

    def register(self, step: Register, *, new: bool) -> None:
        """Remember a machine."""
        with self.database.transaction() as connection:
            trees.register(connection, step.config, new=new)

    def forget(self, step: Forget) -> None:
        """Forget a machine."""
        with self.database.transaction() as connection:
            trees.forget(connection, step.name)

    def claim(self, path: str, generation: int, inode: int) -> None:
        """A file was made that will have the path."""
        with self.database.transaction() as connection:
            operations.claim(connection, self.operation, Claim(path, generation, inode))

    def claims(self, path: str) -> tuple[Claim, ...]:
        """What this operation made at the path."""
        return tuple(each for each in operations.claims_of(self.database, self.operation) if each.path == path)

    def unclaim(self, made: Claim) -> None:
        """A file that was made is gone."""
        with self.database.transaction() as connection:
            operations.unclaim(connection, made)

    def note(self, path: str, value: str) -> None:
        """Keep what the step that is being taken must know of a file to be repeated."""
        with self.database.transaction() as connection:
            operations.put_note(connection, self.operation, self.step, path, value)

    def noted(self, path: str) -> str | None:
        """What the step that is being taken kept of the file before it was killed."""
        return operations.note_of(self.database, self.operation, self.step, path)

    def recall(self, about: str) -> str | None:
        """What any step of the operation kept last about this."""
        return operations.last_note(self.database, self.operation, about)


def token_of(operation: int, started: float) -> str:
    """A word that names the operation's temporary files, the same after a crash."""
    return f"{operation:x}-{int(started * 1e6):x}"
