"""Going back to memory: a second QEMU loads it beside the running one, and takes over at the very instant."""

from __future__ import annotations

import dataclasses
import os
import shlex
import socket
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.by_hand import begin, by_hand
from tests.kit.qmp import Qmp
from tests.kit.stage import Stage, processes_of


@pytest.fixture
def lasting(stage: Stage) -> Stage:
    """The stage, with a console whose log goes on."""
    stage.boot = dataclasses.replace(stage.boot, append=True)
    return stage


def remembered(stage: Stage) -> set[str]:
    return {each for each in stage.files() if each.endswith(".memory")}


def test_going_back_parks_with_memory_and_back_again(lasting: Stage) -> None:
    """The work of now is parked with its memory; both lines go on from their instants."""
    stage = lasting
    guest = stage.start(raw=False)
    guest.writes_on()
    stage("snapshot web1 s1 --memory")
    first = stage.holds("s1")
    guest.writes_on(200)
    plan = stage("revert web1 s1 --plan --json").json
    assert "go-over" in [each["kind"] for each in plan["steps"]]

    said = stage("revert web1 s1 --paused --json").json
    assert 0 < said["guest_pause"] < 5
    assert stage.show()["state"] == "paused" and len(processes_of(stage.folder)) == 1
    stage.agree("s1", stage.monitor)
    assert remembered(stage) == {"web1.s1.memory", "web1.main.1.memory"}
    parked = stage.holds("main.1")
    assert parked > first
    with stage.qmp() as qmp:
        qmp("cont")
    guest.went_over()
    assert guest.flushed() < parked[0] + 100
    guest.writes_on()
    stage.sound()

    stage("switch web1 main.1 --paused")
    stage.agree_with(parked, stage.monitor)
    assert stage.names()["main"]["memory"] and not stage.names()["main.1"]["memory"]
    assert "memory " in stage("branches web1").out and "memory " in stage("show web1").out
    assert remembered(stage) == {"web1.s1.memory", "web1.main.memory"}
    with stage.qmp() as qmp:
        qmp("cont")
    guest.went_over()
    assert guest.flushed() >= parked[1] - 8
    guest.writes_on()
    assert stage.holds("s1") == first
    stage.finish()


def test_going_back_to_the_instant_and_deleting_it(lasting: Stage) -> None:
    """A5: one operation; the memory file goes when it was loaded, and the chain is as short as before."""
    stage = lasting
    guest = stage.start()
    guest.writes_on()
    stage("snapshot web1 s1 --memory")
    first = stage.holds("s1")
    guest.writes_on(200)
    stage("revert web1 s1 --discard --delete --paused")
    assert stage.show()["state"] == "paused" and set(stage.names()) == {"main"}
    assert stage.files() == {"vda.qcow2", "vdb.raw"} and len(stage.show()["layers"]) == 2
    assert stage.holds("main") == first, "the work of before is not merged into it"
    stage.agree_with(first, stage.monitor)
    with stage.qmp() as qmp:
        qmp("cont")
    guest.went_over()
    assert guest.flushed() < first[0] + 100
    guest.writes_on()
    stage.sound()
    assert stage.finish() > first[0]


def test_going_back_with_the_machine_off(lasting: Stage) -> None:
    """As the snapshot was: it runs then; and again, as often as one likes."""
    stage = lasting
    guest = stage.start(raw=False)
    guest.writes_on()
    stage("snapshot web1 s1 --memory")
    guest.writes_on()
    stage("stop web1")
    for word in ("--paused", ""):
        stage(f"revert web1 s1 {word}")
        if word:
            stage.agree("s1", stage.monitor)
            stage("stop web1 --force")
    assert stage.show()["state"] == "running"
    guest.went_over()
    guest.writes_on()
    assert remembered(stage) == {"web1.s1.memory"}
    stage.forgiven.add("leaks")
    stage.finish()


def test_without_its_memory(lasting: Stage) -> None:
    """A3, C6: only the memory goes; the snapshot can be gone back to, with the machine started on its disks."""
    stage = lasting
    guest = stage.start(raw=False)
    guest.writes_on()
    stage("snapshot web1 s1 --memory")
    first = stage.holds("s1")
    guest.writes_on()
    stage("delete web1 s1 --memory-only")
    assert stage.names()["s1"]["memory"] is None and remembered(stage) == set()
    guest.writes_on()
    stage("revert web1 s1 --discard")
    assert stage.show()["state"] == "running" and stage.holds("s1") == first
    guest.go(at=10_000)
    stage("stop web1 --force")
    stage.forgiven.add("leaks")
    stage.sound()


