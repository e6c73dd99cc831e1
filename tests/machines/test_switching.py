"""Starting, stopping and going elsewhere: what was killed is settled first, and QEMU's disks are free afterwards."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.kit.space import held
from tests.kit.stage import processes_of
from tests.kit.still import Still, writing

from snaptree.errors import BusyError, ToolError
from snaptree.images.locks import MachineLock, probe
from snaptree.machines import switching
from snaptree.model.tree import Tree
from snaptree.qemu import ending
from snaptree.qemu.running import RunningQemu
from snaptree.qemu.session import QmpSession
from snaptree.running.journal import Journal

BUSY, FAILED = 5, 12
PIDFD_GETFD = 438
"""The system call's number, the same on all architectures but Alpha."""


def recording(kill: Callable[[], None]) -> None:
    """Be killed when the tree is to change, by which the operation comes to its end."""

    def record(*_: Any) -> None:
        kill()

    setattr(Journal, "record", record)  # noqa: B010


@pytest.mark.parametrize("command", ["start", "stop"])
def test_what_was_killed_is_settled_first(still: Still, command: str) -> None:
    if command == "start":
        still("stop web1 --force")
    still.killed("snapshot web1 s1", recording)
    assert "interrupted" in still.show()["pending"][0]
    still("start web1" if command == "start" else "stop web1 --force")
    assert still.show()["pending"] == []
    still.sound()


def before_it_begins(kill: Callable[[], None]) -> None:
    """Be killed when the machine is off, and nothing is in the journal yet."""

    def begin(*_: Any) -> None:
        kill()

    setattr(Journal, "begin", begin)  # noqa: B010


def before_it_starts(kill: Callable[[], None]) -> None:
    """Be killed when the operation has come to its end, and the machine is to be started."""

    async def launch(*_: Any, **__: Any) -> None:
        kill()

    setattr(switching, "launch", launch)  # noqa: B010


@pytest.mark.parametrize("when", [before_it_begins, recording, before_it_starts])
@pytest.mark.parametrize("by", ["recover", "recover web1", "delete web1 s2"])
def test_it_was_off_for_what_was_killed(still: Still, when: Callable[[Callable[[], None]], None], by: str) -> None:
    still("snapshot web1 s1")
    still.write("x")
    still("snapshot web1 s2")
    still.write("y")
    still.killed("revert web1 s1 --discard", when)
    assert still.show()["state"] == "off" and "is to be paused again" in still.show()["pending"][-1]
    said = still(by)
    assert by.startswith("delete") or "was started again" in said.out
    assert still.show()["state"] == "paused" and still.show()["pending"] == []
    assert still.shows() == ("y......." if when is before_it_begins else "b.......")
    assert still("recover web1").out == "nothing to recover\n"
    still("stop web1 --force")
    assert still("recover").out == "nothing to recover\n"
    still.forgiven.add("leaks")
    still.sound()


@pytest.mark.parametrize("command", ["start web1", "stop web1", "remove web1"])
def test_it_was_off_for_what_was_killed_and_the_user_says_what_it_does_now(still: Still, command: str) -> None:
    still("snapshot web1 s1")
    still.write("x")
    still.killed("revert web1 s1 --discard --paused", before_it_begins)
    still(command)
    assert bool(processes_of(still.folder)) == (command == "start web1")
    if command == "start web1":
        # What befalls it later, before anybody looks, has nothing to do with that.
        still.kill_qemu()
    assert still("recover").out == "nothing to recover\n"
    assert processes_of(still.folder) == []


def test_it_is_started_once(still: Still) -> None:
    """Whoever turns it off afterwards has it off."""
    still("snapshot web1 s1")
    still.write("x")
    still("revert web1 s1 --discard")
    assert still.show()["state"] == "paused"
    still.kill_qemu()
    assert still("recover").out == "nothing to recover\n"
    still("snapshot web1 s2")
    assert processes_of(still.folder) == [] and still.show()["pending"] == []


def test_a_start_that_fails_is_told_once(still: Still, monkeypatch: pytest.MonkeyPatch) -> None:
    still("snapshot web1 s1")
    still.write("x")
    still.killed("revert web1 s1 --discard", before_it_begins)

    async def failing(*_: Any, **__: Any) -> None:
        raise ToolError("it has no room")

    with monkeypatch.context() as patched:
        patched.setattr(switching, "launch", failing)
        assert "it has no room" in still("recover web1", status=FAILED).err
    assert still("recover web1").out == "nothing to recover\n"
    assert processes_of(still.folder) == [] and still.show()["pending"] == []


def test_it_was_off_after_its_memory_was_saved(still: Still) -> None:
    still("snapshot web1 s1")
    still.write("x")
    still.killed("revert web1 s1 --memory", before_it_starts)
    assert still.show()["state"] == "off"
    assert "was started again" in still("recover").out and still.show()["state"] == "paused"
    assert still.shows() == "b......." and still.names()["main.1"]["memory"]
    still("stop web1 --force")
    still.forgiven.add("leaks")
    still.sound()


