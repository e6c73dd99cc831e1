"""A Linux guest in a domain goes on from the very instant: what it counts in memory is what is on its disks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit.domain import DomainScene, VirshRefusal, domain_scene, of_libvirt
from tests.kit.domain_guest import Written
from tests.kit.libvirtd import Libvirtd, libvirtd_or_skip

from snaptree.errors import CancelledError
from snaptree.machines.connection import Connection
from snaptree.planning.create import SnapshotRequest
from snaptree.running.control import Control
from snaptree.running.progress import Progress

pytestmark = [pytest.mark.root, pytest.mark.slow]


def told(written: Written) -> list[int]:
    """What the guest has said of what is flushed, in the order in which it did."""
    rows = [line.split() for line in written.guest.lines() if line.startswith("F ")]
    return [int(row[1]) for row in rows if len(row) == 3 and row[1].isdigit()]


def goes_on_from(written: Written, name: str, line: str) -> None:
    """Go elsewhere: the guest goes on where the memory of the name has it, and its disks are of that instant."""
    held, before = written.holds(name), len(told(written))
    written.web(line)
    went_over(written, held, before)
    written.web.agree()


def went_over(written: Written, held: tuple[int, ...], before: int) -> None:
    """Wait until a guest goes on that had just written what is held; it was not there before.

    The line that was being written when it was saved may be joined to the one before.
    """
    just = range(min(held), max(held) + 80)
    assert told(written)[before - 1] not in just
    written.guest.wait_for(
        "the guest that has gone over", lambda _: any(each in just for each in told(written)[before:])
    )


def on(written: Written) -> None:
    """Let it write on for a while; it sees no I/O error."""
    seen = len(told(written))
    written.guest.wait_for("more records", lambda _: len(told(written)) > seen + 5)
    assert written.guest.errors() == []


def test_memory_goes_with_snapshots_and_branches(written: Written) -> None:
    web = written.web
    written.start()
    web("snapshot @ m1 --memory")
    on(written)
    web("snapshot @ s2")
    on(written)
    kept = {name: written.holds(name) for name in ("m1", "s2")}
    assert kept["m1"] < kept["s2"]
    goes_on_from(written, "m1", "revert @ m1")
    on(written)
    parked = written.holds("main.1")
    assert parked > kept["s2"]
    web("snapshot @ m3 --memory")
    goes_on_from(written, "main.1", "switch @ main.1")
    on(written)
    # virsh goes back to it as to one of its own.
    held, before = written.holds("m3"), len(told(written))
    web.virsh("snapshot-revert", "@", "m3")
    went_over(written, held, before)
    web("snapshot @ s4")
    goes_on_from(written, "m1", "revert @ m1 --discard")
    on(written)
    assert {name: written.holds(name) for name in kept} == kept
    web("delete @ m1 s2")
    web.agree()
    on(written)
    last = written.guest.hold()
    web.virsh("destroy", "@")
    assert max(written.holds("main")) <= last + 1
    web.forgiven.add("leaks")
    web.sound()


def test_a_tpm_goes_with_memory(written: Written) -> None:
    """What the TPM holds is of the memory's instant, wherever the guest goes; libvirt ends it with its QEMU."""
    if shutil.which("swtpm") is None:
        pytest.skip("swtpm is not installed")
    web, tpm = written.web, "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices>"
    text = (web.folder / "domain.xml").read_text().replace("</devices>", tpm)
    # The guest finds it by ACPI.
    web.define_xml(text.replace("</os>", "</os><features><acpi/></features>"))
    written.start()
    first = written.guest.register(extend=True)
    web("snapshot @ m1 --memory")
    second = written.guest.register(extend=True)
    assert first != second
    goes_on_from(written, "m1", "revert @ m1")
    assert written.guest.register() == first
    third = written.guest.register(extend=True)
    assert third == second, "the same twice is the same"
    goes_on_from(written, "main.1", "switch @ main.1")
    assert written.guest.register() == second
    web("snapshot @ s2")
    web("delete @ s2")
    assert written.guest.register(extend=True) not in (first, second)
    held, before = written.holds("m1"), len(told(written))
    web.virsh("snapshot-revert", "@", "m1")
    went_over(written, held, before)
    assert written.guest.register() == first
    web("delete @ m1")
    on(written)
    web.agree()
    web.virsh("destroy", "@")
    web.forgiven.add("leaks")
    web.sound()


