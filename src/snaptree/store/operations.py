"""Operations in the state file: the journal's rows."""

from __future__ import annotations

import sqlite3

from msgspec import Struct

from snaptree.planning.plan import Plan
from snaptree.planning.steps import Step
from snaptree.store.codec import dump, load, load_steps
from snaptree.store.database import Database

RUNNING, DONE, UNDONE, PAUSED = "running", "done", "undone", "paused"
NEVER = 1 << 30
"""No operation has so many steps: the point of no return of one that turns back."""


class Operation(Struct, frozen=True):
    """One operation as the journal has it. ``step`` is the one that was being taken."""

    id: int
    machine: str
    operation: str
    summary: str
    no_return: int
    way: str | None
    state: str
    step: int
    started: float
    ended: float | None
    bytes: int
    detail: str


class Claim(Struct, frozen=True):
    """A file that snaptree made: its path and inode at the time."""

    path: str
    generation: int
    inode: int


_COLUMNS = "id, machine, operation, summary, no_return, way, state, step, started, ended, bytes, detail"


def begin(connection: sqlite3.Connection, machine: str, plan: Plan, now: float) -> int:
    """Put a plan into the journal, whose first step is about to be taken; the number of the operation."""
    cursor = connection.execute(
        "INSERT INTO operation (machine, operation, summary, steps, no_return, way, state, step, started)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?)",
        (machine, plan.operation, plan.summary, dump(plan.steps), plan.point_of_no_return, plan.way, RUNNING, now),
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def take_step(connection: sqlite3.Connection, operation: int, step: int) -> None:
    """Say durably that a step is about to be taken."""
    connection.execute("UPDATE operation SET step=? WHERE id=?", (step, operation))


def turn_back(connection: sqlite3.Connection, operation: int) -> None:
    """Say durably that an operation is undone, whichever step is about to be taken."""
    # SQLite writes nothing where nothing changes: the step that is there already would not do.
    connection.execute("UPDATE operation SET no_return=? WHERE id=?", (NEVER, operation))


def end(connection: sqlite3.Connection, operation: int, state: str, now: float, moved: int, detail: str = "") -> None:
    """Close an operation. Its steps and notes are no longer wanted."""
    connection.execute(
        "UPDATE operation SET state=?, ended=?, bytes=?, detail=?, steps='[]' WHERE id=?",
        (state, now, moved, detail, operation),
    )
    connection.execute("DELETE FROM note WHERE operation=?", (operation,))


def claim(connection: sqlite3.Connection, operation: int, made: Claim) -> None:
    """Say durably that snaptree made a file."""
    connection.execute(
        "INSERT OR REPLACE INTO claim VALUES (?, ?, ?, ?)", (operation, dump(made.path), made.generation, made.inode)
    )


def unclaim(connection: sqlite3.Connection, made: Claim) -> None:
    """Forget a file that is gone."""
    connection.execute(
        "DELETE FROM claim WHERE path=? AND generation=? AND inode=?", (dump(made.path), made.generation, made.inode)
    )


def put_note(connection: sqlite3.Connection, operation: int, step: int, path: str, value: str) -> None:
    """Keep what a step must know of a file to be repeated."""
    connection.execute("INSERT OR REPLACE INTO note VALUES (?, ?, ?, ?)", (operation, step, dump(path), value))


def note_of(database: Database, operation: int, step: int, path: str) -> str | None:
    """What a step kept of a file, if anything."""
    rows = database.rows(
        "SELECT value FROM note WHERE operation=? AND step=? AND about=?", (operation, step, dump(path))
    )
    return str(rows[0][0]) if rows else None


def last_note(database: Database, operation: int, about: str) -> str | None:
    """What the latest step that kept something about this has kept."""
    query = "SELECT value FROM note WHERE operation=? AND about=? ORDER BY step DESC LIMIT 1"
    rows = database.rows(query, (operation, dump(about)))
    return str(rows[0][0]) if rows else None


def claims_of(database: Database, operation: int) -> tuple[Claim, ...]:
    """The files that one operation made."""
    return _claims(database.rows("SELECT path, generation, inode FROM claim WHERE operation=?", (operation,)))


def claims_left(database: Database) -> tuple[Claim, ...]:
    """The files that operations made which were undone afterwards: nothing has ever stood on them.

    What an operation has made that came to its end belongs to its machine, or to the user who let it go.
    """
    query = (
        "SELECT claim.path, claim.generation, claim.inode FROM claim JOIN operation ON claim.operation=operation.id "
        "WHERE operation.state IN (?, ?)"
    )
    return _claims(database.rows(query, (UNDONE, PAUSED)))


def _claims(rows: list[tuple[object, ...]]) -> tuple[Claim, ...]:
    return tuple(Claim(load(str(row[0])), int(str(row[1])), int(str(row[2]))) for row in rows)


def unfinished(database: Database, machine: str | None = None) -> tuple[Operation, ...]:
    """Operations that are running or were killed, oldest first."""
    if machine is None:
        rows = database.rows(f"SELECT {_COLUMNS} FROM operation WHERE state=? ORDER BY id", (RUNNING,))
    else:
        query = f"SELECT {_COLUMNS} FROM operation WHERE state=? AND machine=? ORDER BY id"
        rows = database.rows(query, (RUNNING, machine))
    return tuple(Operation(*row) for row in rows)  # type: ignore[arg-type]


def by_number(database: Database, number: int) -> Operation | None:
    """One operation, if there ever was one of that number."""
    rows = database.rows(f"SELECT {_COLUMNS} FROM operation WHERE id=?", (number,))
    return Operation(*rows[0]) if rows else None  # type: ignore[arg-type]


def history(database: Database, machine: str) -> tuple[Operation, ...]:
    """All operations of a machine, oldest first."""
    rows = database.rows(f"SELECT {_COLUMNS} FROM operation WHERE machine=? ORDER BY id", (machine,))
    return tuple(Operation(*row) for row in rows)  # type: ignore[arg-type]


def last(database: Database) -> int:
    """The number of the last operation, of whatever machine; 0 before the first."""
    return int(str(database.rows("SELECT COALESCE(MAX(id), 0) FROM operation")[0][0]))


def first_since(database: Database, machine: str, number: int) -> Operation | None:
    """The first operation of a machine after one of that number, if there was one."""
    query = f"SELECT {_COLUMNS} FROM operation WHERE machine=? AND id>? ORDER BY id LIMIT 1"
    rows = database.rows(query, (machine, number))
    return Operation(*rows[0]) if rows else None  # type: ignore[arg-type]


def moment(database: Database) -> tuple[object, ...]:
    """What is another one whenever an operation has begun, gone on or ended."""
    rows = database.rows("SELECT max(id), sum(step), count(ended) FROM operation")
    return rows[0] if rows else ()


def steps_of(database: Database, operation: int) -> tuple[Step, ...]:
    """The steps of an operation that has not ended."""
    rows = database.rows("SELECT steps FROM operation WHERE id=?", (operation,))
    return load_steps(str(rows[0][0]))
