"""The journal's words: killed just after any of them, an operation leaves nothing that is not known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.crash.matrix import Matrix
from tests.kit.programs import killed

from snaptree.running.journal import Journal

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
