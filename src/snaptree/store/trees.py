"""Machines and their trees in the state file."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from snaptree.errors import ExistsError, NotFoundError
from snaptree.model.branch import Branch
from snaptree.model.delta import Delta, diff
from snaptree.model.layer import Identity, Layer, LayerId
from snaptree.model.machine import MachineConfig
from snaptree.model.memory import Memory
from snaptree.model.snapshot import Snapshot
from snaptree.model.tree import Tree
from snaptree.store.codec import dump, load
from snaptree.store.database import Database


def names(database: Database, provider: str | None = None) -> tuple[str, ...]:
    """The machines that are remembered, sorted; those of one provider, if it is named.

    Those that were added are ``standalone``; of a ``libvirt`` domain only what it was like when it was last worked on
    is remembered.
    """
    rows = database.rows("SELECT name, config FROM machine ORDER BY name")
    return tuple(str(name) for name, config in rows if provider is None or load(str(config)).provider == provider)


def due(database: Database) -> tuple[str, ...]:
    """The machines that are off only for an operation, or were when snaptree was killed."""
    rows = database.rows("SELECT name, config FROM machine ORDER BY name")
    return tuple(str(name) for name, config in rows if load(str(config)).due is not None)


def find_config(database: Database, name: str) -> MachineConfig | None:
    """What is remembered of a machine besides its tree; ``None`` when there is none of that name."""
    rows = database.rows("SELECT config FROM machine WHERE name=?", (name,))
    config = load(str(rows[0][0])) if rows else None
    assert config is None or isinstance(config, MachineConfig)
    return config


def keys(database: Database, name: str) -> Mapping[str, str]:
    """The files with the keys of a machine's encrypted layers, by their LUKS ids."""
    config = find_config(database, name)
    return config.keys if config is not None else {}


def known_as(database: Database, uuid: str) -> str | None:
    """Under which name a domain is remembered, whatever it is called now; ``None`` when it is not."""
    rows = database.rows("SELECT name, config FROM machine WHERE instr(config, ?) ORDER BY name", (uuid,))
    return next((str(name) for name, config in rows if load(str(config)).uuid == uuid), None)


def load_config(database: Database, name: str) -> MachineConfig:
    """What is remembered of a machine besides its tree.

    :raise NotFoundError: no such machine was added.
    """
    config = find_config(database, name)
    if config is None:
        known = ", ".join(names(database)) or "none yet"
        raise NotFoundError(f"there is no machine {name!r}", f"machines: {known}; add one with 'snaptree add'")
    return config


def load_tree(database: Database, name: str) -> Tree:
    """The tree of a machine, as one consistent reading.

    :raise NotFoundError: no such machine was added.
    """
    load_config(database, name)
    with database.reading() as connection:
        return _read(connection, name)


def _layer(row: tuple[Any, ...]) -> Layer:
    return Layer(
        id=row[0],
        disk=row[1],
        path=load(row[2]),
        format=row[3],
        parent=row[4],
        owned=bool(row[5]),
        virtual_size=row[6],
        half_merged=bool(row[7]),
        made=bool(row[8]),
        identity=load(row[9]) if row[9] is not None else None,
    )


_LAYER = "SELECT id, disk, path, format, parent, owned, virtual_size, half_merged, made, identity FROM layer"


def layer_by_id(database: Database, name: str, number: LayerId) -> Layer | None:
    """One layer as it is stored."""
    rows = database.rows(f"{_LAYER} WHERE machine=? AND id=?", (name, number))
    return _layer(rows[0]) if rows else None


def frozen_at(database: Database, name: str, paths: tuple[str, ...]) -> tuple[Layer, ...]:
    """The layers at these paths whose identity is kept."""
    found = [
        row
        for path in paths
        for row in database.rows(f"{_LAYER} WHERE machine=? AND path=? AND identity IS NOT NULL", (name, dump(path)))
    ]
    return tuple(_layer(row) for row in found)


def _read(connection: sqlite3.Connection, name: str) -> Tree:
    def rows(query: str) -> list[tuple[Any, ...]]:
        return connection.execute(query, (name,)).fetchall()

    active = rows("SELECT active FROM machine WHERE name=?")[0][0]
    layers = [_layer(row) for row in rows(f"{_LAYER} WHERE machine=?")]
    snapshots: list[Snapshot] = [load(row[0]) for row in rows("SELECT value FROM snapshot WHERE machine=?")]
    branches: list[Branch] = [load(row[0]) for row in rows("SELECT value FROM branch WHERE machine=?")]
    memories: list[Memory] = [load(row[0]) for row in rows("SELECT value FROM memory WHERE machine=?")]
    return Tree(
        machine=name,
        active=active,
        layers={layer.id: layer for layer in layers},
        snapshots={each.name: each for each in snapshots},
        branches={each.name: each for each in branches},
        memories={each.id: each for each in memories},
        roots={row[0]: (load(row[1]), row[2]) for row in rows("SELECT disk, path, format FROM root WHERE machine=?")},
    )


