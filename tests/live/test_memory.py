"""Memory snapshots of a machine that runs: memory and disks are of one instant, and the guest hardly stands still."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.kit import guest as guest_kit
from tests.kit.space import mounted
from tests.kit.stage import Stage, kill_all

from snaptree.qemu import memory
from snaptree.qemu.memory import Followed
from snaptree.qemu.session import QmpSession


def test_memory_and_disks_are_of_the_same_record(stage: Stage) -> None:
    guest = stage.start()
    flushed = guest.writes_on()
    plan = stage("snapshot web1 s1 --memory --plan --json").json
    assert [each["kind"] for each in plan["steps"]] == ["make-overlay", "make-overlay", "save-memory", "record"]
    assert (
        plan["estimate"]
        and 0 < plan["guest_pause"] < (0.1 if guest_kit.knows(8, 1) else 1)
        and plan["bytes_to_copy"] > 1 << 20
    )
    with guest.heard() as waits:
        said = stage("snapshot web1 s1 --memory --json").json
        guest.writes_on()
    assert 0 < said["guest_pause"] < 1
    assert max(waits) < 1.5

    shown = stage.names()["s1"]
    assert shown["memory"] == str(stage.disks / "web1.s1.memory") and shown["consistency"] == "memory"
    assert stage.holds("s1")[1] >= flushed
    loaded, monitor = stage.loaded("s1")
    stage.agree("s1", monitor)
    assert "memory" in stage("tree web1").out
    stage.sound()
    stage.finish()
    assert loaded.errors() == []


def test_a_paused_machine_stays_paused(stage: Stage) -> None:
    """C7: and what is deleted right afterwards is deleted. An older QEMU saves no more until the guest has run."""
    new, guest = guest_kit.knows(10, 0), stage.start(raw=False)
    with stage.qmp() as qmp:
        qmp("stop")
    stage("snapshot web1 s1 --memory")
    assert stage.show()["state"] == "paused"
    said = stage("snapshot web1 s2 --memory", status=0 if new else 6)
    assert new or "saved already" in said.err
    _, monitor = stage.loaded("s1")
    stage.agree("s1", monitor)
    stage.sound()
    kill_all(stage.folder / "loaded-s1")
    stage(f"delete web1 s1{' s2' if new else ''}")
    assert stage.show()["state"] == "paused" and (len(stage.show()["layers"]) == 2) == new
    with stage.qmp() as qmp:
        qmp("cont")
    guest.writes_on()
    stage("gc web1")
    assert stage.files() == {"vda.qcow2", "vdb.qcow2"}
    stage.finish()


def test_a_place_of_ones_own_and_two_in_a_row(stage: Stage) -> None:
    guest = stage.start()
    assert "None" not in stage("snapshot web1 s1 --memory --memory-file mine.ram").out
    assert stage.names()["s1"]["memory"] == str(stage.disks / "mine.ram")
    assert (stage.disks / "mine.ram").stat().st_mode & 0o777 == 0o600
    stage("snapshot web1 s2 --memory")
    guest.writes_on()
    for name in ("s1", "s2"):
        _, monitor = stage.loaded(name)
        stage.agree(name, monitor)
        kill_all(stage.folder / f"loaded-{name}")
    assert stage.holds("s1") < stage.holds("s2")
    stage.finish()


def settings(stage: Stage) -> tuple[Any, Any]:
    with stage.qmp() as qmp:
        return qmp("query-migrate-capabilities"), qmp("query-migrate-parameters")


def go_back_and_agree(stage: Stage, *names: str) -> None:
    """Go back to each of these: its memory is of the very instant of its disks. The machine is off then, and whole."""
    for name in names:
        stage(f"revert web1 {name} --paused")
        stage.agree(name, stage.monitor)
        stage("stop web1 --force")
    stage.forgiven.add("leaks")
    stage.sound()


@pytest.fixture
def on_disk(place: Path) -> Iterator[Path]:
    """A folder on a file system with a disk, wherever the tests' own folders are."""
    with mounted(place, "ext4", 256 << 20) as folder:
        yield folder
        kill_all(place)


