"""What is kept of a domain goes with its UUID: a domain may be called otherwise by now, and another one have its name.

It is under the name that the domain had when it was last worked on, and comes to the one that it has, under its lock,
when it is worked on again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snaptree.machines.machine import anchors
from snaptree.store import operations, trees
from snaptree.store.database import Database

if TYPE_CHECKING:
    from snaptree.images.locks import MachineLock
    from snaptree.machines.libvirt import LibvirtMachine
    from snaptree.running.control import Control


def key_of(database: Database, name: str, uuid: str) -> str:
    """Under which name a domain is kept that is known by this one; one that nothing has, where that is another's."""
    known = trees.known_as(database, uuid)
    if known is not None:
        return known
    return name if trees.find_config(database, name) is None else uuid


async def come_to_name(machine: LibvirtMachine, lock: MachineLock, control: Control | None) -> tuple[str, ...]:
    """Have what is kept of the domain, whose operations have all come to their end, under the name that it has now.

    :return: a sentence for each operation of the domain that had the name, if that was killed.
    :raise BusyError: snaptree works on that.
    """
    database, name, key = machine.database, machine.name, machine.key
    if key == name:
        return ()
    said = await _make_room(machine, lock, control)
    mine = trees.find_config(database, key)
    with database.transaction() as connection:
        if mine is not None:
            trees.move(connection, mine, name)
        else:
            trees.forget(connection, name)
    return said


async def _make_room(machine: LibvirtMachine, lock: MachineLock, control: Control | None) -> tuple[str, ...]:
    """Bring to its end what was killed of another domain that had the name, and move what is kept of it; of one that
    is gone that stays."""
    database, name = machine.database, machine.name
    theirs = trees.find_config(database, name)
    if theirs is None or theirs.uuid is None:
        return ()
    lock.extend(anchors(trees.load_tree(database, name)))
    handle = machine.handle.connection.find(theirs.uuid)
    other = type(machine)(database, handle, name) if handle is not None else None
    said: tuple[str, ...] = ()
    if operations.unfinished(database, name):
        said = await (other or machine).recover_as(name, lock, control)
    if handle is not None and trees.find_config(database, name) is not None:
        with database.transaction() as connection:
            free = trees.find_config(database, handle.name) is None
            trees.move(connection, theirs, handle.name if free else theirs.uuid)
    return said
