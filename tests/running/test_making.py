"""Files that snaptree makes, killed between: it knows them again, and nothing that it has made is left over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crash.cases import CASES
from tests.kit.programs import killed
from tests.kit.world import World

from snaptree.images import durable
from snaptree.store import operations


def named(kill: Callable[[], None]) -> None:
    """Be killed when a new file has got its name."""
    rename = durable.rename_new

    def renamed(source: str, target: str) -> None:
        rename(source, target)
        kill()

    durable.rename_new = renamed


@pytest.mark.parametrize(
    "case",
    [
        "snapshot",
        "branch from an internal one",
        "branch from an internal one, by QEMU",
        "branch from a shorter internal one, by QEMU",
    ],
)
def test_what_has_its_name_already_is_removed_and_forgotten(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its inode has been told before it had the name: no other file there is taken for it."""
    if CASES[case].by_qemu:
        monkeypatch.setenv("SNAPTREE_MOVER", "qemu")
    world = World(tmp_path)
    CASES[case].build(world)
    request, before = CASES[case].request(world), world.tree
    known = set(operations.claims_left(world.connection.database))
    world.connection.database.close()
    killed(lambda: world.machine.run(request), named)
    world.connection.recover()
    assert not world.settle(request, before)
    world.check()
    assert set(operations.claims_left(world.connection.database)) == known
