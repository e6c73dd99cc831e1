"""A domain that runs: its disks are frozen and their layers merged by libvirt, and virsh goes on from there."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.kit import images
from tests.kit.domain import DomainScene, line, refused
from tests.kit.images import MiB
from tests.kit.stage import processes_of

pytestmark = pytest.mark.root
BUSY = 5


def test_snapshots_and_deletions_while_it_runs(web: DomainScene) -> None:
    line(web)
    web.virsh("start", "@")
    web("snapshot @ s4")
    assert web.listed() == {"s1": None, "s2": "s1", "s3": "s2", "s4": "s3"} and web.current() == "s4"
    assert web.names()["s4"]["consistency"] == "crash" and web.show()["state"] == "running"
    web.agree()
    # In the middle, at the root, at the tip; and several at once.
    web("delete @ s2")
    web.agree()
    web("delete @ s4")
    web.agree()
    web("delete @ s1")
    web.agree()
    assert web.listed() == {"s3": None} and web.shows("s3") == "b12....." and web.shows() == "b123...."
    web("delete @ s3")
    web.agree()
    assert web.listed() == {} and web.files() == {"web.qcow2"} and web.shows() == "b123...."
    web.virsh("snapshot-create-as", "@", "by-virsh", "--disk-only")
    web.virsh("destroy", "@")
    web("verify @ --repair")
    web.sound()
    assert web.shows() == "b123...."


@pytest.mark.slow
def test_other_branches_and_forks_while_it_runs(web: DomainScene) -> None:
    line(web)
    web("revert @ s1")
    web.write(".......x")
    web.virsh("start", "@")
    assert "not in active chain" in refused(web, "snapshot-delete", "@", "s2")
    web("delete @ s2")
    web.agree()
    web("branch @ aside --from s3")
    assert "not a leaf" in refused(web, "snapshot-delete", "@", "s1")
    web("delete @ s1")
    web.agree()
    assert (web.shows("s3"), web.shows(), web.shows("aside")) == ("b12.....", "b......x", "b12.....")
    web("delete @ --branch aside")
    web("delete @ s3 --with-branches")
    web.agree()
    assert web.files() == {"web.qcow2"} | {web.source()[0].name} and web.shows("main") == "b......x"
    web.virsh("destroy", "@")
    web.sound()


@pytest.mark.slow
def test_going_elsewhere_turns_it_off_and_on(web: DomainScene) -> None:
    line(web)
    web.virsh("start", "@")
    said = web("revert @ s1")
    assert "turned off" in said.out and web.show()["state"] == "running"
    assert web.shows() == "b......." and web.shows("main.1") == "b123...."
    web("switch @ main.1 --stopped")
    assert web.show()["state"] == "off" and web.virsh_shows() == "b123...."
    web.sound()
    web("switch @ main --paused")
    assert web.show()["state"] == "paused"
    web.virsh("destroy", "@")
    web.sound()


def test_two_disks_of_one_instant(domain: DomainScene) -> None:
    domain.define("vda=web.qcow2", "vdb=data.raw")
    domain("snapshot @ s1")
    domain.virsh("start", "@")
    domain("snapshot @ s2")
    domain("snapshot @ s3 --exclude vdb")
    assert domain.record("s3").find("disks/disk[@name='vdb']").get("snapshot") == "no"
    domain("delete @ s1 s2 s3")
    domain.agree()
    assert domain.files() == {"web.qcow2", "data.raw"}
    domain.virsh("destroy", "@")
    domain.sound()


@pytest.mark.slow
def test_two_disks_are_pulled_into_and_qemu_lives(domain: DomainScene) -> None:
    """QEMU 10.0.2 dies of a stream that begins while another one ends."""
    domain.define("vda=web.qcow2", "vdb=data.qcow2")
    domain("snapshot @ s0")
    for number in range(1, 5):
        domain("snapshot @ s1")
        for disk in ("vda", "vdb"):
            domain.write("." * number + str(number), disk)
        domain.be("running")
        before = processes_of(domain.folder)
        domain("delete @ s1 --merge pull")
        assert processes_of(domain.folder) == before
        domain.agree()
    domain.virsh("destroy", "@")
    assert domain.shows() == domain.shows("main", "vdb") == ".1234..."
    domain.sound()


@pytest.mark.slow
def test_what_is_merged_waits_while_it_is_paused(web: DomainScene) -> None:
    line(web)
    web.virsh("start", "@", "--paused")
    assert "is paused" in web("delete @ s2").out
    assert web.listed() == {"s1": None, "s3": "s1"} and len(web.show()["layers"]) == 4
    web.agree()
    web.virsh("resume", "@")
    web("gc @")
    web.agree()
    assert len(web.show()["layers"]) == 3
    web.virsh("destroy", "@")
    web.sound()
    assert [web.shows(each) for each in ("s1", "s3", "main")] == ["b.......", "b12.....", "b123...."]


@contextmanager
def merging(web: DomainScene, line: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a process of its own, as soon as libvirt is at work for it."""
    process = web.command(line)
    try:
        until = time.monotonic() + 30
        while not web.virsh("blockjob", "@", "vda", "--info").strip():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


