"""Disks of other types, and what else a domain may have: block devices, what is passed through, checkpoints, labels."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.disks import loop_device
from tests.kit.domain import DomainScene, define_text, goes_on, refused
from tests.kit.scene import SLOT, SLOTS

pytestmark = pytest.mark.root
REFUSED = 6
WHICH = (("a", "web"), ("b", "data"))
EJECT: dict[str, list[str]] = {"cdrom": ["--eject"], "disk": []}


def test_a_block_device_that_virsh_takes_no_snapshot_of(domain: DomainScene, state: str) -> None:
    content = domain.image("disk.raw", "raw", word="b")
    domain.left.add(content)
    with loop_device(content) as device:
        domain.define_xml(define_text(domain.name, domain.uuid, [("vda", device, "raw")]))
        domain.be(state)
        assert refused(domain, "snapshot-create-as", "@", "s1", "--disk-only")
        assert "--file vda=" in domain("snapshot @ s1", status=REFUSED).err
        domain(f"snapshot @ s1 --file vda={domain.disks}/vda.qcow2")
        domain.write(".1")
        domain.sound()
        domain.virsh("snapshot-create-as", "@", "v2", "--disk-only")
        domain.write("..2")
        assert domain.listed() == {"s1": None, "v2": "s1"} and domain.shows("v2") == "b1......"
        domain("delete @ v2")
        domain("revert @ s1")
        assert (domain.shows(), domain.shows("main.1"), domain.shows("s1")) == ("b.......", "b12.....", "b.......")
        domain.sound()
        domain("switch @ main.1")
        domain("delete @ --branch main")
        domain("rename @ main.1 main")
        # What virsh refuses, snaptree does: the device is the disk again.
        assert refused(domain, "snapshot-revert", "@", "s1")
        domain("revert @ s1 --discard --delete")
        assert domain.source() == (device, "raw") and domain.shows() == "b......." and domain.listed() == {}
        assert [each.get("type") for each in domain.definition().findall("devices/disk")] == ["block"]
        assert domain.files() == {"disk.raw"}
        domain.sound()
        domain.remove()


def test_a_disk_comes_back_whose_place_another_device_has_taken(web: DomainScene) -> None:
    """An address is one device's, and a boot order that of all; what the disk was like else it is again."""
    web.image("data.qcow2", word="d")
    extra = web.image("more.qcow2")
    for path in web.disks.iterdir():
        path.chmod(0o600)
    boot = "<driver name='qemu' type='qcow2' discard='unmap'/><boot order='1'/>"
    text = define_text(web.name, web.uuid, [(f"vd{at}", web.disks / f"{name}.qcow2", "qcow2") for at, name in WHICH])
    driver = "<driver name='qemu' type='qcow2'/>"
    web.define_xml(boot.join(text.rsplit(driver, 1)))
    address = web.definition().findall("devices/disk/address")[1]
    web("snapshot @ s1")
    web.write(".1", "vdb")
    # What was written since goes with it.
    web.left |= {extra, web.source("vdb")[0]}
    web.virsh("detach-disk", "@", "vdb", "--config")
    place = "".join(f" {key}='{value}'" for key, value in address.attrib.items())
    (web.folder / "more.xml").write_text(
        f"<disk type='file' device='disk'>{driver}<source file='{extra}'/><target dev='vdc' bus='virtio'/>"
        f"<address{place}/></disk>"
    )
    web.virsh("attach-device", "@", web.folder / "more.xml", "--config")
    web("revert @ s1")
    found = {each.find("target").get("dev"): each for each in web.definition().findall("devices/disk")}
    assert set(found) == {"vda", "vdb", "vdc"}
    assert found["vdb"].find("driver").get("discard") == "unmap" and found["vdb"].find("boot") is None
    assert web.shows(disk="vdb") == "d......."
    web.sound()
    web.be("running")
    web.be("off")


