"""Domains with passwords, UEFI variables, memory, volumes of storage pools; with the machine off."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.domain import DomainScene, goes_on, of_libvirt, refused
from tests.kit.scene import SLOT, SLOTS
from tests.libvirt.test_killed import killed

from snaptree.errors import BusyError
from snaptree.machines.connection import Connection
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.plan import Plan

pytestmark = pytest.mark.root
REFUSED = 6


def test_passwords_and_what_others_keep_in_the_metadata_stay(domain: DomainScene) -> None:
    vnc = "<graphics type='vnc' port='-1' passwd='secret'/>"
    theirs = "<metadata><app:note xmlns:app='urn:app'>theirs</app:note></metadata>"
    domain.define("vda=web.qcow2", devices=vnc, more=theirs)
    domain("snapshot @ s1")
    domain.write("1")
    domain("revert @ s1")
    domain("rename @ s1 first")
    domain("delete @ --branch main.1")
    texts = [domain.virsh("dumpxml", "@", "--inactive", "--security-info")]
    texts.append(domain.virsh("snapshot-dumpxml", "@", "first", "--security-info"))
    for text in texts:
        assert "passwd='secret'" in text and ">theirs<" in text
    domain.sound()


def test_passwords_stay_while_it_runs(domain: DomainScene) -> None:
    domain.define("vda=web.qcow2", devices="<graphics type='vnc' passwd='secret'><listen type='socket'/></graphics>")
    domain.be("running")
    for line in ("snapshot @ s1", "snapshot @ m2 --memory", "snapshot @ s3", "delete @ s1", "revert @ m2", "gc @"):
        domain(line)
        texts = [domain.virsh("dumpxml", "@", *more, "--security-info") for more in ((), ("--inactive",))]
        texts += [domain.virsh("snapshot-dumpxml", "@", name, "--security-info") for name in domain.listed()]
        assert all("passwd='secret'" in text for text in texts), line
    memory = domain.names()["m2"]["memory"]
    assert "passwd='secret'" in domain.virsh("save-image-dumpxml", memory, "--security-info")
    domain.sound()


def with_variables(domain: DomainScene, element: str) -> None:
    """Define the domain with UEFI firmware, its variables as the element says."""
    loader = domain.folder / "code.fd"
    loader.write_bytes(bytes(65536))
    domain.define("vda=web.qcow2", more="<features><acpi/></features>")
    text = (domain.folder / "domain.xml").read_text()
    domain.define_xml(text.replace("</os>", f"<loader readonly='yes' type='pflash'>{loader}</loader>{element}</os>"))


@pytest.mark.parametrize(
    "element", ["<nvram>{}</nvram>", "<nvram type='file'><source file='{}'/></nvram>"], ids=["older", "newer"]
)
def test_uefi_variables_go_with_snapshots_and_branches(domain: DomainScene, element: str) -> None:
    """In both forms that libvirt has for where they are."""
    variables = domain.folder / "vars.fd"
    variables.write_bytes(b"one" + bytes(65533))
    with_variables(domain, element.format(variables))
    domain("snapshot @ s1")
    domain.write("1")
    variables.write_bytes(b"two" + bytes(65533))
    domain("revert @ s1")
    assert variables.read_bytes()[:3] == b"one"
    domain.agree()
    domain("switch @ main.1")
    assert variables.read_bytes()[:3] == b"two" and domain.shows("main.1") == "1......."
    assert domain.definition().find("os/nvram").get("type") == ("file" if "source" in element else None)
    domain("delete @ s1")
    domain("delete @ --branch main")
    assert [path for path in (domain.state / "firmware").rglob("*") if path.is_file()] == []
    domain.agree()


def test_uefi_variables_that_are_in_no_file(domain: DomainScene) -> None:
    with_variables(domain, "<nvram type='block'><source dev='/dev/vg/variables'/></nvram>")
    assert "no snapshot keeps the UEFI variables: they are in no file (type 'block')" in domain("verify @").out
    domain("snapshot @ s1")
    domain("revert @ s1")
    assert domain.definition().find("os/nvram/source").get("dev") == "/dev/vg/variables"


def test_uefi_variables_on_a_device_do_not_go_with_the_domain(domain: DomainScene) -> None:
    node = domain.folder / "variables"
    os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(7, 0))
    with_variables(domain, f"<nvram type='block'><source dev='{node}'/></nvram>")
    domain("remove @ --delete-files --yes")
    assert domain.name not in domain.virsh("list", "--all", "--name").split()
    assert node.is_block_device() and domain.files() == set()


def test_a_guest_that_has_crashed_and_is_kept(domain: DomainScene) -> None:
    """``<on_crash>preserve``: its QEMU is there, and has the disks open."""
    path = domain.image("web.qcow2")
    domain.left.add(domain.image("boot.raw", "raw"))
    # mov dx, 0x505; mov al, 1; out dx, al; hlt: what tells QEMU's panic device that the guest has crashed.
    code = bytes.fromhex("ba0505b001eef4")
    (domain.disks / "boot.raw").write_bytes((code.ljust(510, b"\0") + b"\x55\xaa").ljust(SLOTS * SLOT, b"\0"))
    for each in (path, domain.disks / "boot.raw"):
        each.chmod(0o600)
    panic = "<panic model='isa'/>"
    domain.define("vda=boot.raw", "vdb=web.qcow2", more="<on_crash>preserve</on_crash>", devices=panic)
    domain.virsh("start", "@")
    until = time.monotonic() + 60
    while "crashed" not in domain.virsh("domstate", "@"):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert domain.show()["state"] == "paused"
    assert "has to be off" in domain("remove @", status=REFUSED).err
    domain("snapshot @ s1")
    assert "it is paused" in str(domain("delete @ s1 --plan").out) or domain("delete @ s1").status == 0
    domain.virsh("destroy", "@")
    assert domain.show()["state"] == "off"
    domain("gc @")
    domain.sound()


def test_memory_that_virsh_has_saved(web: DomainScene) -> None:
    web.virsh("start", "@")
    memory = web.folder / "s1.memory"
    web.virsh("snapshot-create-as", "@", "s1", "--memspec", f"file={memory},snapshot=external")
    web.virsh("destroy", "@")
    web.write(".1")
    shown = web.names()["s1"]
    assert shown["memory"] == str(memory) and shown["consistency"] == "memory" and memory.exists()
    web("revert @ s1 --no-memory")
    assert web.shows() == "b......." and web.shows("main.1") == "b1......"
    web.agree()
    web("delete @ s1 --memory-only")
    assert not memory.exists() and web.names()["s1"]["memory"] is None
    web.sound()
    # What was a snapshot with memory can be gone back to all the same.
    web.virsh("snapshot-revert", "@", "s1")
    assert web.virsh_shows() == "b......." and web.shows("main.1") == "b1......"
    web("verify @ --repair")
    goes_on(web, "s1")


def test_a_volume_of_a_storage_pool(domain: DomainScene) -> None:
    images.create(domain.disks / "volume.qcow2", SLOTS * SLOT)
    pool = f"pool-{domain.name}"
    domain.virsh("pool-create-as", pool, "dir", "--target", domain.disks)
    try:
        source = f"<source pool='{pool}' volume='volume.qcow2'/>"
        disk = f"<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>{source}<target dev='vda'/></disk>"
        domain.define("vdb=data.qcow2", devices=disk)
        assert domain.path("main") == domain.disks / "volume.qcow2"
        assert "without source" in refused(domain, "snapshot-create-as", "@", "s1", "--disk-only")
        domain("snapshot @ s1")
        domain.write("1")
        domain("revert @ s1 --discard --delete")
        assert domain.shows() == "........" and domain.files() == {"volume.qcow2", "data.qcow2"}
        domain.agree()
    finally:
        domain.virsh("pool-destroy", pool)


def test_owners_and_modes_are_those_of_the_disk(web: DomainScene) -> None:
    os.chown(web.disks / "web.qcow2", 1234, 5678)
    (web.disks / "web.qcow2").chmod(0o640)
    web("snapshot @ s1")
    status = web.source()[0].stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (1234, 5678, 0o640)
    # libvirt hands them to its own user while it runs, and gives them back.
    web.virsh("start", "@", "--paused")
    assert web.source()[0].stat().st_uid != 1234
    web.virsh("destroy", "@")
    assert web.source()[0].stat().st_uid == 1234
    web.write(".1")
    # What is beneath the disk it does not give back.
    web("delete @ s1")
    web.sound()


def test_nobody_starts_it_meanwhile(web: DomainScene) -> None:
    web("snapshot @ s1")
    web.write(".1")
    from tests.kit.space import held

    with held(web.source()[0]):
        assert "lock" in refused(web, "start", "@")
        assert "is open" in web("snapshot @ s2", status=5).err
    assert set(web.listed()) == {"s1"}
    web.sound()


def test_two_names_for_one_thing(web: DomainScene) -> None:
    """A machine that was added and has the domain's name comes first; the domain goes by its UUID."""
    other = web.image("other.qcow2", word="o")
    web(f"add {web.name} --disk vda={other}")
    assert web.show()["provider"] == "standalone"
    assert "none of libvirt's" in web(f"verify {web.name} --repair", status=REFUSED).err
    web(f"snapshot {web.uuid} s1")
    shown = web(f"show {web.uuid} --json").json
    assert shown["provider"] == "libvirt" and [each["name"] for each in shown["snapshots"]] == ["s1"]
    assert web.show()["snapshots"] == [] and web.listed() == {"s1": None}
    rows = {each["machine"]: each["provider"] for each in web("list --json").json}
    assert rows[web.name] == "standalone" and rows[web.uuid] == "libvirt"
    web(f"remove {web.name}")
    assert Path(web("path @").out.strip()) == web.source()[0]


def test_virsh_comes_between_plan_and_doing(web: DomainScene) -> None:
    def confirm(plan: Plan) -> bool:
        web.virsh("snapshot-create-as", "@", "theirs", "--disk-only")
        return True

    with of_libvirt(web.own.uri), pytest.raises(BusyError, match="has been changed since it was planned"):
        Connection(str(web.state)).machine(web.name).run(SnapshotRequest("mine"), confirm=confirm)
    assert set(web.listed()) == {"theirs"} and set(web.names()) == {"theirs", "main"}
    web("snapshot @ mine")
    assert web.listed() == {"theirs": None, "mine": "theirs"}
    web.sound()


def test_virsh_comes_after_a_kill(web: DomainScene) -> None:
    web("snapshot @ s1")
    web.write(".1")
    assert killed(web, "delete @ s1 --merge commit", 3, before=True)
    web.virsh("snapshot-create-as", "@", "theirs", "--disk-only")
    web.write("..2")
    said = web("recover @", status=5)
    assert "somebody else has made so" in said.err and web.virsh_shows() == "b12....."
    web.virsh("snapshot-delete", "@", "theirs")
    web("recover @")
    assert web.shows() == "b12....." and web.files() == {"web.qcow2"}
    web.sound()
