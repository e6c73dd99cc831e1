"""What a domain's files are needed for cannot be known, or is another thing at its next start: it is let alone."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from tests.kit import images
from tests.kit.domain import DomainScene, define_text
from tests.kit.scene import SLOT, SLOTS

pytestmark = pytest.mark.root
REFUSED, SEE_TO = 6, 13


@pytest.fixture
def pool(domain: DomainScene) -> Iterator[str]:
    """A pool of the folder's, with the volume that ``vda`` is; ``vdb`` is a file."""
    name = f"pool-{domain.name}"
    images.create(domain.disks / "volume.qcow2", SLOTS * SLOT)
    place = f"<target><path>{domain.disks}</path></target>"
    (domain.folder / "pool.xml").write_text(f"<pool type='dir'><name>{name}</name>{place}</pool>")
    domain.virsh("pool-define", domain.folder / "pool.xml")
    domain.virsh("pool-start", name)
    try:
        source = f"<driver name='qemu' type='qcow2'/><source pool='{name}' volume='volume.qcow2'/>"
        disk = f"<disk type='volume' device='disk'>{source}<target dev='vda' bus='virtio'/></disk>"
        domain.define("vdb=data.qcow2", devices=disk)
        yield name
    finally:
        domain.virsh("pool-destroy", name)
        domain.virsh("pool-undefine", name)


def refused(domain: DomainScene, word: str, *lines: str) -> None:
    """Each is refused, with the word, and nothing is touched."""
    before = {path: path.stat().st_mtime_ns for path in domain.disks.iterdir()}
    for line in lines:
        assert word in domain(line, status=REFUSED).err, line
    assert {path: path.stat().st_mtime_ns for path in domain.disks.iterdir()} == before


def test_a_point_is_in_a_pool_that_is_not_active(domain: DomainScene, pool: str) -> None:
    """Its file looked like one that nothing needs, and the next deletion wrote into it."""
    images.io(domain.disks / "volume.qcow2", "qcow2", f"write -P {ord('p')} 0 {SLOT}")
    domain("snapshot @ s1")
    domain.write(".q")
    domain.virsh("pool-destroy", pool)
    refused(
        domain, f"volume volume.qcow2 of pool {pool}, which snapshot 's1' has", "snapshot @ s2", "gc @", "delete @ s1"
    )
    assert f"pool-start {pool}" in domain("snapshot @ s2", status=REFUSED).err
    assert "cannot be found" in domain("verify @", status=SEE_TO).out
    domain.virsh("pool-start", pool)
    domain("snapshot @ s2")
    domain("delete @ s2")
    assert domain.shows("s1") == "p......."
    domain("revert @ s1")
    assert domain.shows() == "p......."


def test_a_disk_is_a_volume_of_a_pool_that_is_not_active(domain: DomainScene, pool: str) -> None:
    domain.virsh("pool-destroy", pool)
    refused(domain, "which domain", "snapshot @ s1")
    domain.virsh("pool-start", pool)
    domain("snapshot @ s1")


@pytest.fixture
def running(domain: DomainScene) -> DomainScene:
    """It runs on ``vda`` and ``sda``, which has a tip in another folder."""
    domain.define("vda=web.qcow2", "sda=data.qcow2")
    domain.write("d", "sda")
    away = domain.disks / "away"
    away.mkdir()
    away.chmod(0o755)
    domain(f"snapshot @ s1 --file sda={away}/tip.qcow2")
    domain.write(".e", "sda")
    domain.be("running")
    return domain


def test_a_disk_was_pulled_out_for_this_run_only(running: DomainScene) -> None:
    """The next start has it again, on the tip that it had."""
    running.virsh("detach-disk", "@", "sda", "--live")
    refused(running, "disk sda was pulled out for this run only", "delete @ s1", "snapshot @ s2", "revert @ s1")
    assert "this run only" in running("verify @", status=SEE_TO).out
    running.be("off")
    running("delete @ s1")
    assert running.shows("main", "sda") == "de......"
    running.sound()


def test_a_disk_was_taken_out_of_the_definition_only(running: DomainScene) -> None:
    running.virsh("detach-disk", "@", "sda", "--config")
    refused(running, "disk sda was plugged in for this run only", "delete @ s1", "snapshot @ s2")
    running.left.add(running.path("main", "sda"))
    running.virsh("detach-disk", "@", "sda", "--live")
    running("snapshot @ s2")
    running.be("off")
    running.sound()


def test_a_disk_was_plugged_in_for_this_run_only(running: DomainScene) -> None:
    more = running.image("more.qcow2", word="m")
    running.left.add(more)
    running.virsh("attach-disk", "@", more, "sdb", "--driver", "qemu", "--subdriver", "qcow2", "--live")
    refused(running, "disk sdb was plugged in for this run only", "snapshot @ s2")
    running.virsh("detach-disk", "@", "sdb", "--live")
    running("snapshot @ s2")
    running.sound()


def test_it_is_to_be_started_with_another_image(running: DomainScene) -> None:
    """The user has said so with ``virsh edit``; each operation would have written it over."""
    other, web = running.image("other.qcow2", word="o"), running.source()[0]
    running.left.add(other)
    text = running.virsh("dumpxml", "@", "--inactive")
    running.define_xml(text.replace(str(web), str(other)))
    refused(running, f"is to be {other} at the next start", "snapshot @ s2", "verify @ --repair", "rename @ s1 s3")
    assert running.source()[0] == other
    running.define_xml(text)
    running("snapshot @ s2")
    running.sound()


def test_another_domain_stands_on_it_at_its_next_start(domain: DomainScene) -> None:
    """It runs, and its disk was pulled out for this run only."""
    domain.define("vda=web.qcow2")
    domain("snapshot @ s1")
    domain.write(".1")
    point = domain.path("s1")
    away = domain.folder / "away"
    away.mkdir()
    away.chmod(0o755)
    tip = images.create(away / "tip.qcow2", SLOTS * SLOT, backing=(point, "qcow2"))
    own = images.create(away / "own.qcow2", SLOTS * SLOT)
    other = f"{domain.name}-other"
    disks = [("vda", own, "qcow2"), ("sda", tip, "qcow2")]
    domain.define_xml(define_text(other, str(uuid.uuid4()), disks))
    try:
        domain.virsh("start", other)
        domain.virsh("detach-disk", other, "sda", "--live")
        before = images.read(point)
        domain("delete @ s1")
        assert images.read(point) == before
        assert domain.shows() == ".1......"
    finally:
        domain.virsh("destroy", other)
        domain.virsh("undefine", other)