@pytest.mark.parametrize("kind", ["cdrom", "disk"])
def test_a_medium_of_a_pool_that_has_been_thrown_away(domain: DomainScene, kind: str) -> None:
    """It is in the record of an old snapshot: nobody looks for it."""
    pool, media = f"pool-{domain.name}", domain.folder / "media"
    media.mkdir()
    media.chmod(0o755)
    images.create(media / "seed.iso", SLOT, "raw")
    domain.virsh("pool-create-as", pool, "dir", "--target", media)
    try:
        disk = (
            f"<disk type='volume' device='{kind}'><driver name='qemu' type='raw'/><source pool='{pool}' "
            "volume='seed.iso'/><target dev='sda' bus='sata'/><readonly/></disk>"
        )
        if kind == "disk":
            disk = disk.replace("bus='sata'", "bus='scsi'") + "<controller type='scsi' model='virtio-scsi'/>"
        domain.define("vda=web.qcow2", devices=disk)
        domain("snapshot @ s1")
        domain.write(".1")
        domain.virsh("detach-disk" if kind == "disk" else "change-media", "@", "sda", "--config", *EJECT[kind])
        domain.virsh("vol-delete", "seed.iso", "--pool", pool)
        for line in ("snapshot @ s2", "revert @ s1", "delete @ s2", "verify @ --repair", "gc @"):
            domain(line)
        domain.sound()
    finally:
        domain.virsh("pool-destroy", pool)


def test_a_volume_has_another_number_after_a_boot(domain: DomainScene, state: str) -> None:
    """``/dev/vg/lv`` is a link to ``/dev/dm-3``, and after the next boot one to ``/dev/dm-4``."""
    first, second = domain.image("disk.raw", "raw", word="b"), domain.image("other.raw", "raw", word="b")
    domain.left |= {first, second}
    with loop_device(first) as one, loop_device(second) as two:
        link = domain.folder / "vg-lv"
        link.symlink_to(one)
        domain.define_xml(define_text(domain.name, domain.uuid, [("vda", link, "raw")]))
        domain.be(state)
        domain(f"snapshot @ s1 --file vda={domain.disks}/vda.qcow2")
        domain.write(".1")
        domain("snapshot @ s2")
        domain("delete @ s2")
        domain.sound()
        domain.be("off")
        # As after a boot: the volume has the other number, and a stranger's has this one.
        one.write_bytes(b"x" * SLOTS * SLOT)
        link.unlink()
        link.symlink_to(two)
        assert domain.virsh_shows() == domain.shows() == "b1......" and domain.shows("s1") == "b......."
        domain.sound()
        domain.be(state)
        domain("snapshot @ s3")
        domain.write("..3")
        domain("revert @ s3")
        domain("delete @ s3")
        assert domain.shows() == "b1......" and domain.shows("main.1") == "b13....."
        domain.sound()
        domain("delete @ --branch main.1")
        domain("revert @ s1 --discard --delete")
        assert domain.source() == (link, "raw") and domain.shows() == "b......." and domain.listed() == {}
        domain.sound()
        domain.remove()


def test_a_volume_by_several_names(domain: DomainScene) -> None:
    """Whoever made a record or an overlay may have named the volume by another of its links, or by its number."""
    content = domain.image("disk.raw", "raw", word="b")
    domain.left.add(content)
    with loop_device(content) as device:
        links = [domain.folder / "vg-lv", domain.folder / "by-id"]
        for link in links:
            link.symlink_to(device)
        domain.define_xml(define_text(domain.name, domain.uuid, [("vda", links[0], "raw")]))
        domain(f"snapshot @ s1 --file vda={domain.disks}/vda.qcow2")
        images.run("qemu-img", "rebase", "-q", "-u", "-b", device, "-F", "raw", domain.path("main"))
        domain.write(".1")
        domain(f"snapshot @ s2 --file vda={domain.disks}/second.qcow2")
        text = domain.virsh("snapshot-dumpxml", "@", "s1", "--security-info").replace(str(links[0]), str(links[1]))
        (domain.folder / "s1.xml").write_text(text)
        domain.virsh("snapshot-create", "@", domain.folder / "s1.xml", "--redefine")
        assert len(domain.show()["layers"]) == 3 and domain.path("s1") == links[1]
        domain("snapshot @ s3")
        domain("delete @ s2")
        domain("revert @ s1")
        assert domain.shows() == "b......." and domain.shows("s3") == "b1......"
        domain.sound()
        domain.remove()


