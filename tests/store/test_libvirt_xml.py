"""What is changed of libvirt's XML, and what is not."""

from __future__ import annotations

import socket

import pytest

from snaptree.store.libvirt import xml
from snaptree.store.libvirt.binding import is_here

LABEL = "<seclabel model='dac' relabel='no'/>"


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("file", "<source file='/old'/>", "<source file='/new'/>"),
        (
            "file",
            f"<source file='/old' index='1' fdgroup='a'>{LABEL}</source>",
            f"<source file='/new'>{LABEL}</source>",
        ),
        (
            "volume",
            f"<source pool='p' volume='v' mode='host' startupPolicy='optional'>{LABEL}</source>",
            f"<source startupPolicy='optional' file='/new'>{LABEL}</source>",
        ),
        (
            "block",
            f"<source dev='/dev/old' startupPolicy='requisite'><reservations managed='yes'/>{LABEL}{LABEL}</source>",
            f"<source startupPolicy='requisite' file='/new'>{LABEL}{LABEL}</source>",
        ),
        ("file", "<source file='/old'><encryption format='luks'/></source>", "<source file='/new'/>"),
        ("file", "", "<source file='/new'/>"),
    ],
)
def test_what_else_a_source_says_stays_but_for_what_is_of_the_old_file(kind: str, before: str, after: str) -> None:
    disk = xml.parse(
        f"<disk type='{kind}'><driver name='qemu' type='raw'/>{before}<target dev='vda'/></disk>", "a disk"
    )
    xml.put_source(disk, "/new", "qcow2", lambda pool, volume: None)
    wanted = f"<disk type='file'><driver name='qemu' type='qcow2'/>{after}<target dev='vda'/></disk>"
    assert xml.same(disk, xml.parse(wanted, "a disk")), xml.text_of(disk)


def test_a_volume_of_a_network_pool_is_no_file() -> None:
    """An RBD pool's volume has a path that is none: ``pool/image``."""
    source = "<source pool='rbd' volume='disk'/>"
    domain = xml.parse(
        f"<domain><devices><disk type='volume'><driver name='qemu' type='raw'/>{source}<target dev='vda'/></disk>"
        "</devices></domain>",
        "a domain",
    )
    ((_, disk),) = xml.disks(domain)
    for resolve, left, lost in (
        (lambda pool, volume: "", "it is on network storage (pool 'rbd')", ()),
        (lambda pool, volume: None, "its source is no file that can be found (type 'volume')", (("rbd", "disk"),)),
        (lambda pool, volume: "/there", "", ()),
    ):
        assert xml.why_left(disk, resolve) == left
        assert xml.lost_volumes(domain, resolve) == lost
        assert xml.path_of(disk, resolve) == (None if left else "/there")


@pytest.mark.parametrize(
    ("uri", "here"),
    [
        ("qemu:///system", True),
        ("qemu:///session", True),
        ("qemu+unix:///system?socket=/run/x", True),
        ("qemu+ssh://localhost/system", True),
        ("qemu+ssh:///system", True),
        (f"qemu+ssh://{socket.gethostname()}/system", True),
        ("qemu+tcp://[::1]/system", True),
        ("qemu://other/system", False),
        ("qemu+ssh://user@other:22/system", False),
        ("qemu+tls://localhost.evil.example/system", False),
        ("qemu+ext:///system?command=/bin/x", False),
        ("qemu+libssh2://10.0.0.1/session", False),
    ],
)
def test_which_connections_are_to_this_host(uri: str, here: bool) -> None:
    assert is_here(uri) == here


DISKS = """<domain><os>{}</os><devices>
<disk><target dev='sda' bus='scsi'/><address type='drive' controller='0' bus='0' target='0' unit='3'/></disk>
<disk><target dev='vda' bus='virtio'/><boot order='1'/>
<address type='pci' domain='0x0000' bus='0x00' slot='0x04' function='0x0' multifunction='on'/></disk>
</devices></domain>"""


@pytest.mark.parametrize(
    ("bus", "place", "system", "taken"),
    [
        ("virtio", "<address type='pci' domain='0x0000' bus='0x00' slot='0x04' function='0x0'/>", "", True),
        ("virtio", "<address type='pci' domain='0x0000' bus='0x00' slot='0x04' function='0x1'/>", "", False),
        ("sata", "<address type='drive' controller='0' bus='0' target='0' unit='3'/>", "", False),
        ("scsi", "<address type='drive' controller='0' bus='0' target='0' unit='3'/>", "", True),
        ("virtio", "<boot order='1'/>", "", True),
        ("virtio", "<boot order='2'/>", "", False),
        ("virtio", "<boot order='2'/>", "<boot dev='hd'/>", True),
        ("virtio", "<serial>x</serial>", "", False),
    ],
)
def test_what_is_another_devices_place(bus: str, place: str, system: str, taken: bool) -> None:
    domain = xml.parse(DISKS.format(system), "a domain")
    disk = xml.parse(f"<disk><target dev='x' bus='{bus}'/>{place}</disk>", "a disk")
    assert xml.is_taken(disk[1], domain) == taken
