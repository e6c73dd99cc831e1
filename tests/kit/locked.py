"""What an operation works on is locked while it does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from snaptree.errors import BusyError
from snaptree.images.locks import MachineLock
from snaptree.planning.plan import Plan
from snaptree.running import executor
from snaptree.running.holding import files_of


def require_locked(paths: Iterable[str]) -> None:
    """No other snaptree can have any of these."""
    for path in paths:
        with pytest.raises(BusyError):
            MachineLock().acquire([path])


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The files of each plan that is carried out from now on, which were locked then."""
    found, real = list[tuple[str, ...]](), executor.run

    async def run(database: Any, machine: str, plan: Plan, **more: Any) -> Any:
        require_locked(files_of(plan))
        found.append(tuple(files_of(plan)))
        return await real(database, machine, plan, **more)

    monkeypatch.setattr(executor, "run", run)
    return found