def test_what_is_passed_through_is_left_alone(domain: DomainScene) -> None:
    """Besides CD-ROMs, read-only and shared disks (``test_reading.py``)."""
    content = domain.image("disk.raw", "raw", word="b")
    floppy = images.create(domain.disks / "floppy.raw", 1440 << 10, "raw")
    scratch = images.create(domain.disks / "scratch.qcow2", SLOTS * SLOT)
    domain.left |= {content, floppy, scratch}
    with loop_device(content) as device:
        others = (
            f"<disk type='block' device='lun'><driver name='qemu' type='raw'/><source dev='{device}'/>"
            "<target dev='sdb' bus='scsi'/></disk><controller type='scsi' model='virtio-scsi'/>"
            f"<disk type='file' device='floppy'><driver name='qemu' type='raw'/><source file='{floppy}'/>"
            "<target dev='fda' bus='fdc'/></disk>"
            f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{scratch}'/>"
            "<target dev='vdc' bus='virtio'/><transient/></disk>"
        )
        domain.define("vda=web.qcow2", devices=others)
        shown = domain.show()
        assert [each["target"] for each in shown["disks"]] == ["vda"]
        said = " ".join(shown["notes"])
        for words in ("sdb is left alone: it is passed through raw", "fda is left alone: it is a floppy"):
            assert words in said
        assert "vdc is left alone: what is written to it goes" in said
        domain("snapshot @ s1")
        domain.write("1")
        domain("revert @ s1")
        domain("delete @ s1")
        found = {each.find("target").get("dev"): each for each in domain.definition().findall("devices/disk")}
        assert found["sdb"].get("device") == "lun" and found["sdb"].find("source").get("dev") == str(device)
        assert found["vdc"].find("transient") is not None and found["fda"].get("device") == "floppy"
        assert domain.shows("main.1") == "1......."
        domain.sound()
        domain.remove()


def test_a_slice_of_a_file_is_left_alone(domain: DomainScene, state: str) -> None:
    """An overlay on the file would show the guest what is at its beginning."""
    path = images.create(domain.disks / "data.raw", 2 * SLOTS * SLOT, "raw")
    images.io(path, "raw", f"write -P {ord('s')} {SLOTS * SLOT} {SLOT}")
    path.chmod(0o600)
    domain.left.add(path)
    slices = f"<slices><slice type='storage' offset='{SLOTS * SLOT}' size='{SLOTS * SLOT}'/></slices>"
    disk = f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{path}'>{slices}</source>"
    domain.define("vda=web.qcow2", devices=f"{disk}<target dev='vdb' bus='virtio'/></disk>")
    domain.be(state)
    domain("snapshot @ s1")
    domain.write(".1")
    domain("revert @ s1")
    assert "disk vdb is left alone: it is a slice of a file" in domain("verify @").out
    assert [each["target"] for each in domain.show()["disks"]] == ["vda"]
    source = domain.definition().findall("devices/disk/source")[1]
    assert source.get("file") == str(path) and source.find("slices/slice").get("offset") == str(SLOTS * SLOT)
    assert domain.shows() == "........" and domain.shows("main.1") == ".1......"
    domain.sound()


