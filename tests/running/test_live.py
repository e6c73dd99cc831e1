"""Snapshots of a QEMU that runs, killed between: what it has open it is asked for, and it is not taken for dead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.kit.still import Still, standing

from snaptree.qemu.session import QmpSession
from snaptree.running import recovery

BUSY = 5


def cutting(kill: Callable[[], None], *, before: bool) -> None:
    """Be killed just before or just after QEMU lets the guest go on in the overlays."""
    execute = QmpSession.execute

    async def executed(self: QmpSession, command: str, **arguments: Any) -> Any:
        if command == "transaction" and before:
            kill()
        answer = await execute(self, command, **arguments)
        if command == "transaction":
            kill()
        return answer

    setattr(QmpSession, "execute", executed)  # noqa: B010


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("also", ["", "qemu"])
def test_killed_as_the_guest_goes_on_in_the_overlay(still: Still, *, before: bool, also: str) -> None:
    still.killed("snapshot web1 s1", lambda kill: cutting(kill, before=before))
    still.write(".x")
    if also:
        still.kill_qemu()
    still("recover web1")
    assert still.show()["pending"] == []
    # Where QEMU has died, the overlay is taken for the tip: that is right either way.
    assert ("s1" in still.names()) == (not before or bool(also))
    assert still.shows() == "bx......"
    if not before:
        assert still.shows("s1") == "b......."
    still.sound()


def test_a_branch_grows_from_here() -> None:
    """Both lines go on from what was on all disks at one instant; where both were, nothing has a name."""
    with standing(2, raw=True) as still:
        still("snapshot web1 s1 --exclude vdb")
        still.write(".x")
        plan = still("branch web1 here --plan --json").json
        assert [each["kind"] for each in plan["steps"]] == [*["make-overlay"] * 4, "live-snapshot", "record"]
        assert plan["estimate"] and 0 < plan["guest_pause"] < 0.1
        still("branch web1 here")
        # A disk that the snapshot has not forks where it stands, the other begins at the snapshot.
        still("branch web1 there --from s1")
        for disk in still.targets:
            still.write("..y", disk)
        assert {name: (still.shows(name), still.shows(name, "vdb")) for name in ("main", "here", "there")} == {
            "main": ("bxy.....", "b.y....."),
            "here": ("bx......", "b......."),
            "there": ("b.......", "b......."),
        }
        still.sound()
        still("switch web1 here")
        still.write("...z")
        still("delete web1 --branch main")
        still("delete web1 --branch there")
        still("delete web1 s1")
        still("gc web1")
        assert (still.shows("here"), still.shows("here", "vdb")) == ("bx.z....", "b.......")
        assert len(still.show()["layers"]) == 2
        still.sound()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("also", ["", "qemu"])
def test_killed_as_a_branch_grows_from_here(still: Still, *, before: bool, also: str) -> None:
    still.killed("branch web1 here", lambda kill: cutting(kill, before=before))
    still.write(".x")
    if also:
        still.kill_qemu()
    still("recover web1")
    assert still.show()["pending"] == [] and still.shows() == "bx......"
    there = "here" in still.names()
    # Where QEMU has died nobody can say that it has not gone on in the overlay.
    assert there == (not before or bool(also))
    if not before:
        assert still.shows("here") == "b......."
    still.sound()


def test_the_memory_of_a_machine_that_has_never_run(still: Still) -> None:
    """QEMU would end itself were it to save that in the background."""
    with still.qmp() as qmp:
        assert qmp("query-status")["status"] == "prelaunch"
    still("snapshot web1 s1 --memory")
    # What that leaves it in QEMU cannot be saved from once more.
    before = still.files()
    assert "until the machine has run" in still("snapshot web1 s2 --memory", status=6).err
    assert still.files() == before
    with still.qmp() as qmp:
        qmp("cont")
    still.write(".x")
    still("revert web1 s1 --keep-as idea")
    assert still.show()["state"] == "paused" and still.shows("idea") == "bx......"
    # It has loaded and not run; its images are not in use yet.
    still("snapshot web1 s3")
    still("delete web1 s3")
    with still.qmp() as qmp:
        qmp("cont")
    still.write("z")
    still("switch web1 idea")
    assert still.show()["state"] == "running"
    assert (still.shows("s1"), still.shows("main")) == ("b.......", "z.......")
    still.kill_qemu()
    still.sound()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_qemu_that_does_not_answer_is_not_taken_for_dead(
    still: Still, *, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on writing to what a snapshot would be of."""
    monkeypatch.setattr(recovery, "DYING_SECONDS", 0.2)
    still.killed("snapshot web1 s1", lambda kill: cutting(kill, before=before))
    hidden = Path(f"{still.monitor}.hidden")
    still.monitor.rename(hidden)
    still("recover web1", status=BUSY)
    assert "s1" not in still.names()
    hidden.rename(still.monitor)
    still("recover web1")
    assert ("s1" in still.names()) == (not before)
    still.sound()


@pytest.mark.parametrize("line", ["revert web1 nope", "switch web1 nope"])
def test_where_there_is_nothing_to_go_to(still: Still, line: str) -> None:
    """That is said before that the machine could not be started again."""
    still("snapshot web1 s1")
    still("set web1 --start ''")
    assert "has no start command" in still("revert web1 s1", status=2).err
    assert "'nope'" in still(line, status=3).err
