"""What an operation on a domain works on is locked before it is touched, and what was killed is settled first."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from tests.kit.domain import DomainScene, line, of_libvirt
from tests.kit.locked import require_locked, watched
from tests.kit.space import held
from tests.kit.still import writing
from tests.kit.told import run_killed
from tests.libvirt.test_memory import remembered

from snaptree.errors import BusyError, CancelledError
from snaptree.images.locks import MachineLock
from snaptree.machines.connection import Connection
from snaptree.machines.libvirt import LibvirtMachine
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.plan import Plan
from snaptree.running import recovery
from snaptree.store.libvirt.calls import DomainHandle

pytestmark = pytest.mark.root
BUSY = 5


def test_the_files_of_the_plan(web: DomainScene, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, 4):
        web(f"snapshot @ s{number}")
        web.write("." * number + "1")
    found = watched(monkeypatch)
    web("delete @ s2")
    assert found and str(web.disks / "web.s1.qcow2") in found[0]


def test_the_files_of_what_is_merged_after_memory_is_loaded(web: DomainScene, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered(web)
    found = watched(monkeypatch)
    web("revert @ m1 --discard --delete")
    assert len(found) == 2 and found[1]
    web.virsh("destroy", "@")


def test_what_another_snaptree_works_on_turns_no_domain_off(web: DomainScene) -> None:
    line(web, "s1", "s2")
    web.be("running")
    before, lock = web.virsh("domid", "@"), MachineLock()
    lock.acquire([str(web.path("s2"))])
    try:
        assert "another snaptree" in web("revert @ s2 --discard --delete", status=BUSY).err
    finally:
        lock.release()
    assert web.virsh("domid", "@") == before
    web.be("off")
    web.sound()


def test_what_is_parked_only_because_of_its_last_write_is_locked_then(
    web: DomainScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tip is empty when it is planned, and stands right already; then the guest writes to it."""
    line(web, "s1")
    web("snapshot @ s2")
    web.be("running")
    stop = DomainHandle.stop

    def stopped(handle: DomainHandle) -> None:
        for each in writing("y", "virtio-disk0"):
            assert web.virsh("qemu-monitor-command", "@", "--hmp", each).strip() == ""
        stop(handle)

    monkeypatch.setattr(DomainHandle, "stop", stopped)
    before, lock = web.virsh("domid", "@"), MachineLock()
    lock.acquire([str(web.path("s2"))])
    try:
        assert "another snaptree" in web("revert @ s2", status=BUSY).err
    finally:
        lock.release()
    assert web.virsh("domid", "@") != before and web.show()["state"] == "running"
    assert web.shows() == "y1......" and set(web.names()) == {"s1", "s2", "main"}
    web("revert @ s2 --stopped")
    assert web.shows("main.1") == "y1......" and web.shows() == "b1......"
    web.sound()


def test_what_somebody_has_open_turns_no_domain_off(web: DomainScene) -> None:
    line(web, "s1", "s2")
    web("revert @ s1")
    web("delete @ --branch main.1")
    web.be("running")
    before = web.virsh("domid", "@")
    with held(web.path("s2")):
        assert "is open by qemu-io" in web("revert @ s1 --discard --children", status=BUSY).err
    assert web.virsh("domid", "@") == before
    web.be("off")
    web.sound()


@pytest.mark.parametrize("state", ["running", "paused"])
def test_what_is_refused_after_it_was_turned_off_has_it_started_again(
    web: DomainScene, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line(web, "s1", "s2")
    web.be("running")
    if state == "paused":
        web.virsh("suspend", "@")
    shown, before = web.show(), web.virsh("domid", "@")
    stop = DomainHandle.stop

    def stopped(handle: DomainHandle) -> None:
        stop(handle)
        monkeypatch.setattr("snaptree.machines.libvirt.require_same", refuses)

    def refuses(*_: Any) -> None:
        raise BusyError("somebody has been at it meanwhile")

    monkeypatch.setattr(DomainHandle, "stop", stopped)
    assert "meanwhile" in web("revert @ s1 --discard", status=BUSY).err
    assert web.show() == shown and web.show()["state"] == state and web.virsh("domid", "@") != before
    web.be("off")
    web.sound()


@pytest.fixture
def killed(web: DomainScene) -> DomainScene:
    """A snapshot was taken, and snaptree was killed when libvirt was told its new disks."""
    web("snapshot @ s1")
    web.write(".1")
    done, _ = run_killed(web, "snapshot @ s2", 1, before=False, calls=("define",))
    assert done.returncode == -signal.SIGKILL, done.stderr
    return web


def test_the_tips_of_what_was_recovered(killed: DomainScene) -> None:
    """What was killed is settled first; its tips are others than those that were locked at first."""
    web = killed

    def look(_: Plan) -> bool:
        assert {"s1", "s2"} <= set(machine.tree().snapshots) and machine.unfinished() == ()
        require_locked(str(each["path"]) for each in web.show()["disks"])
        return False

    with of_libvirt(web.own.uri):
        machine = Connection(str(web.state)).machine(web.name)
        with pytest.raises(CancelledError):
            machine.run(SnapshotRequest("s3"), confirm=look)
    web.sound()


def test_the_tips_that_came_with_what_was_recovered(web: DomainScene) -> None:
    """The tree is told of them only when it is recovered."""
    web("snapshot @ s1")
    web.virsh("start", "@")
    done, _ = run_killed(web, "snapshot @ s2", 1, before=False, calls=("cut",))
    assert done.returncode == -signal.SIGKILL, done.stderr

    def look(_: Plan) -> bool:
        assert "s2" in web.names()
        require_locked({each["path"] for each in web.show()["disks"]})
        return False

    with of_libvirt(web.own.uri), pytest.raises(CancelledError):
        Connection(str(web.state)).machine(web.name).run(SnapshotRequest("s3"), confirm=look)
    web.virsh("destroy", "@")
    web.sound()


def test_the_files_of_what_is_recovered(web: DomainScene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the roots and tips."""
    looked = list[str]()
    line(web)
    done, _ = run_killed(web, "delete @ s2", 1, before=True, calls=("define",))
    assert done.returncode == -signal.SIGKILL, done.stderr

    async def recover(database: Any, name: str, *more: Any) -> tuple[str, ...]:
        looked.extend(recovery.files_of(database, name))
        require_locked(looked)
        raise CancelledError("seen")

    with monkeypatch.context() as patched:
        patched.setattr(recovery, "recover", recover)
        web("recover @", status=130)
    assert looked
    web("recover @")
    web.sound()


def test_the_tips_that_virsh_has_just_brought(web: DomainScene, monkeypatch: pytest.MonkeyPatch) -> None:
    """It took a snapshot after those of before were locked."""
    web("snapshot @ s1")
    real = LibvirtMachine.settle

    async def settling(self: LibvirtMachine, *arguments: Any) -> tuple[str, ...]:
        told = await real(self, *arguments)
        web.virsh("snapshot-create-as", "@", "v1", "--disk-only")
        return told

    def look(_: Plan) -> bool:
        assert "v1" in web.names()
        require_locked({each["path"] for each in web.show()["disks"]})
        return False

    monkeypatch.setattr(LibvirtMachine, "settle", settling)
    with of_libvirt(web.own.uri), pytest.raises(CancelledError):
        Connection(str(web.state)).machine(web.name).run(SnapshotRequest("s3"), confirm=look)
