"""What a machine is to do that is off only for an operation: kept until it does it, be snaptree killed meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from msgspec.structs import replace

from snaptree.errors import SnaptreeError
from snaptree.model.live import OFF
from snaptree.model.machine import Due
from snaptree.store import operations, trees
from snaptree.store.database import Database


def note(database: Database, name: str, before: str, after: str) -> None:
    """Keep, before the machine is turned off, what it does now and what it is to do afterwards."""
    _put(database, name, Due(before, after, operations.last(database)))


def arrived(database: Database, name: str) -> None:
    """Keep that what it was turned off for is done."""
    if (due := noted(database, name)) is not None:
        _put(database, name, replace(due, done=True))


def define(database: Database, name: str, definition: str) -> None:
    """Keep the definition that the machine is to have afterwards."""
    if (due := noted(database, name)) is not None:
        _put(database, name, replace(due, definition=definition))


def noted(database: Database, name: str) -> Due | None:
    """What is kept, if anything."""
    config = trees.find_config(database, name)
    return config.due if config is not None else None


def state(database: Database, name: str) -> str:
    """What the machine is to do now: as before, if what it was turned off for was undone or has never begun."""
    due = noted(database, name)
    if due is None:
        return OFF
    begun = operations.first_since(database, name, due.since)
    return due.after if due.done or (begun is not None and begun.state == operations.DONE) else due.before


def forget(database: Database, name: str) -> None:
    """It does it, or is not to any more."""
    if noted(database, name) is not None:
        _put(database, name, None)


def _put(database: Database, name: str, due: Due | None) -> None:
    with database.transaction() as connection:
        trees.register(connection, replace(trees.load_config(database, name), due=due), new=False)


@contextmanager
def tried(database: Database, name: str) -> Iterator[None]:
    """The machine is started in the block: once, for whoever asks is told why it does not start."""
    try:
        yield
    except SnaptreeError:
        forget(database, name)
        raise


def waiting(database: Database, key: str, name: str) -> tuple[str, ...]:
    """A sentence for pending work.

    :param key: under which name the machine is kept.
    """
    due = state(database, key)
    how = f"the machine was turned off, and is to be {due} again ('snaptree recover {name}' starts it)"
    return (how,) if due != OFF else ()
