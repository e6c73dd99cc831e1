"""Encrypted disks of a domain: no layer of theirs is made or merged, and what takes that is refused."""

from __future__ import annotations

import pytest
from tests.kit import images, luks
from tests.kit.domain import DomainScene
from tests.kit.rights import picture

REFUSED = 6


def _define(domain: DomainScene) -> None:
    """An encrypted disk with an internal snapshot in it, whose key libvirt has, and a plain one."""
    path = domain.image("web.qcow2", word="b", **luks.OPTIONS)
    images.run("qemu-img", "snapshot", *luks.KEY, "-c", "i1", luks.opened(path, "qcow2")[-1])
    domain.define("vda=web.qcow2", "vdb=data.qcow2")
    usage = f"<usage type='volume'><volume>{path}</volume></usage>"
    secret = domain.folder / "secret.xml"
    secret.write_text(f"<secret ephemeral='no' private='no'><uuid>{domain.uuid}</uuid>{usage}</secret>")
    domain.virsh("secret-define", secret)
    domain.virsh("secret-set-value", domain.uuid, "--file", luks.key_file(domain.folder), "--plain")
    text = domain.virsh("dumpxml", "@", "--inactive")
    encryption = f"<encryption format='luks'><secret type='passphrase' uuid='{domain.uuid}'/></encryption>"
    domain.define_xml(text.replace(f"<source file='{path}'/>", f"<source file='{path}'>{encryption}</source>"))


@pytest.mark.parametrize("now", ["off", "running"])
def test_nothing_of_theirs_is_touched(domain: DomainScene, now: str) -> None:
    """Every verb says so; what is not encrypted of the machine stays as it is, too."""
    _define(domain)
    domain.be(now)
    try:
        before, definition = set(domain.files()), domain.virsh("dumpxml", "@", "--inactive")
        content = picture(domain.disks) if now == "off" else {}
        memory = ["snapshot @ s1 --memory"] if now == "running" else []
        for line in ("snapshot @ s1", "snapshot @ s1 --internal", *memory):
            said = domain(line, status=REFUSED)
            assert f"{domain.disks / 'web.qcow2'} is encrypted" in said.err and "libvirt" in said.err, said
            assert domain.virsh("dumpxml", "@", "--inactive") == definition
            assert set(domain.files()) == before
        if now == "off":
            assert "is encrypted" in domain("branch @ b1", status=REFUSED).err
            assert picture(domain.disks) == content
        assert domain.listed() == {}
        found = domain("verify @", status=None)
        assert "is encrypted" in found.out, found
    finally:
        domain.be("off")
        domain.virsh("secret-undefine", domain.uuid)


def test_overlays_that_virsh_has_made_are_not_merged(domain: DomainScene) -> None:
    """Names may go; layers stay, and are said."""
    _define(domain)
    for name in ("x1", "x2"):
        domain.virsh("snapshot-create-as", "@", name, "--disk-only")
    before = {path: data for path, data in picture(domain.disks).items() if "data" not in path}
    for line in ("snapshot @ s1", "revert @ x1", "branch @ b1 --from x1"):
        assert "is encrypted" in domain(line, status=REFUSED).err, line
    said = domain("delete @ x1")

    assert "is encrypted" in said.out, said
    assert {path: data for path, data in picture(domain.disks).items() if "data" not in path} == before
    domain.virsh("secret-undefine", domain.uuid)