def test_a_raw_disk_that_is_encrypted_is_left_alone(domain: DomainScene) -> None:
    """An overlay on the file would show the guest what only the key makes sense of."""
    path = images.create(domain.disks / "data.raw", SLOTS * SLOT, "raw")
    domain.left.add(path)
    secret = f"<encryption format='luks'><secret type='passphrase' uuid='{domain.uuid}'/></encryption>"
    disk = f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{path}'>{secret}</source>"
    domain.define("vda=web.qcow2", devices=f"{disk}<target dev='vdb' bus='virtio'/></disk>")
    domain("snapshot @ s1")
    domain("revert @ s1")
    assert "disk vdb is left alone: it is encrypted" in domain("verify @").out
    assert [each["target"] for each in domain.show()["disks"]] == ["vda"]
    assert domain.source("vdb") == (path, "raw") and domain.definition().find(".//source/encryption") is not None
    domain.sound()


def test_a_volume_of_a_storage_pool_that_is_in_use(domain: DomainScene, state: str) -> None:
    images.create(domain.disks / "volume.qcow2", SLOTS * SLOT)
    pool = f"pool-{domain.name}"
    domain.virsh("pool-create-as", pool, "dir", "--target", domain.disks)
    try:
        source = f"<source pool='{pool}' volume='volume.qcow2'/>"
        disk = f"<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>{source}"
        domain.define("vdb=data.qcow2", devices=f"{disk}<target dev='vda' bus='virtio'/></disk>")
        domain.be(state)
        domain("snapshot @ s1")
        domain("snapshot @ s2")
        domain("delete @ s1")
        assert domain.path("s2") == domain.disks / "volume.qcow2" and domain.listed() == {"s2": None}
        domain.write("2")
        domain.sound()
        domain("revert @ s2")
        domain("delete @ --branch main.1")
        assert domain.shows() == "........" and domain.listed() == {"s2": None}
        domain.sound()
        goes_on(domain, "s2")
    finally:
        domain.virsh("pool-destroy", pool)


def test_disks_that_libvirt_takes_for_each_other(domain: DomainScene) -> None:
    """Of disks that were defined without a bus libvirt 11.3 mixes up the order: virsh swaps them."""
    first, second = domain.image("first.qcow2", word="1"), domain.image("second.qcow2", word="2")
    text = define_text(domain.name, domain.uuid, [("vdb", second, "qcow2"), ("vda", first, "qcow2")])
    domain.define_xml(text.replace("<target dev='vda' bus='virtio'/>", "<target dev='vda'/>"))
    domain.be("running")
    before = domain.files()
    said = domain("snapshot @ s1", status=REFUSED)
    assert "for another disk" in said.err and "start it again" in said.err
    assert domain.files() == before and domain.listed() == {}
    domain.be("off")
    domain.be("running")
    domain("snapshot @ s1")
    domain.write("x")
    assert (domain.shows("s1"), domain.shows("s1", "vdb"), domain.shows()) == ("1.......", "2.......", "x.......")
    domain.sound()
    domain.remove()
    # What it is kept from.
    domain.define_xml(text.replace("<target dev='vda' bus='virtio'/>", "<target dev='vda'/>"))
    domain.be("running")
    domain.virsh("snapshot-create-as", "@", "v1", "--disk-only")
    listed = dict(line.split() for line in domain.virsh("domblklist", "@").splitlines())
    assert listed["vda"].endswith("second.v1") and listed["vdb"].endswith("first.v1")


def test_labels_that_the_user_has_given_stay(web: DomainScene, state: str) -> None:
    text = web.virsh("dumpxml", "@", "--inactive")
    label = "<seclabel model='dac' relabel='no'/>"
    path = web.disks / "web.qcow2"
    path.chmod(0o666)
    web.define_xml(text.replace(f"<source file='{path}'/>", f"<source file='{path}'>{label}</source>"))
    web.be(state)
    web("snapshot @ s1")
    found = web.definition().find("devices/disk/source/seclabel")
    assert found is not None and (found.get("model"), found.get("relabel")) == ("dac", "no")
    web.write(".1")
    web("revert @ s1")
    assert web.definition().find("devices/disk/source/seclabel") is not None
    assert web.runs() == (state == "running") and web.shows("main.1") == "b1......"
    web("delete @ s1")
    web.sound()


