"""What is remembered comes back as it was; steps and trees survive the way through JSON and SQLite."""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snaptree.errors import NotFoundError, StateError
from snaptree.model.branch import Branch
from snaptree.model.delta import diff
from snaptree.model.layer import Identity, Layer, Point
from snaptree.model.machine import MachineConfig
from snaptree.model.memory import Memory
from snaptree.model.snapshot import FirmwareFile, Snapshot
from snaptree.model.tree import Tree
from snaptree.planning.adopt import empty
from snaptree.planning.steps import MakeOverlay, Move, MoveJob, Record, Step
from snaptree.store import codec, trees
from snaptree.store.database import Database

ODD = '/im\udcffages/größe, "a".qcow2'


def forked() -> Tree:
    layers = {
        1: Layer(1, "vda", ODD, "raw", None, False, 1 << 40),
        2: Layer(2, "vda", "/b.qcow2", "qcow2", 1, True, 1 << 40, Identity(1, 2, 3, 4, "abc"), True, True),
        3: Layer(3, "vda", "/c.qcow2", "qcow2", 2, True, 512),
    }
    kept = (FirmwareFile("nvram", ODD),)
    snapshots = {"s1": Snapshot("s1", None, {"vda": Point(2)}, 1.25, "a\nb", "memory", 7, kept)}
    branches = {
        "main": Branch("main", "s1", {"vda": Point(3)}, 2.0),
        "größe": Branch("größe", None, {"vda": Point(2, "tag")}, 3.0, None, (FirmwareFile("tpm", "/t"),)),
    }
    memories = {7: Memory(7, "/memory", "background", 1 << 30)}
    return Tree("web1", "main", layers, snapshots, branches, memories, {"vda": ("/b.qcow2", "qcow2")})


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    tree = forked()
    database = Database(str(tmp_path / "state"))
    with database.transaction() as connection:
        trees.register(connection, MachineConfig("web1", nvram=ODD), new=True)
        trees.apply_delta(connection, "web1", diff(empty("web1"), tree))
    again = Database(str(tmp_path / "state"))
    assert trees.load_tree(again, "web1") == tree
    assert trees.load_config(again, "web1").nvram == ODD
    assert trees.owners_of(again, "/b.qcow2") == ("web1",)
    assert trees.owners_of(again, ODD) == (), "it is foreign"


def test_steps_come_back_as_they_were() -> None:
    steps: tuple[Step, ...] = (
        MakeOverlay(ODD, "/b", "raw", 512, "/like"),
        Move((MoveJob("commit-vda-0", "commit", "vda", (("/a", "raw"), (ODD, "qcow2")), (), 5, 6, (1, 2)),)),
        Record(diff(empty("web1"), forked()), (1, 2), "what"),
    )
    assert codec.load_steps(codec.dump(steps)) == steps


def test_a_failed_transaction_changes_nothing(tmp_path: Path) -> None:
    database = Database(str(tmp_path))
    with pytest.raises(ValueError), database.transaction() as connection:
        trees.register(connection, MachineConfig("web1"), new=True)
        raise ValueError
    assert trees.names(database) == ()
    with pytest.raises(NotFoundError):
        trees.load_tree(database, "web1")


def test_the_state_is_private_and_synced(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        database = Database(str(tmp_path / "state"))
        connection = database.open()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE(Path(database.path).stat().st_mode) == 0o600
    assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_looking_makes_no_state(tmp_path: Path) -> None:
    database = Database(str(tmp_path / "none"))
    assert trees.names(database) == ()
    assert not (tmp_path / "none").exists()


def test_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    database = Database(str(tmp_path))
    database.open()
    database.close()
    with sqlite3.connect(database.path) as connection:
        connection.execute("PRAGMA user_version=99")
    with pytest.raises(StateError, match="newer"):
        Database(str(tmp_path)).open()


def test_new_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name of those that are made, in the folder that has it."""
    synced = synced_inodes(monkeypatch)
    Database(str(tmp_path / "a" / "b" / "state")).open()
    assert {folder.stat().st_ino for folder in (tmp_path, tmp_path / "a", tmp_path / "a" / "b")} <= set(synced)


def test_what_a_killed_process_has_committed_can_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = synced_inodes(monkeypatch)
    database = Database(str(tmp_path))
    database.sync()
    with database.transaction() as connection:
        trees.register(connection, MachineConfig("web1"), new=True)
    synced.clear()
    database.sync()
    assert synced == [Path(database.path + "-wal").stat().st_ino]


def synced_inodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The files that are synced from now on, but for those that SQLite syncs."""
    synced = list[int]()

    def sync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", sync)
    return synced


def test_a_transaction_has_the_state_from_its_beginning(tmp_path: Path) -> None:
    """What it reads before it writes is still so when it writes."""
    database = Database(str(tmp_path))
    database.open()
    other = sqlite3.connect(database.path, timeout=0, isolation_level=None)
    with database.transaction(), pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")


def test_two_make_the_state_file_at_once(tmp_path: Path) -> None:
    first = Database(str(tmp_path))
    first.open()
    first.close()
    with sqlite3.connect(first.path, isolation_level=None, check_same_thread=False) as other:
        other.execute("PRAGMA user_version=0")
        other.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor() as pool:
            opening = pool.submit(first.open)
            with pytest.raises(TimeoutError):
                opening.result(0.3)
            other.execute("PRAGMA user_version=1")
            other.execute("COMMIT")
            assert opening.result(9).execute("SELECT count(*) FROM machine").fetchone() == (0,)


def test_many_come_to_a_new_state_folder_at_once(tmp_path: Path) -> None:
    """SQLite waits for nobody while it begins its log: one in a hundred was told that the file is locked."""

    def come(number: int, start: float) -> int:
        process = os.fork()
        if process == 0:
            status = 1
            try:
                while time.time() < start:
                    pass
                with Database(str(tmp_path / f"state{number}")).transaction():
                    status = 0
            finally:
                os._exit(status)
        return process

    for number in range(40):
        start = time.time() + 0.015
        found = [os.waitpid(process, 0)[1] for process in [come(number, start) for _ in range(8)]]
        assert found == [0] * 8, number
