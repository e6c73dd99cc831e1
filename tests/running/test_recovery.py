"""Recovery itself: what it rests on is on disk, what it works on is its own, and it can be killed in its turn."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.crash.audit import marked
from tests.crash.cases import CASES
from tests.kit.order import Order
from tests.kit.programs import killed
from tests.kit.space import held
from tests.kit.world import World

from snaptree.errors import BusyError
from snaptree.images import durable, qemu_img
from snaptree.running import recovery
from snaptree.running.carry import headers
from snaptree.running.holding import written_by
from snaptree.running.journal import Journal
from snaptree.store import operations, trees


def begun(tmp_path: Path, case: str, arrange: Callable[[Callable[[], None]], None]) -> tuple[World, Any, Any]:
    """The case's operation, killed; with its request, and the tree of before."""
    world = World(tmp_path)
    CASES[case].build(world)
    request, before = CASES[case].request(world), world.tree
    killed(lambda: world.machine.run(request), arrange)
    return world, request, before


def moving(kill: Callable[[], None]) -> None:
    """Be killed while data moves."""
    setattr(durable, "write_in_place", lambda *_: kill())  # noqa: B010


def internal(kill: Callable[[], None]) -> None:
    """Be killed when QEMU has taken an internal snapshot."""
    create = qemu_img.snapshot_create

    def created(*words: Any) -> None:
        create(*words)
        kill()

    setattr(qemu_img, "snapshot_create", created)  # noqa: B010


def repointing(kill: Callable[[], None]) -> None:
    """Be killed when the data has moved."""
    setattr(headers, "repoint", lambda *_: kill())  # noqa: B010


def recording(kill: Callable[[], None]) -> None:
    """Be killed when the tree is to change for the last time."""
    apply = trees.apply_delta

    def applied(connection: Any, machine: str, delta: Any) -> None:
        if any(layer is None for layer in delta.layers.values()):
            kill()
        apply(connection, machine, delta)

    setattr(trees, "apply_delta", applied)  # noqa: B010


@pytest.mark.parametrize("arrange", [moving, recording], ids=["undone", "finished"])
def test_what_somebody_has_opened_since_is_left_alone(
    arrange: Callable[[Callable[[], None]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written to it, and nothing taken away, neither back nor forward."""
    monkeypatch.setattr(recovery, "DYING_SECONDS", 0.1)
    world, request, before = begun(tmp_path, "delete s1 of a line by pull", arrange)
    # What is being moved into, or what has been moved out of and goes.
    layer = before.layers[before.snapshots["s2" if arrange is moving else "s1"].points["vdb"].layer]
    used = Path(layer.path)
    content = used.read_bytes()
    with held(used, layer.format, read_only=True), pytest.raises(BusyError, match=used.name):
        world.machine.recover()
    assert used.read_bytes() == content
    assert world.machine.unfinished()
    world.machine.recover()
    world.settle(request, before)
    world.check(leaks=True)


@pytest.mark.parametrize("case", ["delete s1 of a line by pull", "delete s1 of a line by commit", "internal snapshot"])
def test_what_is_undone_is_synced_known_and_locked_for_qemu_too(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has written stays: be it by the process that was killed, or by a program that puts the counts right."""
    world, request, before = begun(tmp_path, case, internal if case == "internal snapshot" else moving)
    log = tmp_path / "log"
    (operation,) = operations.unfinished(world.connection.database)
    step = operations.steps_of(world.connection.database, operation.id)[operation.step]
    with monkeypatch.context() as patched:
        order = Order(patched)
        order.watch(Journal, "end", "end")
        with marked(log):
            world.machine.recover()
    assert set(written_by(step)) <= set(order.events[: order.events.index("end")])
    assert "fault" not in log.read_text()
    world.settle(request, before)
    world.check(leaks=True)
    assert {each.word for each in world.machine.view().ailments.values()} <= {"half-merged"}


def test_the_last_word_is_synced_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been written, and not synced; what is done now must not come to disk before it."""
    world, request, before = begun(tmp_path, "delete s1 of a line by pull", recording)
    synced: list[str] = []
    fsync = os.fsync

    def syncing(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", syncing)
        world.machine.recover()
    assert synced[0] == "state.sqlite-wal"
    world.settle(request, before)
    world.check()


def test_recovery_is_killed_when_the_sources_have_gone(tmp_path: Path) -> None:
    """What it does it says beforehand, so that it goes on from there: what has moved cannot be moved again."""

    def unlinked(kill: Callable[[], None]) -> None:
        end = Journal.end

        def ended(self: Journal, *words: str) -> None:
            kill()
            end(self, *words)

        setattr(Journal, "end", ended)  # noqa: B010

    world, request, before = begun(tmp_path, "delete s1 of a line by pull", repointing)
    killed(world.machine.recover, unlinked)
    world.machine.recover()
    world.settle(request, before)
    world.check()
