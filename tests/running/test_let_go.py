"""A machine that is paused while its memory is saved: it stays paused, and has its disks in use again.

With the memory QEMU lets go of its images (``postmigrate``). Told then to delete an internal snapshot in one, QEMU
10.0.2 ends itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.kit.stage import processes_of
from tests.kit.still import Still

from snaptree.qemu.session import QmpSession

LONG = pytest.mark.slow
LINES = (
    "delete web1 in",
    *(
        pytest.param(line, marks=LONG)
        for line in (
            *("snapshot web1 s --internal", "snapshot web1 s", "revert web1 in --stopped", "delete web1 s1"),
            *("delete web1 s2 --merge commit", "delete web1 s2 --merge pull", "delete web1 s1 --merge pull"),
        )
    ),
)


def paused(still: Still) -> None:
    """It has run, and its user has paused it."""
    with still.qmp() as qmp:
        qmp("cont")
        qmp("stop")


def saved_by_hand(still: Still) -> None:
    """Its user has saved the machine's memory into a file."""
    paused(still)
    with still.qmp() as qmp:
        qmp("migrate", uri=f"file:{still.folder}/mine")
        until = time.monotonic() + 20
        while qmp("query-status")["status"] != "postmigrate" or qmp("query-migrate")["status"] != "completed":
            assert time.monotonic() < until
            time.sleep(0.02)


def killed_at(command: str, *, since: str = "", before: bool = False) -> Callable[[Callable[[], None]], None]:
    """Be killed just before or after a command, the first since another one."""

    def arrange(kill: Callable[[], None]) -> None:
        execute, seen = QmpSession.execute, [""]

        async def executed(self: QmpSession, name: str, **arguments: Any) -> Any:
            mine = name == command and (since in seen or since == name)
            if mine and before:
                kill()
            answer = await execute(self, name, **arguments)
            seen.append(name)
            if mine:
                kill()
            return answer

        setattr(QmpSession, "execute", executed)  # noqa: B010

    return arrange


@pytest.mark.parametrize("line", LINES)
def test_a_machine_whose_memory_its_user_has_saved(still: Still, line: str) -> None:
    for name in ("s1", "s2"):
        still(f"snapshot web1 {name}")
        still.write("x")
    still("snapshot web1 in --internal")
    saved_by_hand(still)
    (process,) = processes_of(still.folder)
    still.any(line)
    if "revert" not in line:
        assert processes_of(still.folder) == [process], "QEMU has died"
        still.any("recover web1")
        assert processes_of(still.folder) == [process], "QEMU has died"


def test_killed_when_its_memory_was_saved(still: Still) -> None:
    still.killed("snapshot web1 m --memory", killed_at("blockdev-set-active", before=True))
    (process,) = processes_of(still.folder)
    still("recover web1")
    assert processes_of(still.folder) == [process], "QEMU has died"
    still("gc web1")
    still("snapshot web1 again --internal")
    still("delete web1 again")
    still.write(".x")
    still.kill_qemu()
    still.sound()


@pytest.mark.parametrize(
    "line",
    ["delete web1 in", *(pytest.param(f"delete web1 m --merge {way}", marks=LONG) for way in ("commit", "pull"))],
)
def test_killed_when_its_memory_was_parked(still: Still, line: str) -> None:
    """Going back is undone; the old QEMU, which is paused still, uses its images again."""
    paused(still)
    still("snapshot web1 m --memory")
    paused(still)
    still.write(".x")
    still("snapshot web1 in --internal")
    still.killed("revert web1 m --paused", killed_at("remove-fd", since="migrate"))
    still("recover web1")
    (process,) = processes_of(still.folder)
    still(line)
    assert processes_of(still.folder) == [process], "QEMU has died"
    still("recover web1")
    still("gc web1")
    still.kill_qemu()
    still.sound()


@pytest.mark.parametrize(
    "command", ["migrate", *(pytest.param(each, marks=LONG) for each in ("transaction", "query-migrate"))]
)
def test_it_stays_paused_when_snaptree_is_killed(still: Still, command: str) -> None:
    """Neither its guard lets it run, nor recovery."""
    paused(still)
    still.killed("snapshot web1 m --memory", killed_at(command, since="migrate"))
    time.sleep(1.0)
    for line in ("recover web1", "gc web1"):
        with still.qmp() as qmp:
            assert not qmp("query-status")["running"], line
        still(line)
    with still.qmp() as qmp:
        assert not qmp("query-status")["running"]
