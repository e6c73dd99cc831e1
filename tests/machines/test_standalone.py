"""Who may work on a machine: one snaptree at a time, from whatever state folder, and none when it may be running."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crash.cases import CASES
from tests.kit.programs import killed as killed_in
from tests.kit.scene import Scene
from tests.kit.still import Still
from tests.kit.world import World

from snaptree.errors import BusyError
from snaptree.images.locks import MachineLock
from snaptree.machines.options import AddOptions, DiskOption
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.plan import Plan
from snaptree.running import loops, recovery
from snaptree.running.carry import making
from snaptree.store import operations, trees

EXISTS, BUSY, REFUSED = 4, 5, 6


def test_an_image_that_is_worked_on_cannot_be_added(scene: Scene) -> None:
    lock = MachineLock()
    lock.acquire([str(scene.image("web1.qcow2"))])
    scene("add web1 --disk vda=web1.qcow2", status=BUSY)
    lock.release()
    scene("add web1 --disk vda=web1.qcow2")


def test_a_disk_of_another_machine_is_not_attached(web1: Scene) -> None:
    web1.image("other.qcow2")
    web1("add web2 --disk vda=other.qcow2")
    for plan in ("", " --plan"):
        said = web1(f"disk attach web1 vdb=other.qcow2{plan}", status=EXISTS)
        assert "belongs to machine 'web2'" in said.err


def test_a_machine_that_is_worked_on_is_left_alone(web1: Scene) -> None:
    web1("snapshot web1 s1")
    for path in (web1.disks / "web1.qcow2", web1.path("main")):
        lock = MachineLock()
        lock.acquire([str(path)])
        for line in ("snapshot web1 s2", "start web1", "stop web1"):
            web1(line, status=BUSY)
        lock.release()


def test_a_machine_that_is_worked_on_is_waited_for(web1: Scene) -> None:
    lock = MachineLock()
    lock.acquire([str(web1.disks / "web1.qcow2")])
    timer = threading.Timer(0.5, lock.release)
    timer.start()
    web1("snapshot web1 s1 --wait 20")
    timer.join()


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A machine whose switch to another branch was killed when the tree was just to change."""
    world, case = World(tmp_path), CASES["switch"]
    case.build(world)
    with monkeypatch.context() as patched:
        patched.setattr(trees, "apply_delta", _killed)
        with pytest.raises(Killed):
            world.machine.run(case.request(world))
    return world


def _killed(*_: object) -> None:
    raise Killed


def test_the_tips_of_what_was_recovered_are_locked(killed: World) -> None:
    """They are others than those that were locked at first."""
    before = {disk: killed.tip(disk) for disk in killed.tree.disks}

    def look(_: Plan) -> bool:
        for disk in killed.tree.disks:
            path, form = killed.tip(disk)
            assert (path, form) != before[disk]
            with pytest.raises(BusyError):
                MachineLock().acquire([str(path)])
        return True

    killed.machine.run(SnapshotRequest("new"), confirm=look)


@pytest.mark.parametrize("command", ["recover", "snapshot"])
def test_what_is_recovered_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Before anything of it is touched, and not only the machine's roots and tips."""
    world, case = World(tmp_path), CASES["squash by commit"]
    case.build(world)
    with monkeypatch.context() as patched:
        patched.setattr(operations, "take_step", _killed)
        patched.setattr(operations, "end", _killed)
        with pytest.raises(Killed):
            world.machine.run(case.request(world))
    paths = recovery.files_of(world.connection.database, world.name)
    looked = list[str]()

    async def recover(*_: object) -> tuple[str, ...]:
        for path in paths:
            with pytest.raises(BusyError):
                MachineLock().acquire([path])
            looked.append(path)
        assert loops.runs(), "what was killed may have to wait for a QEMU"
        raise Killed

    monkeypatch.setattr(recovery, "recover", recover)
    with pytest.raises(Killed):
        if command == "recover":
            world.machine.recover()
        else:
            world.machine.run(SnapshotRequest("new"))
    assert looked


@pytest.mark.parametrize("command", ["recover", "add"])
def test_what_a_removal_has_left_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """The machine is known no more: nothing else keeps two from removing its files at once, or from using them anew."""
    world, case = World(tmp_path), CASES["remove"]
    case.build(world)
    tip, form = world.tip("vda")

    def unlinking(kill: Callable[[], None]) -> None:
        monkeypatch.setattr(making, "unlink", lambda *_: kill())

    killed_in(lambda: world.machine.run(case.request(world)), unlinking)
    assert world.connection.names() == ()
    paths = recovery.files_of(world.connection.database, world.name)

    async def recover(*_: object) -> tuple[str, ...]:
        for path in paths:
            with pytest.raises(BusyError):
                MachineLock().acquire([path])
        raise Killed

    monkeypatch.setattr(recovery, "recover", recover)
    with pytest.raises(Killed):
        if command == "recover":
            world.connection.recover()
        else:
            world.connection.add(AddOptions("web1", (DiskOption("vda", str(tip), form),)))
    assert len(paths) > 2


@pytest.mark.parametrize("line", ["revert web1 s1", "switch web1 other", "snapshot web1 s2", "delete web1 s1"])
@pytest.mark.parametrize("plan", ["", " --plan"])
def test_nothing_is_even_planned_for_a_machine_that_may_be_running(still: Still, line: str, plan: str) -> None:
    """Its QEMU is there and does not answer."""
    still("stop web1 --force")
    for each in ("snapshot web1 s1", "branch web1 other --from s1", "start web1"):
        still(each)
    hidden = Path(f"{still.monitor}.hidden")
    still.monitor.rename(hidden)
    said = still(line + plan, status=REFUSED)
    assert "may be running" in said.err
    hidden.rename(still.monitor)