def test_branches_of_an_instant(lasting: Stage) -> None:
    """A6: another line from the same instant, with files of one's own; the memory is shared, and goes with the last."""
    stage = lasting
    guest = stage.start(raw=False)
    guest.writes_on()
    stage("snapshot web1 s1 --memory")
    first = stage.holds("s1")
    guest.writes_on(100)
    stage("branch web1 other --from s1 --file vda=mine.qcow2")
    assert stage.names()["other"]["memory"] == stage.names()["s1"]["memory"]
    stage("delete web1 s1")
    assert remembered(stage) == {"web1.s1.memory"}
    stage("switch web1 other")
    assert stage.path("other", "vda").name == "mine.qcow2"
    guest.went_over()
    there = guest.writes_on()
    assert remembered(stage) == {"web1.main.memory"}
    parked = stage.holds("main")
    assert parked > first
    stage("switch web1 main --memory")
    guest.went_over()
    assert guest.flushed() >= parked[1] - 8 and stage.holds("other")[0] >= there
    guest.writes_on()
    stage("switch web1 other --no-memory --stopped")
    assert remembered(stage) == set() and stage.show()["state"] == "off"
    stage.forgiven.add("leaks")
    stage.sound()


# ---- what cannot be -----------------------------------------------------------------------------------------------


