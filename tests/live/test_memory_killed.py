"""Killed while memory is saved: snaptree, QEMU, or both.

The guest goes on, what it had flushed is there, the memory is there whole or not at all, and no file is over.
"""

from __future__ import annotations

import pytest
from tests.kit.points import tried
from tests.kit.stage import Stage, kill_all, killed_around, killed_at

from snaptree.qemu import memory
from snaptree.qemu.memory import Followed
from snaptree.qemu.session import QmpSession

STALL_SECONDS = 2.0
"""A record may take no longer, whatever is killed: a second, and what an emulated guest on a busy machine adds."""
JOB = "memory saved in the background"
LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]


def require_right(stage: Stage, name: str) -> bool:
    """See that the snapshot is there with its memory, or not at all, and that nothing is left to be done; whether."""
    stage("recover web1")
    stage("gc web1")
    shown = stage.names()
    assert stage.show()["pending"] == []
    stage.sound()
    if name not in shown:
        assert not [each for each in stage.files() if name in each]
        return False
    _, monitor = stage.loaded(name)
    stage.agree(name, monitor)
    kill_all(stage.folder / f"loaded-{name}")
    return True


@pytest.mark.parametrize(
    ("command", "before"),
    [
        ("stop", False),
        ("transaction", False),
        ("cont", True),
        ("cont", False),
        *(pytest.param(each, False, marks=LONG) for each in ("migrate-set-capabilities", "add-fd", "migrate")),
        *(pytest.param(each, True, marks=LONG) for each in ("transaction", "remove-fd")),
    ],
)
def test_killed_while_the_guest_stands_still(stage: Stage, command: str, before: bool) -> None:
    """It goes on within a second, without anybody's doing."""
    guest = stage.start(raw=False)
    guest.writes_on()
    with guest.heard() as waits:
        killed_around(stage, command, before=before, line="snapshot web1 s1 --memory")
        guest.writes_on()
    assert max(waits) < STALL_SECONDS
    there = require_right(stage, "s1")
    tried(JOB, "snaptree is killed")
    assert there == (command == "remove-fd")
    with stage.qmp() as qmp:
        on = [each["capability"] for each in qmp("query-migrate-capabilities") if each["state"]]
        assert on == [] and qmp("query-status")["status"] == "running"
    guest.writes_on()
    stage("snapshot web1 s1-again --memory")
    stage.finish()


@pytest.mark.parametrize("every", [29, pytest.param(1, marks=LONG)])
def test_snaptree_killed_while_memory_is_saved(stage: Stage, every: int) -> None:
    guest = stage.start()
    taken, lost = [], 0
    for when in range(1 + every // 2, 300, every):
        name = f"s{when}"
        with guest.heard() as waits:
            killed = killed_at(stage, when, f"snapshot web1 {name} --memory")
            guest.writes_on(10)
        assert max(waits) < STALL_SECONDS
        there = require_right(stage, name)
        assert there or killed
        taken += [name] if there else []
        lost += not there
        if not killed:
            break
        tried(JOB, "snaptree is killed")
    else:
        raise AssertionError("it was killed to the last")
    assert len(taken) > 1 and lost > 1
    counts = [stage.holds(name) for name in taken]
    assert counts == sorted(counts)
    stage.finish()


@pytest.mark.parametrize("every", [109, pytest.param(1, marks=LONG)])
def test_snaptree_and_qemu_killed_while_memory_is_saved(stage: Stage, every: int) -> None:
    guest = stage.start()
    for when in range(1 + every // 2, 300, every):
        name = f"s{when}"
        killed = killed_at(stage, when, f"snapshot web1 {name} --memory")
        guest.writes_on(10)
        flushed = guest.flushed()
        stage.kill_qemu()
        there = require_right(stage, name)
        assert there or killed
        last = stage.holds("main", killed=True)
        assert min(last) >= flushed
        stage("start web1")
        guest.go(at=min(last))
        if not killed:
            break
        tried(JOB, "both are killed")
    else:
        raise AssertionError("it was killed to the last")
    stage.finish()


def test_qemu_killed_while_memory_is_saved(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """snaptree lives, and says so; the disks are the guest's last."""
    guest = stage.start()
    flushed = guest.writes_on()
    real = memory.until_done

    async def killed(qmp: QmpSession, followed: Followed) -> None:
        stage.kill_qemu()
        await real(qmp, followed)

    monkeypatch.setattr(memory, "until_done", killed)
    stage("snapshot web1 s1 --memory", status=12)
    assert not require_right(stage, "s1")
    assert stage.show()["state"] == "off" and min(stage.holds("main", killed=True)) >= flushed
    tried(JOB, "QEMU is killed")