def test_it_is_stopped_while_the_memory_is_saved(written: Written) -> None:
    """The guest goes on as it was, and nothing is left."""
    web = written.web
    text = (web.folder / "domain.xml").read_text().replace("<memory unit='MiB'>96<", "<memory unit='MiB'>900<")
    web.define_xml(text.replace("no_timer_check", "no_timer_check fill=700"))
    written.start()
    web("snapshot @ s0")
    files, control = web.files(), Control(web.name)

    def stop(progress: Progress) -> None:
        if "save memory" in progress.summary:
            control.cancelled.set()

    with of_libvirt(web.own.uri), pytest.raises(CancelledError, match="stopped"):
        Connection(str(web.state)).machine(web.name).run(
            SnapshotRequest("m1", memory=True), progress=stop, control=control
        )
    assert web.files() == files and set(web.names()) == {"s0", "main"} and set(web.listed()) == {"s0"}
    written.guest.writes_on()
    web.agree()
    web.virsh("destroy", "@")


@pytest.mark.parametrize("line", ["snapshot @ m2 --memory", "revert @ m1", "revert @ m1 --discard"])
@pytest.mark.parametrize("after", [0.45, 0.6, 0.8, 1.1])
def test_killed_at_some_moment(written: Written, line: str, after: float) -> None:
    """Whatever it was at, libvirt brings it to an end, and recovery goes on from there; the guest goes on."""
    web = written.web
    written.start()
    web("snapshot @ m1 --memory")
    on(written)
    kept = written.holds("m1")
    process = written.web.command(line)
    time.sleep(after)
    process.kill()
    process.communicate()
    web("recover @")
    web.agree()
    assert web.show()["state"] == "running" and written.holds("m1") == kept
    if web.show()["active_branch"] == "main" and "discard" not in line:
        on(written)
    for name in set(web.names()) - {web.show()["active_branch"]}:
        written.holds(name)
    web("gc @")
    web("revert @ m1 --discard")
    on(written)
    web.virsh("destroy", "@")
    web.forgiven.add("leaks")
    web.sound()


def daemons(own: Libvirtd) -> list[int]:
    """The process of this libvirtd, and of none other."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            mine = str(own.log.parent) in (folder / "mountinfo").read_text()
            if mine and (folder / "comm").read_text().strip() == "libvirtd":
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def answers(web: DomainScene) -> None:
    """Wait until libvirtd is there."""
    until = time.monotonic() + 30
    while True:
        try:
            web.virsh("list")
            return
        except VirshRefusal:
            assert time.monotonic() < until
            time.sleep(0.1)


@pytest.fixture
def mortal(initramfs: Path) -> Iterator[Written]:
    """A domain of a libvirtd that may be killed."""
    with libvirtd_or_skip() as own, domain_scene(own) as found:
        yield Written(found, initramfs)


@pytest.mark.parametrize("line", ["snapshot @ m2 --memory", "revert @ m1"])
@pytest.mark.parametrize("after", [0.5, 0.65, 0.8, 1.0])
def test_libvirtd_is_killed_at_some_moment(mortal: Written, line: str, after: float) -> None:
    """QEMU lives on without it; what was begun is finished or undone when it is there again."""
    written, web = mortal, mortal.web
    written.start()
    web("snapshot @ m1 --memory")
    on(written)
    kept = written.holds("m1")
    (daemon,) = daemons(web.own)
    inside = ["nsenter", "-t", str(daemon), "-m", "-p"]
    with subprocess.Popen([*inside, "sleep", "600"]) as anchor:
        try:
            process = written.web.command(line)
            time.sleep(after)
            os.kill(daemon, signal.SIGKILL)
            time.sleep(0.5)
            # nsenter forks to be within the namespace of processes.
            children = Path(f"/proc/{anchor.pid}/task/{anchor.pid}/children").read_text().split()
            inside[2] = children[0]
            subprocess.run([*inside, "libvirtd", "--timeout", "0", "--daemon"], check=True)
            process.communicate()
            answers(web)
            web("recover @")
            web.agree()
            assert written.holds("m1") == kept and web.show()["state"] == "running"
            on(written)
            web("revert @ m1 --discard")
            on(written)
            web.virsh("destroy", "@")
            web.forgiven.add("leaks")
            web("gc @")
            web.sound()
        finally:
            anchor.kill()