def others_on(database: Database, name: str, paths: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Other machines that have a layer at one of the paths, as ``(machine, path)``."""
    found: list[tuple[str, str]] = []
    for path in paths:
        query = "SELECT DISTINCT machine FROM layer WHERE path=? AND machine<>?"
        found += [(str(row[0]), path) for row in database.rows(query, (dump(path), name))]
    return tuple(found)


def owners_of(database: Database, path: str) -> tuple[str, ...]:
    """The machines that own the layer at the path."""
    rows = database.rows("SELECT DISTINCT machine FROM layer WHERE path=? AND owned=1", (dump(path),))
    return tuple(str(row[0]) for row in rows)


def layers_of_all(database: Database) -> tuple[tuple[str, str, bool], ...]:
    """``(path, machine, owned)`` of every layer of every machine, the owned ones first."""
    rows = database.rows("SELECT DISTINCT path, machine, owned FROM layer ORDER BY owned DESC")
    return tuple((load(str(path)), str(machine), bool(owned)) for path, machine, owned in rows)


# ---- changes: inside a transaction that the caller holds -----------------------------------------------------------


def register(connection: sqlite3.Connection, config: MachineConfig, *, new: bool) -> None:
    """Remember a machine, or change what is remembered.

    :raise ExistsError: it is new and the name is taken.
    """
    known = connection.execute("SELECT 1 FROM machine WHERE name=?", (config.name,)).fetchone()
    if known and new:
        raise ExistsError(f"there is a machine {config.name!r} already", "choose another name, or remove it first")
    if known:
        connection.execute("UPDATE machine SET config=? WHERE name=?", (dump(config), config.name))
    else:
        connection.execute("INSERT INTO machine VALUES (?, ?, 'main')", (config.name, dump(config)))
        connection.execute(
            "INSERT OR REPLACE INTO branch VALUES (?, 'main', ?)",
            (config.name, dump(Branch("main", None, {}, config.created))),
        )


def put_tree(connection: sqlite3.Connection, name: str, tree: Tree) -> None:
    """Remember this tree of a machine instead of the one that is remembered."""
    apply_delta(connection, name, diff(_read(connection, name), tree))


def forget(connection: sqlite3.Connection, name: str) -> None:
    """Forget a machine and its tree."""
    connection.execute("DELETE FROM machine WHERE name=?", (name,))
    for table in ("layer", "snapshot", "branch", "memory", "root"):
        connection.execute(f"DELETE FROM {table} WHERE machine=?", (name,))


def move(connection: sqlite3.Connection, config: MachineConfig, name: str) -> None:
    """Remember a machine, its tree and its operations under another name, and no longer what had that."""
    forget(connection, name)
    for table in ("layer", "snapshot", "branch", "memory", "root", "operation"):
        connection.execute(f"UPDATE {table} SET machine=? WHERE machine=?", (name, config.name))
    moved = (name, dump(replace(config, name=name)), config.name)
    connection.execute("UPDATE machine SET name=?, config=? WHERE name=?", moved)


def apply_delta(connection: sqlite3.Connection, name: str, delta: Delta) -> None:
    """Change a machine's tree; doing it twice is the same as once."""
    if delta.active is not None:
        connection.execute("UPDATE machine SET active=? WHERE name=?", (delta.active, name))
    for number, layer in delta.layers.items():
        if layer is None:
            connection.execute("DELETE FROM layer WHERE machine=? AND id=?", (name, number))
        else:
            _put_layer(connection, name, layer)
    _put_values(connection, name, "snapshot", "name", delta.snapshots)
    _put_values(connection, name, "branch", "name", delta.branches)
    _put_values(connection, name, "memory", "id", delta.memories)
    for disk, root in delta.roots.items():
        connection.execute("DELETE FROM root WHERE machine=? AND disk=?", (name, disk))
        if root is not None:
            connection.execute("INSERT INTO root VALUES (?, ?, ?, ?)", (name, disk, dump(root[0]), root[1]))


def _put_layer(connection: sqlite3.Connection, name: str, layer: Layer) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO layer VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            name,
            layer.id,
            layer.disk,
            dump(layer.path),
            layer.format,
            layer.parent,
            layer.owned,
            layer.virtual_size,
            layer.half_merged,
            layer.made,
            dump(layer.identity) if layer.identity is not None else None,
        ),
    )


def _put_values(
    connection: sqlite3.Connection, name: str, table: str, key: str, changes: Mapping[Any, object | None]
) -> None:
    for each, value in changes.items():
        if value is None:
            connection.execute(f"DELETE FROM {table} WHERE machine=? AND {key}=?", (name, each))
        else:
            connection.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", (name, each, dump(value)))


def put_identity(connection: sqlite3.Connection, name: str, layer: LayerId, identity: Identity) -> None:
    """Keep what a frozen layer's file looks like now."""
    connection.execute("UPDATE layer SET identity=? WHERE machine=? AND id=?", (dump(identity), name, layer))
