"""A Linux guest in a domain writes all the while: what its snapshots hold is of one instant, and nothing is lost."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.kit import guest, images
from tests.kit.domain import URI, DomainScene
from tests.kit.domain_guest import booting
from tests.kit.guest import DISKS
from tests.kit.records import DISK_BYTES, read_records

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture(scope="session")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest's first file system."""
    guest.kernel()
    return guest.build(tmp_path_factory.mktemp("domain-guest"))


class Written:
    """A domain whose guest writes records to ``vda`` (qcow2) and ``vdb`` (raw)."""

    def __init__(self, domain: DomainScene, initramfs: Path) -> None:
        self.web = domain
        images.create(domain.disks / "vda.qcow2", DISK_BYTES)
        images.create(domain.disks / "vdb.raw", DISK_BYTES, "raw")
        self.guest = booting(domain, initramfs, "vda=vda.qcow2", "vdb=vdb.raw")

    def start(self) -> None:
        """Start it, and let the guest write."""
        self.web.virsh("start", "@")
        self.guest.wait_for("R", lambda lines: "R 2" in lines)
        self.guest.go()

    def holds(self, name: str) -> tuple[int, ...]:
        """How many records the name holds on each disk: on all at one instant."""
        layers = {each["path"]: each for each in self.web.show()["layers"]}
        named = self.web.names()[name]
        found = []
        for disk, point in sorted((named.get("points") or named["tips"]).items()):
            chain, at = [], point["path"]
            while at is not None:
                chain.append((at, layers[at]["format"]))
                at = layers[at]["parent"]
            found.append(read_records(images.read_unlocked(chain), DISKS.index(disk)).prefix)
        assert len(found) == 1 or 0 <= found[0] - found[1] <= 1, f"{name} is of two instants: {found}"
        return tuple(found)

    def command(self, line: str) -> subprocess.Popen[str]:
        """Run ``snaptree LINE`` in a process of its own."""
        words = [sys.executable, "-c", "import sys; from snaptree.cli.main import run; sys.exit(run(sys.argv[1:]))"]
        return subprocess.Popen(
            [*words, *shlex.split(line.replace("@", self.web.name))],
            env={**os.environ, URI: self.web.own.uri, "SNAPTREE_STATE": str(self.web.state)},
            cwd=self.web.disks,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture
def written(domain: DomainScene, initramfs: Path) -> Written:
    """A domain with a guest that has not been started yet."""
    return Written(domain, initramfs)


def test_snapshots_are_taken_and_deleted_under_a_guest_that_writes(written: Written) -> None:
    web = written.web
    written.start()
    kept: dict[str, tuple[int, ...]] = {}
    for number in range(1, 5):
        web(f"snapshot @ s{number}")
        kept[f"s{number}"] = written.holds(f"s{number}")
        written.guest.writes_on()
    assert list(kept.values()) == sorted(kept.values())
    for gone in ("s2", "s1", "s4"):
        web(f"delete @ {gone}")
        del kept[gone]
        written.guest.writes_on()
        assert {name: written.holds(name) for name in kept} == kept
        web.agree()
    web("delete @ s3")
    written.guest.writes_on()
    last = written.guest.hold()
    web.virsh("destroy", "@")
    assert web.files() == {"vda.qcow2", "vdb.raw"}
    assert min(written.holds("main")) >= written.guest.flushed() and max(written.holds("main")) <= last + 1
    web.forgiven.add("leaks")
    web.sound()


@pytest.mark.parametrize("after", [0.2, 1.0, 2.5])
@pytest.mark.parametrize("what", ["middle", "tip"])
def test_snaptree_is_killed_while_libvirt_merges(written: Written, what: str, after: float) -> None:
    web = written.web
    written.start()
    for number in (1, 2, 3):
        web(f"snapshot @ s{number}")
        written.guest.writes_on(200)
    kept = {name: written.holds(name) for name in ("s1", "s2", "s3")}
    gone = "s2" if what == "middle" else "s3"
    process = written.command(f"delete @ {gone} --limit 2MiB/s")
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    written.guest.writes_on()
    web("recover @")
    web("gc @")
    written.guest.writes_on()
    for name in kept:
        if name in web.names():
            assert written.holds(name) == kept[name]
    web.agree()
    web.virsh("destroy", "@")
    assert min(written.holds("main")) >= written.guest.flushed()
    web.forgiven.add("leaks")
    web.sound()