@pytest.fixture
def lingering(still: Still, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """QEMU does not quit, and its disk stays open for a second after it was killed: by a child of its, say."""
    execute = QmpSession.execute

    async def executed(self: QmpSession, command: str, **arguments: Any) -> Any:
        if command == "quit":
            raise ToolError("it does not hear")
        return await execute(self, command, **arguments)

    monkeypatch.setattr(QmpSession, "execute", executed)
    monkeypatch.setattr(ending, "QUIT_SECONDS", 0.5)
    timers: list[threading.Timer] = []

    def linger() -> None:
        tip, (process,) = str(still.path("main")), processes_of(still.folder)
        files = f"/proc/{process}/fd"
        (number,) = (each for each in os.listdir(files) if os.path.realpath(f"{files}/{each}") == tip)
        pidfd = os.pidfd_open(process)
        ours = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, pidfd, int(number), 0)
        assert ours >= 0, os.strerror(ctypes.get_errno())
        os.close(pidfd)
        timers.append(threading.Timer(1.5, os.close, [ours]))
        timers[0].start()

    yield linger
    timers[0].join()


def test_it_has_not_stopped_before_its_disks_are_free(still: Still, lingering: Callable[[], None]) -> None:
    lingering()
    tip = str(still.path("main"))
    still("stop web1 --force")
    assert probe(tip) is None


def test_what_is_refused_turns_no_machine_off(still: Still) -> None:
    still("snapshot web1 s1")
    still.write("x")
    still("snapshot web1 s2")
    before, lock = processes_of(still.folder), MachineLock()
    lock.acquire([str(still.path("s2"))])
    try:
        assert "another snaptree" in still("revert web1 s2 --discard --delete", status=BUSY).err
    finally:
        lock.release()
    assert processes_of(still.folder) == before
    still("stop web1 --force")
    still.forgiven.add("leaks")
    still.sound()


def test_what_is_parked_only_because_of_its_last_write_is_locked_then(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tip is empty when it is planned, and stands right already; then the guest writes to it."""
    still("snapshot web1 s1")
    still.write("x")
    still("snapshot web1 s2")
    turn_off = switching.turn_off

    async def turned_off(qemu: RunningQemu, tree: Tree) -> None:
        for each in writing("y"):
            await qemu.qmp.execute("human-monitor-command", command_line=each)
        await turn_off(qemu, tree)

    monkeypatch.setattr(switching, "turn_off", turned_off)
    before, lock = processes_of(still.folder), MachineLock()
    lock.acquire([str(still.path("s2"))])
    try:
        assert "another snaptree" in still("revert web1 s2", status=BUSY).err
    finally:
        lock.release()
    assert processes_of(still.folder) != before and still.show()["state"] == "paused"
    assert still.shows() == "y......." and set(still.names()) == {"s1", "s2", "main"}
    still("revert web1 s2 --stopped")
    assert still.shows("main.1") == "y......." and still.shows() == "x......."
    still.forgiven.add("leaks")
    still.sound()


def test_what_somebody_has_open_turns_no_machine_off(still: Still) -> None:
    for name in ("s1", "s2"):
        still(f"snapshot web1 {name}")
        still.write("x")
    still("revert web1 s1")
    still("delete web1 --branch main.1")
    before = processes_of(still.folder)
    with held(still.path("s2")):
        assert "is open by qemu-io" in still("revert web1 s1 --discard --children", status=BUSY).err
    assert processes_of(still.folder) == before
    still("stop web1 --force")
    still.forgiven.add("leaks")
    still.sound()


def test_what_is_refused_after_it_was_turned_off_has_it_started_again(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    still("snapshot web1 s1")
    still.write("x")
    before, turn_off = processes_of(still.folder), switching.turn_off

    async def turned_off(*words: Any) -> None:
        await turn_off(*words)
        monkeypatch.setattr("snaptree.machines.standalone.require_same", refuses)

    def refuses(*_: Any) -> None:
        raise BusyError("somebody has been at it meanwhile")

    monkeypatch.setattr(switching, "turn_off", turned_off)
    assert "meanwhile" in still("revert web1 s1 --discard --delete", status=BUSY).err
    assert processes_of(still.folder) != before and still.show()["state"] == "paused"
    assert still.shows() == "x......." and set(still.names()) == {"s1", "main"}
    still("stop web1 --force")
    still.forgiven.add("leaks")
    still.sound()


def test_it_goes_elsewhere_when_its_disks_are_free(still: Still, lingering: Callable[[], None]) -> None:
    still("snapshot web1 s1")
    still.write("x")
    lingering()
    still("revert web1 s1 --stopped")
    assert still.shows() == "b......." and still.shows("main.1") == "x......."
    still.forgiven.add("leaks")
    still.sound()


def test_what_another_snaptree_works_on_is_not_merged_after_memory_is_loaded(still: Still) -> None:
    """Going back drops the tip beside it, which makes what both stand on loose."""
    still("snapshot web1 m1 --memory")
    still.write("x")
    still("snapshot web1 s2")
    still("branch web1 other --from s2")
    still("delete web1 s2")
    other, lock = still.path("other"), MachineLock()
    lock.acquire([str(other)])
    try:
        said = still("revert web1 m1 --discard").out
        assert "not merged yet: another snaptree" in said and str(other) in said
    finally:
        lock.release()
    assert still.shows() == "b......." and still.shows("other") == "x......."
    still("gc web1")
    assert still.shows("other") == "x......." and still.show()["pending"] == []
    still("stop web1 --force")
    still.forgiven.add("leaks")
    still.sound()
