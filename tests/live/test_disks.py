"""Disks that come into snaptree's care and leave it while the machine runs."""

from __future__ import annotations

import time

import pytest
from tests.kit import images
from tests.kit.by_hand import by_hand
from tests.kit.images import MiB
from tests.kit.qmp import Qmp
from tests.kit.records import read_records
from tests.kit.stage import Stage

SCSI = "qemu-system-x86_64 -nodefaults -machine q35 -accel tcg -m 64 -display none -device virtio-scsi-pci,id=scsi"
"""A machine without a guest, into which disks can be plugged."""


def test_a_disk_that_the_guest_writes_to_comes_and_goes(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.make()
    monkeypatch.chdir(stage.disks)
    stage.guest = by_hand(stage, "blockdev")
    stage.guest.go()
    stage(f"add web1 --disk vda.qcow2 --qmp {stage.folder}/qmp")
    stage.left.add(stage.disks / "vdb.raw")
    stage("snapshot web1 before")

    assert stage("disk attach web1 vdb=vdb.raw,format=raw --plan --json").json["operation"] == "attach"
    stage("disk attach web1 vdb=vdb.raw,format=raw")

    assert stage.show()["state"] == "running"
    stage("snapshot web1 both")
    stage.guest.writes_on()
    first = stage.holds("both")
    assert len(first) == 2 and first[1] > 0
    said = stage("disk detach web1 vdb", status=6).err
    assert "snapshots or branches" in said and "unplug" in said
    assert "is to be removed" in stage("disk detach web1 vdb --delete-files", status=6).err
    stage("delete web1 both")
    assert stage.path("main", "vdb").name == "vdb.raw"
    stage("disk detach web1 vdb --plan")
    assert "is to be removed" in stage("disk detach web1 vdb --delete-files --plan", status=6).err
    stage("disk detach web1 vdb")
    assert [each["target"] for each in stage.show()["disks"]] == ["vda"]
    assert stage.show()["state"] == "running"
    stage.guest.writes_on()
    stage("snapshot web1 after")
    assert set(stage.names()["after"]["points"]) == {"vda"}
    stage.guest.writes_on()
    stage.sound()
    stage("disk attach web1 vdb=vdb.raw,format=raw")
    stage.guest.writes_on()
    stage.finish()
    assert stage.holds("before")[0] < stage.holds("after")[0]


def test_what_the_machine_has_not_as_a_disk_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.make()
    monkeypatch.chdir(stage.disks)
    stage.guest = by_hand(stage, "blockdev")
    stage.guest.go()
    stage(f"add web1 --disk vda.qcow2 --qmp {stage.folder}/qmp")
    other = images.create(stage.disks / "other.qcow2", 32 * MiB)
    for more in ("", " --plan"):
        said = stage(f"disk attach web1 vdb={other}{more}", status=6).err
        assert "has not" in said and "device_add" in said
    with Qmp(stage.folder / "qmp") as qmp:
        qmp("blockdev-add", driver="qcow2", node_name="idle", file={"driver": "file", "filename": str(other)})
    # It is open, and no device has it.
    stage(f"disk attach web1 vdb={other}", status=5)
    with Qmp(stage.folder / "qmp") as qmp:
        qmp("blockdev-del", node_name="idle")
    other.unlink()
    assert [each["target"] for each in stage.show()["disks"]] == ["vda"]
    stage.guest.writes_on()
    stage("stop web1")
    content = images.read(stage.disks / "vdb.raw", "raw")
    assert read_records(content, 1).prefix == stage.guest.flushed()


def test_plugged_in_and_unplugged(stage: Stage) -> None:
    """A disk that was unplugged first is let go; until then nothing is done that would rest on it."""
    stage.add("--start", SCSI, raw=False)
    stage("start web1")
    base = images.create(stage.disks / "base.qcow2", 32 * MiB)
    disk = images.create(stage.disks / "vdc.qcow2", 32 * MiB, backing=(base, "qcow2"))
    stage.left.add(base)
    with stage.qmp() as qmp:
        plug(qmp, str(disk))
    stage(f"disk attach web1 vdc={disk}")
    stage("snapshot web1 s1")
    assert set(stage.names()["s1"]["points"]) == {"vda", "vdb", "vdc"}
    with stage.qmp() as qmp:
        unplug(qmp)
    said = stage("snapshot web1 s2", status=6).err
    assert "has not" in said and "disk detach web1 vdc" in said
    stage("disk detach web1 vdc")
    assert stage.show()["state"] == "running"
    assert "main-vdc" in stage.names()
    stage("snapshot web1 s2")
    assert set(stage.names()["s2"]["points"]) == {"vda", "vdb"}
    stage("delete web1 --branch main-vdc")
    stage("stop web1 --force")
    stage.sound()


def unplug(qmp: Qmp) -> None:
    """QEMU answers before it has let go of the device."""
    qmp("device_del", id="vdc")
    until = time.monotonic() + 30
    while any("vdc" in each.get("qdev", "") for each in qmp("query-block")):
        assert time.monotonic() < until
        time.sleep(0.01)


def plug(qmp: Qmp, path: str) -> None:
    file = {"driver": "file", "filename": path}
    qmp("blockdev-add", driver="qcow2", node_name="n-vdc", file=file)
    qmp("device_add", driver="scsi-hd", id="vdc", drive="n-vdc", bus="scsi.0")


def test_an_unplugged_disk_goes_with_its_files(stage: Stage) -> None:
    stage.add("--start", SCSI, raw=False)
    stage("start web1")
    disk = images.create(stage.disks / "vdc.qcow2", 32 * MiB)
    with stage.qmp() as qmp:
        plug(qmp, str(disk))
    stage(f"disk attach web1 vdc={disk}")
    with stage.qmp() as qmp:
        unplug(qmp)
    # The device has gone, and QEMU has the image still open.
    assert "is to be removed" in stage("disk detach web1 vdc --delete-files", status=6).err
    with stage.qmp() as qmp:
        qmp("blockdev-del", node_name="n-vdc")
    stage("disk detach web1 vdc --delete-files")
    assert not disk.exists()
    assert stage.show()["state"] == "running"
    stage("stop web1 --force")
    stage.sound()


def test_a_disk_that_is_only_read_is_refused(stage: Stage) -> None:
    stage.add("--start", SCSI, raw=False)
    stage("start web1")
    disk = images.create(stage.disks / "vdc.qcow2", 32 * MiB)
    stage.left.add(disk)
    with stage.qmp() as qmp:
        file = {"driver": "file", "filename": str(disk)}
        qmp("blockdev-add", driver="qcow2", node_name="n-vdc", file=file, read_only=True)
        qmp("device_add", driver="scsi-hd", id="vdc", drive="n-vdc", bus="scsi.0")
    assert "reading only" in stage(f"disk attach web1 vdc={disk}", status=6).err
    stage("stop web1 --force")
    stage.sound()
