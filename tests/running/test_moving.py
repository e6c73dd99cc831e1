"""Data that moves: what is not on disk has not been moved."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.crash.cases import CASES
from tests.kit.programs import killed
from tests.kit.world import World, jobs_of

from snaptree.errors import ToolError
from snaptree.model.delta import Delta
from snaptree.planning.verbs import GcRequest
from snaptree.qemu.daemon import StorageDaemon
from snaptree.store import trees


@pytest.mark.usefixtures("by_qemu")
@pytest.mark.parametrize("case", ["squash by commit", "delete s2 of a line by pull"])
def test_what_cannot_be_written_at_the_end_has_not_been_moved(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU closes an image without a word when it could not write its tables; it is asked before."""
    world = World(tmp_path)
    CASES[case].build(world)
    request, before = CASES[case].request(world), world.tree
    targets = {(job.row[0] if job.way == "commit" else job.row[-1])[0] for job in jobs_of(world.machine.plan(request))}
    asked = set[str]()

    async def settle(self: StorageDaemon, blockdev: dict[str, Any]) -> None:
        asked.add(blockdev["file"]["filename"])
        if asked == targets:
            raise ToolError("it could not be written")

    with monkeypatch.context() as patched:
        patched.setattr(StorageDaemon, "settle", settle)
        with pytest.raises(ToolError, match="could not be written"):
            world.machine.run(request)
    world.settle(request, before)
    world.check(leaks=True)
    world.machine.run(GcRequest())
    world.check(leaks=True)


def test_a_tip_whose_data_has_gone_down_and_that_was_written_to_since(tmp_path: Path) -> None:
    """Until the tree says otherwise a machine starts from it: the data moves once more."""
    world = World(tmp_path)
    case = CASES["delete s3 of a line by commit"]
    case.build(world)
    request, before = case.request(world), world.tree

    def merged(kill: Callable[[], None]) -> None:
        apply = trees.apply_delta

        def applied(connection: sqlite3.Connection, machine: str, delta: Delta) -> None:
            if None in delta.layers.values():
                kill()
            apply(connection, machine, delta)

        setattr(trees, "apply_delta", applied)  # noqa: B010

    killed(lambda: world.machine.run(request), merged)
    for disk in ("vda", "vdb"):
        world.write(disk, "write -P 99 128k 64k")
    world.machine.recover()
    world.settle(request, before)
    world.machine.run(GcRequest())
    world.check(leaks=True)
    assert world.machine.unfinished() == ()
