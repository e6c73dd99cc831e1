"""Another backing name, where the header has to be written anew as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crash.cases import CASES
from tests.kit.order import Order
from tests.kit.programs import killed
from tests.kit.world import World

from snaptree.images import durable
from snaptree.planning.steps import Repoint
from snaptree.running.carry import headers
from snaptree.running.context import Context
from snaptree.running.journal import Journal
from snaptree.store import operations


class PowerCut(BaseException):
    """Nothing is written any more."""


def test_a_torn_header_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write is torn by a power cut, and part of the header is nothing: what it was to be is in the journal."""
    world, case = World(tmp_path), CASES["delete where names are long"]
    case.build(world)
    request, before = case.request(world), world.tree
    write = durable.write_in_place

    def torn(descriptor: int, offset: int, data: bytes, path: str) -> None:
        if offset:
            return write(descriptor, offset, data, path)  # The mover's.
        write(descriptor, offset, bytes(64) + data[64:], path)
        raise PowerCut

    with monkeypatch.context() as patched:
        patched.setattr(durable, "write_in_place", torn)
        with pytest.raises(PowerCut):
            world.machine.run(request)
    recovered(world, monkeypatch)
    assert world.settle(request, before)
    world.check()


@pytest.mark.parametrize("case", ["delete where names are long", "delete s1 of a line by pull"])
def test_a_header_that_was_written_and_not_synced(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process that was killed: the next one finds it done."""
    world = World(tmp_path)
    CASES[case].build(world)
    request, before = CASES[case].request(world), world.tree
    repoint = headers.repoint

    def arrange(kill: Callable[[], None]) -> None:
        def repointing(step: Repoint, context: Context) -> None:
            setattr(durable, "sync", lambda *_: kill())  # noqa: B010
            repoint(step, context)

        setattr(headers, "repoint", repointing)  # noqa: B010

    killed(lambda: world.machine.run(request), arrange)
    recovered(world, monkeypatch)
    assert world.settle(request, before)
    world.check()


def recovered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recover; the header that the killed step was about is on disk before the journal says more."""
    (operation,) = operations.unfinished(world.connection.database)
    step = operations.steps_of(world.connection.database, operation.id)[operation.step]
    assert isinstance(step, Repoint)
    with monkeypatch.context() as patched:
        order = Order(patched)
        order.watch(Journal, "take", "take")
        assert world.machine.recover()
    assert step.path in order.events[: order.events.index("take")]
