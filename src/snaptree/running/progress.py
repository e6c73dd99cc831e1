"""What an operation says of itself while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from msgspec import Struct


class Progress(Struct, frozen=True):
    """How far an operation has come: step ``step`` of ``steps``, and of the bytes to move ``done`` of ``total``.

    ``total`` is 0 while no data moves.
    """

    operation: str
    step: int
    steps: int
    summary: str
    done: int = 0
    total: int = 0


Report: TypeAlias = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Report to nobody."""
