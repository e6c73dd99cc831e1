"""Row C8, of a domain that runs: its file system fills up while libvirt merges the layers of both disks.

The scenario of standalone machines writes to the images itself, in a folder that the shared libvirtd does not see.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.disks import seen_by_all
from tests.kit.domain import DomainScene, domain_scene, goes_on
from tests.kit.domain_guest import Written
from tests.kit.images import MiB
from tests.kit.libvirtd import Libvirtd, libvirtd_or_skip
from tests.kit.scene import point_in
from tests.kit.space import filled
from tests.libvirt.test_running import merging

pytestmark = [pytest.mark.root, pytest.mark.slow]
NO_SPACE = 8
DISKS = ("vda", "vdb")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """ext4, mounted before libvirtd is started: it sees no other."""
    with seen_by_all("ext4", 200 * MiB) as found:
        yield found


@pytest.fixture(scope="module")
def small(place: Path) -> Iterator[Libvirtd]:
    """A libvirtd that sees it."""
    with libvirtd_or_skip(keep=place) as found:
        yield found


@pytest.fixture
def web(small: Libvirtd, place: Path, tmp_path: Path) -> Iterator[DomainScene]:
    """Both disks have 20 MiB above ``s1``, and as much of other places below it; what snaptree keeps is elsewhere."""
    with domain_scene(small, place) as found:
        found.state = tmp_path / "state"
        for disk in DISKS:
            images.create(found.disks / f"{disk}.qcow2", 64 * MiB)
            images.io(found.disks / f"{disk}.qcow2", "qcow2", "write -P 1 0 20M")
        found.define(*(f"{disk}={disk}.qcow2" for disk in DISKS))
        found("snapshot @ s1")
        for disk in DISKS:
            images.io(found.path("main", disk), "qcow2", "write -P 2 30M 20M")
        yield found


def shown(web: DomainScene, name: str) -> list[bytes]:
    """What both disks of a name have, while QEMU has them open."""
    shown = web.show()
    return [web.unlocked(point_in(shown, name, disk)["path"], None, shown) for disk in DISKS]


@pytest.mark.parametrize(("where", "way"), [("middle", "commit"), ("tip", "commit"), ("tip", "pull")])
def test_c8_a_full_disk_leaves_all_disks_of_one_time(web: DomainScene, place: Path, where: str, way: str) -> None:
    if where == "middle":
        web("snapshot @ s2")
    web.be("running")
    wanted = {name: shown(web, name) for name in web.names() if name != "s1"}
    with merging(web, f"delete @ s1 --merge {way} --limit 4MiB/s") as process, filled(place, 4 * MiB):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == NO_SPACE and f"gc {web.name}" in said, said
        assert web.virsh("domstate", "@").strip() == "running"
        assert {name: shown(web, name) for name in wanted} == wanted and "s1" not in web.names()
    assert web.show()["pending"]
    web("gc @")
    web.agree()
    assert {name: shown(web, name) for name in wanted} == wanted
    assert [len(web.chain("main", disk)) for disk in DISKS] == [2 if where == "middle" else 1] * 2
    web.be("off")
    web("gc @")
    web.sound()
    if where == "tip":
        web("snapshot @ s2")
    goes_on(web, "s2")


@pytest.fixture
def full(small: Libvirtd, place: Path, initramfs: Path) -> Iterator[Written]:
    """Only its images are on the small file system."""
    with domain_scene(small) as found, domain_scene(small, place) as there:
        found.disks = there.disks
        yield Written(found, initramfs)


@pytest.mark.parametrize("killed", [False, True])
def test_a_guest_that_a_full_disk_stops_in_a_pull_goes_on_when_there_is_room(
    full: Written, place: Path, killed: bool
) -> None:
    """libvirt pulls into the tip only: there the guest needs room of its own, too."""
    web = full.web
    full.start()
    web("snapshot @ s1")
    full.guest.writes_on(1200)
    wanted = full.holds("s1")
    full.guest.hold()
    web("snapshot @ s2")
    with merging(web, "delete @ s2 --merge pull --limit 6KiB/s") as process:
        with filled(place, 0):
            full.guest.tell("go")
            until = time.monotonic() + 30
            while web.virsh("domstate", "@", "--reason").strip() != "paused (I/O error)":
                assert time.monotonic() < until and process.poll() is None, "QEMU has not stopped it"
                time.sleep(0.1)
            if killed:
                process.kill()
                process.wait(10)
        if killed:
            web("recover @")
        else:
            web("limit @ none")
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said
    full.guest.writes_on()
    web("gc @")
    assert full.holds("s1") == wanted and set(web.names()) == {"s1", "main"}
    web.agree()
    web.virsh("destroy", "@")
    assert min(full.holds("main")) >= full.guest.flushed()
    web.forgiven.add("leaks")
    web.sound()
