"""The journal's words: killed just after any of them, an operation leaves nothing that is not known."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.crash.matrix import Matrix
from tests.kit.programs import killed

from snaptree.errors import IoError, SnaptreeError
from snaptree.images import durable
from snaptree.running.journal import Journal
from snaptree.store import operations

WORDS = ("take", "record", "end")


def counted(monkeypatch: pytest.MonkeyPatch, reached: Callable[[int], None]) -> None:
    """Call this with the number of each word that has been said."""
    numbers: Iterator[int] = iter(range(1, 1000))
    for word in WORDS:
        method = getattr(Journal, word)

        def said(self: Journal, *words: Any, method: Any = method, **named: Any) -> None:
            method(self, *words, **named)
            reached(next(numbers))

        monkeypatch.setattr(Journal, word, said)


@pytest.mark.parametrize(
    "case", ["delete s1 of a line by pull", "delete s1 of a line by commit", "delete internal ones of frozen layers"]
)
def test_killed_after_each_word(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step has written to is known again, also where the next step has begun."""
    matrix = Matrix(tmp_path, case, "kill")
    world, said = matrix.world, list[int]()
    matrix.restore()
    with monkeypatch.context() as patched:
        counted(patched, said.append)
        world.machine.run(matrix.case.request(world))
    for number in said[:-1]:
        matrix.restore()
        request, before = matrix.case.request(world), world.tree

        def arrange(kill: Callable[[], None], number: int = number) -> None:
            counted(monkeypatch, lambda at: kill() if at == number else None)

        killed(lambda request=request: world.machine.run(request), arrange)  # type: ignore[misc]
        matrix.judge(number, request, before, interrupted=True)


@pytest.mark.parametrize("later", ["nothing", "undoing", "all"])
@pytest.mark.parametrize("case", ["internal snapshot", "snapshot with firmware", "branch from an internal one"])
def test_a_word_that_counts_although_it_failed(
    case: str, later: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's log has it and could not be synced: what is undone then is not taken for done by recovery.

    :param later: what fails besides, as on a bad disk.
    """
    matrix = Matrix(tmp_path, case, "kill")
    world = matrix.world
    matrix.restore()
    request, before = matrix.case.request(world), world.tree
    number = world.machine.plan(request).point_of_no_return
    take, turn_back = operations.take_step, operations.turn_back

    def take_step(connection: sqlite3.Connection, operation: int, step: int) -> None:
        take(connection, operation, step)
        if step == number:
            connection.execute("COMMIT")
            connection.execute("BEGIN")
            if later != "nothing":
                patched.setattr(durable, "sync_file", bad)
            raise sqlite3.OperationalError("disk I/O error")

    def turned(connection: sqlite3.Connection, operation: int) -> None:
        if later == "all":
            raise sqlite3.OperationalError("disk I/O error")
        turn_back(connection, operation)

    def bad(path: str) -> None:
        raise IoError(f"cannot sync {path}", "look at the kernel's log for the device")

    with monkeypatch.context() as patched:
        patched.setattr(operations, "take_step", take_step)
        patched.setattr(operations, "turn_back", turned)
        with pytest.raises(SnaptreeError):
            world.machine.run(request)
    matrix.judge(0, request, before, interrupted=True)
