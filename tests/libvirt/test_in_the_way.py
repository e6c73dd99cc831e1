"""What is in the way of working on a domain: jobs of libvirt's, a migration, and disks that are all left alone.

No libvirt, no permission, no such domain, another driver and a managed save are in ``test_reading.py``, transient
domains in ``test_transient.py``.
"""

from __future__ import annotations

import os
import subprocess
import time

import pytest
from tests.kit import guest
from tests.kit.domain import DomainScene, of_libvirt
from tests.kit.libvirtd import LABELLED, libvirtd
from tests.kit.scene import command
from tests.libvirt.test_killed import killed

pytestmark = pytest.mark.root
REFUSED, BUSY = 6, 5
SOON = 30.0
NETWORK = """<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd' name='x'>
<host name='127.0.0.1' port='10809'/></source><target dev='vde' bus='virtio'/></disk>"""


def is_busy(web: DomainScene, why: str) -> None:
    """Whatever would change something is refused with what is in the way; looking works, and nothing is changed."""
    before = web.files(), web.listed()
    for line in ("snapshot @ s2", "delete @ s1", "revert @ s1", "gc @", "rename @ s1 first", "verify @ --repair"):
        said = web(line, status=BUSY)
        assert f"libvirt is at work on domain {web.name}: {why} is under way" in said.err, line
        assert "virsh domjobinfo" in said.err, line
    assert web("tree @").status == 0 and web.show()["state"] in ("running", "paused")
    assert (web.files(), web.listed()) == before


def begin_backup(web: DomainScene) -> None:
    """Somebody reads the disk from libvirt, until he ends it."""
    place = web.folder / "backup"
    place.mkdir()
    place.chmod(0o777)
    text = (
        f"<domainbackup mode='pull'><server transport='unix' socket='{place}/socket'/><disks>"
        f"<disk name='vda' type='file' backup='yes'><scratch file='{place}/scratch.qcow2'/></disk>"
        "</disks></domainbackup>"
    )
    (web.folder / "backup.xml").write_text(text)
    web.virsh("backup-begin", "@", web.folder / "backup.xml")


def test_a_backup(web: DomainScene) -> None:
    web("snapshot @ s1")
    web.be("running")
    begin_backup(web)
    is_busy(web, "a backup")
    web.virsh("domjobabort", "@")
    web("delete @ s1")
    web.sound()
    assert web.shows() == "b......."


def test_a_block_job(web: DomainScene) -> None:
    web("snapshot @ s1")
    web.be("running")
    web.virsh("blockcopy", "@", "vda", "--dest", web.folder / "copy.qcow2", "--transient-job")
    is_busy(web, "a block copy on vda")
    web.virsh("blockjob", "@", "vda", "--abort")
    web("delete @ s1")
    web.sound()


def test_a_backup_that_was_begun_after_a_kill(web: DomainScene) -> None:
    """It does not end by itself: nobody waits for it."""
    for number in (1, 2):
        web(f"snapshot @ s{number}")
        web.write("." * number + str(number))
    web.be("running")
    assert killed(web, "delete @ s1", 2, before=True)
    begin_backup(web)
    since = time.monotonic()
    for each in ("recover @", "snapshot @ s3"):
        assert f"on domain {web.name}: a backup is under way" in web(each, status=BUSY).err
    assert time.monotonic() - since < SOON
    web.virsh("domjobabort", "@")
    web("recover @")
    web("gc @")
    web.be("off")
    assert web.shows() == "b12....."
    web.sound()


@pytest.mark.slow
def test_it_is_being_migrated(web: DomainScene) -> None:
    """Before its first snapshot: libvirt migrates none that has any."""
    # The firmware puts this into the domain's memory, which then takes a while to be sent.
    for name, content in (("kernel", guest.kernel().read_bytes()), ("initrd", os.urandom(48 << 20))):
        (web.folder / name).write_bytes(content)
        (web.folder / name).chmod(0o644)
    text = web.virsh("dumpxml", "@", "--inactive")
    boot = f"<kernel>{web.folder}/kernel</kernel><initrd>{web.folder}/initrd</initrd></os>"
    text = text.replace("</os>", boot).replace("65536</memory>", "131072</memory>")
    web.define_xml(text.replace("65536</currentMemory>", "131072</currentMemory>"))
    web.be("running")
    time.sleep(5.0)
    with libvirtd(LABELLED) as other:
        words = ["virsh", "-q", "-c", web.own.uri, "migrate", "--live", "--unsafe", "--bandwidth", "1", web.name]
        words += [other.uri, "--migrateuri", "tcp://127.0.0.1:49321", "--listen-address", "127.0.0.1"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            until = time.monotonic() + 30
            while "Outgoing migration" not in web.virsh("domjobinfo", "@"):
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < until
                time.sleep(0.05)
            is_busy(web, "a migration")
            while web.name not in other.virsh("list", "--all", "--name").split():
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.05)
            # Where it comes to there is no word of its progress, but nobody may touch it there, either.
            with of_libvirt(other.uri):
                found = command("snapshot", web.name, "s2", state=web.folder / "elsewhere")
            assert found.status == BUSY and "igrat" in found.err, found.err
            assert process.poll() is None
            web.virsh("domjobabort", "@")
        finally:
            said = process.communicate(timeout=60)[0]
        assert process.returncode != 0, said
    web("snapshot @ s1")
    web.agree()
    assert web.shows() == "b......."


def test_a_domain_whose_disks_are_all_left_alone(domain: DomainScene) -> None:
    domain.define(devices=NETWORK)
    shown = domain.show()
    assert shown["disks"] == [] and "vde is left alone: it is on network storage (nbd)" in " ".join(shown["notes"])
    assert domain("tree @").status == 0
    for line in ("snapshot @ s1", "snapshot @ s1 --plan"):
        said = domain(line, status=REFUSED)
        assert "no disk" in said.err and "vde" in said.err and "network storage" in said.err
    assert domain.listed() == {}