def test_what_else_a_source_says_stays(web: DomainScene, state: str) -> None:
    text = web.virsh("dumpxml", "@", "--inactive")
    path = web.disks / "web.qcow2"
    web.define_xml(text.replace(f"<source file='{path}'/>", f"<source file='{path}' startupPolicy='optional'/>"))
    web.be(state)

    def policy() -> str | None:
        found: str | None = web.definition().find("devices/disk/source").get("startupPolicy")
        return found

    assert policy() == "optional"
    web("snapshot @ s1")
    assert policy() == "optional"
    web.write(".1")
    web("revert @ s1")
    assert policy() == "optional" and web.shows() == "b......." and web.shows("main.1") == "b1......"
    web("delete @ --branch main.1")
    web("revert @ s1 --discard --delete")
    assert policy() == "optional" and web.source()[0] == path
    web.sound()


def test_backup_checkpoints(web: DomainScene) -> None:
    """What a backup program has noted since its last backup is not lost by snapshots and deletions while it runs."""
    web.be("running")
    web.virsh("checkpoint-create-as", "@", "c1")
    web("snapshot @ s1")
    web("snapshot @ s2")
    said = web("delete @ s1")
    assert "has persistent bitmaps (c1), which a merge would drop" in said.out and web.listed() == {"s2": None}
    web("delete @ s2")
    assert web.virsh("checkpoint-list", "@", "--name").split() == ["c1"]
    backup = web.folder / "backup"
    backup.mkdir()
    backup.chmod(0o777)
    text = (
        "<domainbackup mode='push'><incremental>c1</incremental><disks><disk name='vda' type='file' backup='yes'>"
        f"<driver type='qcow2'/><target file='{backup}/vda.qcow2'/></disk></disks></domainbackup>"
    )
    (web.folder / "backup.xml").write_text(text)
    web.virsh("backup-begin", "@", web.folder / "backup.xml")
    until = time.monotonic() + 30
    while "None" not in web.virsh("domjobinfo", "@"):
        assert time.monotonic() < until
        time.sleep(0.05)
    web.agree()

    web.be("off")
    web("snapshot @ s3")
    web.write(".3")
    assert "bitmap" in web("gc @").out and web.virsh("checkpoint-list", "@", "--name").split() == ["c1"]
    web.sound()
    # With the checkpoint what was kept for it can go.
    web.be("running")
    web.virsh("checkpoint-delete", "@", "c1")
    for layer in [each for each in web.show()["layers"] if each["health"] == "changed"]:
        # libvirt has written to what is frozen; what it shows is the same.
        web(f"verify @ --accept {layer['path']}")
    web("gc @")
    assert len(web.chain()) == 2 and (web.shows("s3"), web.shows()) == ("b.......", "b3......")
    web.sound()
    web.virsh("checkpoint-create-as", "@", "c2")
    web.be("off")
    web("remove @ --delete-files --yes")
    assert web.files() == set() and web.name not in web.virsh("list", "--all", "--name").split()


def test_hosts_files_are_no_backing_files(domain: DomainScene, tmp_path: Path) -> None:
    """What a header names beneath a domain's disk is read as that header says, and never as more than data."""
    images.create(domain.disks / "web.qcow2", SLOTS * SLOT)
    images.run("qemu-img", "rebase", "-q", "-u", "-b", "json:{\"driver\":\"null-co\"}", "-F", "raw",
               domain.disks / "web.qcow2")  # fmt: skip
    domain.define("vda=web.qcow2")
    (layer,) = domain.show()["layers"]
    assert layer["health"] != "ok" and layer["parent"] is None
    before = (domain.disks / "web.qcow2").read_bytes()
    assert "json:" in domain("snapshot @ s1", status=7).err
    assert (domain.disks / "web.qcow2").read_bytes() == before and domain.files() == {"web.qcow2"}