def test_a_memory_file_that_is_not_what_it_was(lasting: Stage) -> None:
    """C5: it is told before the guest is touched."""
    stage = lasting
    guest = stage.start()
    guest.writes_on()
    stage("snapshot web1 s1 --memory")
    memory = Path(stage.names()["s1"]["memory"])
    whole, kept = memory.read_bytes(), memory.stat()
    before = stage.files()
    for content, word in ((None, "is not there"), (whole[:-4096], "is cut"), (bytes(len(whole)), "is not the one")):
        memory.unlink(missing_ok=True)
        if content is not None:
            memory.write_bytes(content)
        assert word in stage("revert web1 s1", status=7).err
        assert word in stage("verify web1", status=10).out
        guest.writes_on(8)
    # The middle is not looked at beforehand; QEMU finds it, and the guest goes on.
    memory.write_bytes(whole[: len(whole) // 2] + bytes(1 << 20) + whole[len(whole) // 2 + (1 << 20) :])
    os.utime(memory, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    stage("revert web1 s1", status=12)
    guest.writes_on(8)
    assert stage.show()["state"] == "running" and len(processes_of(stage.folder)) == 1
    memory.write_bytes(whole)
    assert stage.files() == before and stage.show()["pending"] == []
    guest.writes_on(8)
    stage.sound()
    stage.finish()


CHANGES = {
    "RAM": ("-m 96", "-m 128"),
    "processor model": ("-m 96", "-m 96 -cpu Nehalem"),
    "processor features": ("-m 96", "-m 96 -cpu qemu64,-sse3"),
    "machine type": ("-machine q35", "-machine pc"),
    "devices": ("-m 96", "-m 96 -device virtio-rng-pci"),
    "processors": ("-m 96", "-m 96 -smp 2"),
}


def test_a_branch_that_waits_with_its_memory_was_written_to(lasting: Stage) -> None:
    """Its memory would go on from disks that it does not know."""
    stage = lasting
    stage.start(raw=False).writes_on()
    stage("snapshot web1 s1 --memory")
    stage.guest.writes_on()
    stage("revert web1 s1")
    stage.guest.went_over()
    path = stage.path("main.1")
    images.run("qemu-io", "-f", "qcow2", "-c", "write -P 0x77 0 64k", path)
    said = stage("switch web1 main.1", status=7)
    assert f"{path} was written to" in said.err and stage.show()["active_branch"] == "main"
    stage.guest.writes_on()
    stage("switch web1 main.1 --no-memory")
    assert stage.show()["active_branch"] == "main.1" and stage.names()["main.1"]["memory"] is None
    stage("stop web1 --force") if stage.show()["state"] != "off" else None
    stage.forgiven.add("leaks")
    stage.sound()


def test_another_configuration(lasting: Stage) -> None:
    stage = lasting
    guest = stage.start()
    guest.writes_on()
    stage("snapshot web1 s1 --memory")
    command = stage.boot.command(stage.folder)
    before = stage.files()
    for aspect, (old, new) in CHANGES.items():
        assert old in command
        stage(shlex.join(["set", "web1", "--start", command.replace(old, new, 1)]))
        said = stage("revert web1 s1", status=6)
        assert f"another {aspect}" in said.err or (aspect != "RAM" and "another " in said.err), said.err
        guest.writes_on(8)
    stage(shlex.join(["set", "web1", "--start", "qemu-system-x86_64 -nonsense"]))
    assert "nonsense" in stage("revert web1 s1", status=12).err
    # Its console is still reached by the name that the QEMU beside it had taken.
    guest.hold()
    guest.go()
    assert stage.files() == before and stage.show()["pending"] == []
    assert stage.show()["state"] == "running" and len(processes_of(stage.folder)) == 1
    stage(shlex.join(["set", "web1", "--start", command]))
    stage("revert web1 s1 --discard")
    guest.went_over()
    guest.writes_on()
    stage.finish()


def test_a_machine_that_somebody_else_starts(lasting: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = lasting
    stage.make()
    monkeypatch.chdir(stage.disks)
    stage.guest = by_hand(stage, "drive")
    stage.guest.go()
    stage(f"add web1 --disk vda.qcow2 --disk vdb.raw,format=raw --qmp {stage.folder}/qmp")
    stage("snapshot web1 s1 --memory")
    stage.guest.writes_on()
    said = stage("revert web1 s1", status=6)
    assert "one that you start" in said.err and "--no-memory" in said.err
    stage.guest.writes_on()
    stage("revert web1 s1 --stopped")
    assert stage.show()["state"] == "off" and remembered(stage) == {"web1.s1.memory", "web1.main.1.memory"}
    stage.forgiven.add("leaks")
    stage.sound()
    # Once it is known how to start it, both instants can be gone back to.
    parked = stage.holds("main.1")
    stage(f"set web1 --qmp '' --start {shlex.quote(stage.boot.command(stage.folder))}")
    (stage.folder / "console").unlink(missing_ok=True)
    stage("switch web1 main.1 --paused")
    stage.agree_with(parked, stage.monitor)
    with stage.qmp() as qmp:
        qmp("cont")
    stage.guest.process = None
    stage.guest.went_over()
    stage.guest.writes_on()
    stage("stop web1 --force")


def test_a5_of_a_machine_that_somebody_has_started(lasting: Stage) -> None:
    """It is known how: snaptree's own QEMU takes over, and has its own monitor."""
    stage = lasting
    begin(stage, "drive")
    stage(f"set web1 --start {shlex.quote(stage.boot.command(stage.folder))}")
    assert stage.show()["state"] == "running"
    stage("snapshot web1 s1 --memory")
    first = stage.holds("s1")
    stage.guest.writes_on()
    stage("revert web1 s1 --paused")
    stage.guest.process = None
    assert stage.show()["state"] == "paused" and len(processes_of(stage.folder)) == 1
    assert stage.holds("main.1") > first == stage.holds("main")
    own = next(stage.state.glob("qemu/*.sock"))
    stage.agree_with(first, own)
    with Qmp(own) as qmp:
        qmp("cont")
    stage.guest.went_over()
    stage.guest.writes_on()
    stage("delete web1 s1")
    stage.guest.writes_on()
    stage("stop web1 --force")
    assert stage.show()["state"] == "off" and not own.exists()
    stage.forgiven.add("leaks")
    stage.sound()


def test_two_that_cannot_run_at_once(lasting: Stage) -> None:
    """A port that the running one holds: it is told, and works from the machine turned off."""
    stage = lasting
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    taken = f" -chardev socket,id=taken,host=127.0.0.1,port={port},server=on,wait=off"
    stage.add("--start", stage.boot.command(stage.folder) + taken, raw=False)
    stage("start web1")
    guest = stage.guest
    guest.go()
    stage("snapshot web1 s1 --memory")
    said = stage("revert web1 s1", status=12)
    assert "in use" in said.err and "'snaptree stop' it first" in said.err
    guest.writes_on()
    stage("stop web1")
    stage("revert web1 s1 --discard")
    guest.went_over()
    stage.finish()