def large(web: DomainScene) -> dict[str, str]:
    """``s1``, ``s2``, ``s3`` with 8 MiB of their own after each; what they show."""
    images.create(web.disks / "large.qcow2", 32 * MiB)
    web.define("vda=large.qcow2")
    for number in range(1, 4):
        web(f"snapshot @ s{number}")
        path, form = web.source()
        images.io(path, form, f"write -P {48 + number} {number * 8 * MiB} {8 * MiB if number < 3 else 4 * MiB}")
    return {name: web.shows(name) for name in web.names()}


def as_it_was(web: DomainScene, before: dict[str, str], gone: str) -> None:
    assert {name: web.shows(name) for name in web.names()} == {
        name: word for name, word in before.items() if name != gone
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", ["commit", "pull"])
def test_who_pauses_it_meanwhile_has_it_paused(domain: DomainScene, way: str) -> None:
    """QEMU brings what it has pulled to disk as it is stopped: to stop it once more it would have to run."""
    web = domain
    before = large(web)
    web.virsh("start", "@")
    with merging(web, f"delete @ s3 --merge {way} --limit 4MiB/s") as process:
        web.virsh("suspend", "@")
        web("limit @ none")
        said, _ = process.communicate(timeout=60)
    if way == "pull":
        assert process.returncode == BUSY and "let it run" in said, said
        assert web(f"recover {web.name}", status=BUSY)
        assert "paused" in web.virsh("domstate", "@")
        web.virsh("resume", "@")
        assert "was finished" in web("recover @").out
    else:
        assert process.returncode == 0 and "paused" in web.virsh("domstate", "@"), said
    web.agree()
    web.virsh("destroy", "@")
    as_it_was(web, before, "s3")
    web.sound()


@pytest.mark.slow
@pytest.mark.parametrize("ends", [True, False], ids=["qemu too", "snaptree alone"])
@pytest.mark.parametrize("gone", ["s2", "s3"])
def test_snaptree_is_killed_while_it_merges(domain: DomainScene, gone: str, ends: bool) -> None:
    """What libvirt does goes on; where the domain ends with it the rest is done without it."""
    web = domain
    before = large(web)
    web.virsh("start", "@")
    with merging(web, f"delete @ {gone} --limit 2MiB/s") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert web(f"show {web.name} --json").json["pending"]
        if ends:
            web.virsh("destroy", "@")
    web("recover @")
    if ends:
        web("gc @")
    web.agree()
    assert len(web.show()["layers"]) == 3
    if not ends:
        assert web.virsh("blockjob", "@", "vda", "--info").strip() == ""
        web.virsh("destroy", "@")
    web.sound()
    as_it_was(web, before, gone)


@pytest.mark.slow
def test_it_is_stopped_and_gc_goes_on(domain: DomainScene) -> None:
    web = domain
    before = large(web)
    web.virsh("start", "@")
    with merging(web, "delete @ s2 --limit 2MiB/s") as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert web.virsh("blockjob", "@", "vda", "--info").strip() == "" and "s2" not in web.listed()
    # A job of somebody else's is not to be meddled with.
    web.virsh("blockpull", "@", "vda", "--bandwidth", "1")
    assert "libvirt is at work" in web("gc @", status=5).err
    web.virsh("blockjob", "@", "vda", "--abort")
    web("gc @")
    web.agree()
    web.virsh("destroy", "@")
    web.sound()
    as_it_was(web, before, "s2")
    assert len(web.show()["layers"]) == 3
