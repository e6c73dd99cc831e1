"""What is changed of libvirt's XML, and what is not."""

from __future__ import annotations

import pytest

from snaptree.store.libvirt import xml

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
