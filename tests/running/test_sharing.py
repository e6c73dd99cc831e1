"""Merging by shared blocks, killed between: what was built aside is known again, in its place or not."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.crash.cases import CASES
from tests.kit.disks import SMALLEST
from tests.kit.order import Order
from tests.kit.programs import killed
from tests.kit.space import mounted
from tests.kit.world import World

from snaptree.errors import BusyError
from snaptree.images import durable
from snaptree.images.locks import MachineLock, probe
from snaptree.planning.verbs import GcRequest
from snaptree.running.journal import Journal
from snaptree.store import operations

CASE = CASES["delete s1 of a line by reflink"]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """s1 to s3 on a qcow2 and a raw disk, on a file system whose files share blocks."""
    with mounted(tmp_path, "xfs", SMALLEST["xfs"]) as place:
        found = World(place, elsewhere=tmp_path / "state")
        CASE.build(found)
        yield found


def put_in_place(kill: Callable[[], None]) -> None:
    """Be killed when a merged file has taken the other's place, and the folder has not been synced yet."""
    rename = os.rename

    def renamed(source: str, target: str, **folders: int) -> None:
        rename(source, target, **folders)
        # What is named within a folder is a socket.
        if not folders:
            kill()

    setattr(os, "rename", renamed)  # noqa: B010


def built(kill: Callable[[], None]) -> None:
    """Be killed when the first merged file has been told of."""
    claim = Journal.claim

    def claimed(self: Journal, *words: Any) -> None:
        claim(self, *words)
        kill()

    setattr(Journal, "claim", claimed)  # noqa: B010


def test_what_is_in_place_already_stays_and_is_synced(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the journal says more: a power cut must not take the name back that the next step rests on."""
    request, before = CASE.request(world), world.tree
    roots = {os.stat(path).st_ino: path for path, _ in before.roots.values()}
    killed(lambda: world.machine.run(request), put_in_place)
    (placed,) = {
        path: number
        for path, number in ((each, os.stat(each).st_ino) for each in roots.values())
        if number not in roots
    }
    number = os.stat(placed).st_ino
    with monkeypatch.context() as patched:
        order = Order(patched)
        order.watch(Journal, "take", "take")
        world.connection.recover()
    assert os.path.dirname(placed) in order.events[: order.events.index("take")]
    assert os.stat(placed).st_ino == number, "it was not built anew"
    assert world.settle(request, before)
    world.check()


def test_what_was_built_aside_and_is_not_wanted_is_removed_and_forgotten(world: World) -> None:
    request, before = CASE.request(world), world.tree
    killed(lambda: world.machine.run(request), built)
    world.connection.recover()
    assert operations.claims_left(world.connection.database) == ()
    world.settle(request, before)
    world.check()


def test_what_is_to_take_its_place_is_locked_before(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the next moment it has the name that others know: neither QEMU nor another snaptree may come upon it free."""
    replace, looked = durable.replace, list[str]()

    def replaced(temporary: str, path: str) -> None:
        used = probe(temporary)
        assert used is not None and used.writing
        with pytest.raises(BusyError):
            MachineLock().acquire([temporary])
        looked.append(path)
        replace(temporary, path)

    monkeypatch.setattr(durable, "replace", replaced)
    world.machine.run(CASE.request(world))
    assert len(looked) == 2


def test_what_another_program_has_open_is_not_replaced(world: World) -> None:
    """It would go on with the file of before: one that takes no locks of QEMU's, too."""
    paths = [path for path, _ in world.tree.roots.values()]
    before = [os.stat(path).st_ino for path in paths]
    with open(paths[0], "rb") as file, subprocess.Popen(["sleep", "60"], stdin=file) as process:
        try:
            with pytest.raises(BusyError, match="is open by sleep"):
                world.machine.run(CASE.request(world))
        finally:
            process.kill()
    assert [os.stat(path).st_ino for path in paths] == before
    world.truth.pop("s1")
    world.machine.run(GcRequest())
    world.check()
