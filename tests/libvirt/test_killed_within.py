"""snaptree, killed while libvirt is at what it was told: libvirt goes on by itself, and recovery waits for it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit.domain import DomainScene, domain_scene
from tests.kit.libvirtd import LABELLED, Libvirtd, libvirtd_or_skip
from tests.kit.stage import processes_of
from tests.kit.told import run_killed

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.mutants]
MIB = 1 << 20


@pytest.fixture(scope="module")
def slow() -> Iterator[Libvirtd]:
    """A libvirtd that takes its time to save memory."""
    with libvirtd_or_skip(f'{LABELLED}snapshot_image_format = "gzip"\n') as found:
        yield found


@pytest.fixture
def web(slow: Libvirtd) -> Iterator[DomainScene]:
    """A domain that it has."""
    with domain_scene(slow) as found:
        found.image("web.qcow2", word="b")
        found.define("vda=web.qcow2")
        yield found


def fill(web: DomainScene, mebibytes: int) -> None:
    """Let the guest's memory have something in it that is not saved at once."""
    (process,) = processes_of(web.folder)
    for line in Path(f"/proc/{process}/maps").read_text().splitlines():
        begin, end = (int(each, 16) for each in line.split()[0].split("-"))
        if end - begin == mebibytes * MIB:
            break
    else:
        raise AssertionError("it has no memory of that size")
    content = os.urandom(8 * MIB)
    with open(f"/proc/{process}/mem", "r+b", buffering=0) as memory:
        # Below is what it booted with.
        for at in range(8 * MIB, mebibytes * MIB, len(content)):
            memory.seek(begin + at)
            memory.write(content)


def read_by(process: int) -> int:
    """How many bytes a process has read so far."""
    return int(Path(f"/proc/{process}/io").read_text().split()[1])


@pytest.mark.parametrize(
    ("line", "call", "mebibytes", "names"),
    [
        ("snapshot @ m9 --memory", "save", 64, {"s1", "m1", "m9", "main"}),
        ("snapshot @ i9 --internal", "mark", 1024, {"s1", "m1", "i9", "main"}),
        ("revert @ m1", "park", 64, {"s1", "m1", "main"}),
    ],
)
def test_recovery_waits_for_libvirt(web: DomainScene, line: str, call: str, mebibytes: int, names: set[str]) -> None:
    text = (web.folder / "domain.xml").read_text()
    web.define_xml(text.replace("<memory unit='MiB'>64<", f"<memory unit='MiB'>{mebibytes}<"))
    web("snapshot @ s1")
    web.write(".1")
    web.virsh("start", "@")
    web("snapshot @ m1 --memory")
    shown = {name: web.shows(name) for name in web.names()}
    fill(web, mebibytes)
    done, _ = run_killed(web, line, 0, before=True, calls=(), within=call)
    assert done.returncode == -signal.SIGKILL, done.stderr
    # Of an internal one libvirt answers only when it is there.
    assert call == "mark" or "Unbounded" in web.virsh("domjobinfo", "@"), "it is at it no more"
    said = web("recover @").out
    # What was parked only goes on where it was.
    assert ("was undone" if call == "park" else "was finished") in said
    assert set(web.names()) == names and web.show()["state"] == "running"
    assert {name: web.shows(name) for name in shown} == shown
    web.agree()
    web.virsh("destroy", "@")
    web("gc @")
    web.sound()


def test_recovery_waits_longer_than_libvirt_does(web: DomainScene) -> None:
    """Who asks libvirt for something else meanwhile is refused after half a minute."""
    web.virsh("start", "@")
    done, _ = run_killed(web, "snapshot @ i9 --internal", 0, before=True, calls=(), within="mark", stops=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (process,) = processes_of(web.folder)
    later = threading.Timer(35, os.kill, (process, signal.SIGCONT))
    later.start()
    try:
        assert "was finished" in web("recover @").out
    finally:
        later.join()
    assert set(web.names()) == {"i9", "main"} and web.show()["state"] == "running"
    web.agree()
    web.virsh("destroy", "@")
    web.sound()


def test_recovery_waits_for_what_is_loaded(web: DomainScene) -> None:
    """However long that takes; where it comes to nothing the domain is started anew."""
    text = (web.folder / "domain.xml").read_text()
    web.define_xml(text.replace("<memory unit='MiB'>64<", "<memory unit='MiB'>512<"))
    web.virsh("start", "@")
    fill(web, 512)
    web("snapshot @ i1 --internal")
    web.virsh("desc", "@", "--config", "what it is for")
    done, _ = run_killed(web, "revert @ i1", 0, before=True, calls=(), within="load_within")
    assert done.returncode == -signal.SIGKILL, done.stderr
    (loads,) = processes_of(web.folder)
    until = time.monotonic() + 20
    while read_by(loads) < 100 * MIB:
        assert time.monotonic() < until, "QEMU does not begin to load"
        time.sleep(0.01)
    os.kill(loads, signal.SIGSTOP)
    later = threading.Timer(35, os.kill, (loads, signal.SIGKILL))
    later.start()
    try:
        web("recover @")
    finally:
        later.join()
    assert processes_of(web.folder) not in ([], [loads])
    assert web.show()["state"] == "running" and set(web.names()) == {"i1", "main", "main.1"}
    assert "what it is for" in web.virsh("dumpxml", "@", "--inactive")
    web.agree()
    web.virsh("destroy", "@")
    web.sound()
