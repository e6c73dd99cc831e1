"""The libvirtd of the tests' own: it keeps domains like any other, and leaves nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.disks import SMALLEST, Disk
from tests.kit.libvirtd import LibvirtUnavailable, libvirtd

pytestmark = pytest.mark.root

DOMAIN = """<domain type='qemu'><name>web1</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64'>hvm</type></os><devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
<source file='{path}'/><target dev='vda'/></disk></devices></domain>"""


def test_a_domain_of_its_own_and_nothing_left(tmp_path: Path) -> None:
    images.run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "web1.qcow2", "16M")
    text = tmp_path / "web1.xml"
    text.write_text(DOMAIN.format(path=tmp_path / "web1.qcow2"))
    before = set(os.listdir("/run"))
    try:
        with libvirtd() as own:
            own.virsh("define", text)
            assert own.virsh("list", "--all", "--name").split() == ["web1"]
            own.virsh("start", "web1", "--paused")
            place = own.log.parent
            assert running(place)
    except LibvirtUnavailable as error:
        pytest.skip(str(error))
    assert not place.exists()
    assert running(place) == []
    assert set(os.listdir("/run")) == before
    with libvirtd() as other:
        assert other.virsh("list", "--all", "--name").split() == []


def test_it_keeps_no_file_system_of_others(tmp_path: Path) -> None:
    """What is mounted in a namespace that somebody still has cannot be mounted anew: XFS looks at the UUID."""
    disk = Disk(tmp_path, "xfs", SMALLEST["xfs"])
    try:
        disk.mount()
        with libvirtd() as own:
            assert own.virsh("list", "--all", "--name").split() == []
            disk.unmount()
            disk.patience = 1.0
            disk.mount()
        with libvirtd(keep=disk.place) as own:
            (process, *_) = running(own.log.parent)
            assert f" {disk.place} " in Path(f"/proc/{process}/mountinfo").read_text()
    except LibvirtUnavailable as error:
        pytest.skip(str(error))
    finally:
        disk.remove()


def running(place: Path) -> list[str]:
    """The processes that have the folder as their ``/run``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mounts = (process / "mountinfo").read_text()
        except OSError:
            continue
        if f"{place}/run /run " in mounts:
            found.append(process.name)
    return found