def test_where_the_host_cannot_the_guest_waits(stage: Stage, on_disk: Path) -> None:
    """With memory in a file on a disk QEMU cannot save in the background; its user's settings are put back."""
    place = on_disk / "ram-of-web1"
    backend = f"-machine q35,memory-backend=pc.ram -object memory-backend-file,id=pc.ram,size=96M,mem-path={place}"
    stage.add("--start", stage.boot.command(stage.folder).replace("-machine q35", f"{backend},share=on"), raw=False)
    stage("start web1")
    guest = stage.guest
    guest.go()
    with stage.qmp() as qmp:
        said = [{"capability": each, "state": True} for each in ("auto-converge", "events")]
        qmp("migrate-set-capabilities", capabilities=said)
        qmp("migrate-set-parameters", max_bandwidth=12345678)
    before = settings(stage)
    told = stage("snapshot web1 s1 --memory --json").json["notes"]
    if guest_kit.knows(8, 1):
        assert any("while the guest waited" in each and "ackground-snapshot" in each for each in told)
    assert settings(stage) == before
    (memory,) = stage.show()["memories"]
    assert memory["form"] == ("mapped-ram" if guest_kit.knows(9, 0) else "plain") and memory["names"] == ["s1"]
    guest.writes_on()
    assert guest.errors() == []
    with stage.qmp() as qmp:
        qmp("stop")
    stage("snapshot web1 s2 --memory --memory-file second")
    assert settings(stage) == before and stage.show()["state"] == "paused"
    stage.sound()
    stage("stop web1 --force")
    go_back_and_agree(stage, "s2", "s1")


def test_a_qemu_that_knows_only_the_plain_form(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one before 9.0 where it cannot save in the background: it is given the file as a pipe."""
    guest = stage.start()
    before = settings(stage)
    monkeypatch.setattr("snaptree.qemu.memory.forms_known", lambda found: ("plain",))
    stage("snapshot web1 s1 --memory")
    assert settings(stage) == before and stage.show()["memories"][0]["form"] == "plain"
    guest.writes_on()
    go_back_and_agree(stage, "s1")


@pytest.mark.parametrize("line", ["snapshot web1 s1 --memory --exclude vdb", "snapshot web1 s1 --memory-file x"])
def test_what_makes_no_sense(stage: Stage, line: str) -> None:
    guest = stage.start()
    before = stage.files()
    assert stage(line, status=2 if "file" in line else 6).err
    stage("snapshot web1 s1 --memory --memory-file vda.qcow2", status=4)
    stage("snapshot web1 s1 --memory --memory-file nowhere/x", status=3)
    assert stage.files() == before
    guest.writes_on()
    stage.finish()
    assert "is off" in stage("snapshot web1 s1 --memory", status=6).err


def test_a_device_that_cannot_be_saved(stage: Stage) -> None:
    """It is told before the guest is touched."""
    device = " -device nvme,serial=x,drive=nothing"
    device += " -blockdev driver=null-co,node-name=nothing,size=1048576,read-zeroes=on"
    stage.add("--start", stage.boot.command(stage.folder, saved=False) + device)
    stage("start web1")
    guest = stage.guest
    guest.wait_for("R", lambda lines: "R 2" in lines)
    guest.go()
    before = stage.files(), settings(stage)
    said = stage("snapshot web1 s1 --memory", status=6)
    assert "non-migratable device" in said.err and "nvme" in said.err
    assert (stage.files(), settings(stage)) == before
    assert "s1" not in stage.names()
    guest.writes_on()
    stage("snapshot web1 s1")
    stage.finish()


async def cancelled(qmp: QmpSession, followed: Followed) -> None:
    """Waiting until memory is saved, and being interrupted by the user."""
    os.kill(os.getpid(), signal.SIGINT)
    followed.look(qmp.name, await memory.query(qmp))


def test_cancelled_while_memory_is_saved(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is undone: the guest writes where it wrote before."""
    guest = stage.start(raw=False)
    guest.writes_on()
    before = stage.files(), settings(stage)
    with monkeypatch.context() as patched:
        patched.setattr(memory, "until_done", cancelled)
        stage("snapshot web1 s1 --memory", status=130)
    assert (stage.files(), settings(stage)) == before
    assert "s1" not in stage.names() and stage.show()["pending"] == []
    guest.writes_on()
    stage("snapshot web1 s1 --memory")
    stage.finish()


@pytest.mark.root
def test_no_room_for_the_memory(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little is told beforehand; what fills up meanwhile is undone."""
    guest = stage.start(raw=False)
    place = stage.folder / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16M", "small", place], check=True)
    try:
        before = stage.files(), settings(stage)
        said = stage(f"snapshot web1 s1 --memory --memory-file {place}/s1", status=8)
        assert "takes up to" in said.err and stage.files() == before[0]
        subprocess.run(["mount", "-o", "remount,size=1G", place], check=True)
        real = memory.lend

        async def filled(*arguments: Any) -> memory.Lent:
            with (place / "somebody's").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, (1 << 30) - (8 << 20))
            return await real(*arguments)

        monkeypatch.setattr(memory, "lend", filled)
        said = stage(f"snapshot web1 s1 --memory --memory-file {place}/s1", status=8)
        assert "No space left" in said.err and [each.name for each in place.iterdir()] == ["somebody's"]
        assert (stage.files(), settings(stage)) == before
        assert "s1" not in stage.names() and stage.show()["pending"] == []
        guest.writes_on()
    finally:
        subprocess.run(["umount", place], check=True)
    stage.finish()
