"""Encrypted disks of a domain: what would have libvirt open a new layer of theirs is refused, and touches nothing."""

from __future__ import annotations

from tests.kit import luks
from tests.kit.domain import DomainScene
from tests.kit.rights import picture

REFUSED = 6


def test_nothing_of_theirs_is_touched(domain: DomainScene) -> None:
    """Every verb says so; what is not encrypted of the machine stays as it is, too."""
    domain.image("web.qcow2", word="b", **luks.OPTIONS)
    domain.define("vda=web.qcow2", "vdb=data.qcow2")
    before, definition = picture(domain.disks), domain.virsh("dumpxml", "@")
    for line in (
        "snapshot @ s1",
        "snapshot @ s1 --internal",
        "branch @ b1",
    ):
        said = domain(line, status=REFUSED)
        assert f"{domain.disks / 'web.qcow2'} is encrypted" in said.err and "libvirt" in said.err, said
        assert picture(domain.disks) == before and domain.virsh("dumpxml", "@") == definition
    assert domain.listed() == {}
    assert "is encrypted" in domain("verify @").out
