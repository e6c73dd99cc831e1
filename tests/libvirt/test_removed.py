"""A domain is removed, with its files or without: what stays is whole, firmware state too."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.kit.domain import DomainScene, grown

pytestmark = pytest.mark.root
TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"


def state_of_tpm(domain: DomainScene) -> Path:
    """Where libvirt keeps what the domain's TPM holds."""
    return domain.own.log.parent / "lib" / "swtpm" / domain.uuid


def test_b14_without_its_files(web: DomainScene) -> None:
    grown(web, "s1")
    web("branch @ aside --from s1")
    before = {path: path.read_bytes() for path in web.disks.iterdir()}
    web("remove @")
    assert web.name not in web.virsh("list", "--all", "--name").split()
    assert {path: path.read_bytes() for path in web.disks.iterdir()} == before
    web.left |= set(before)


@pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")
@pytest.mark.parametrize("files", ["", " --delete-files --yes"])
def test_b14_what_a_tpm_holds_goes_with_the_files(domain: DomainScene, files: str) -> None:
    domain.define("vda=web.qcow2", devices=TPM)
    domain.be("running")
    assert state_of_tpm(domain).exists()
    domain("snapshot @ s1")
    assert "what its TPM holds" in " ".join(domain.show()["notes"])
    domain.be("off")
    domain(f"remove @{files}")
    assert state_of_tpm(domain).exists() == (not files)
    assert (domain.disks / "web.qcow2").exists() == (not files)
    domain.left |= set(domain.disks.iterdir())
    shutil.rmtree(state_of_tpm(domain), ignore_errors=True)
