"""Memory that libvirt saves in other forms than QEMU's own: compressed, or sparse (``snapshot_image_format``)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from tests.kit.domain import DomainScene, VirshRefusal, domain_scene
from tests.kit.libvirtd import LABELLED, libvirtd_or_skip
from tests.libvirt.test_memory import UNHEALTHY, memory_of, remembered

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture(params=["gzip", "zstd", "sparse"])
def form(request: pytest.FixtureRequest) -> str:
    """What libvirt is told to save memory as."""
    if request.param != "sparse" and shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


@pytest.fixture
def web(form: str) -> Iterator[DomainScene]:
    """A domain of a libvirt that saves in that form."""
    conf = f'{LABELLED}snapshot_image_format = "{form}"\nsave_image_format = "{form}"\n'
    with libvirtd_or_skip(conf) as own, domain_scene(own) as found:
        found.image("web.qcow2", word="b")
        found.define("vda=web.qcow2")
        yield found


def test_memory_is_gone_back_to_and_parked(web: DomainScene) -> None:
    remembered(web)
    web("revert @ m1")
    assert web.show()["state"] == "running" and web.shows("m1") == "b1......"
    web("switch @ main.1")
    web.agree()
    web("snapshot @ m2 --memory")
    web("revert @ m1 --discard")
    web.agree()
    # libvirt loads both, by either way.
    web.virsh("snapshot-revert", "@", "m2")
    assert web.virsh("domstate", "@").strip() == "running"
    web.virsh("destroy", "@")
    web("verify @ --repair")
    web("delete @ m1 m2")
    web.virsh("start", "@")
    web.virsh("save", "@", web.disks / "saved")
    web.virsh("restore", web.disks / "saved")
    assert web.virsh("domstate", "@").strip() == "running"
    web.virsh("destroy", "@")
    (web.disks / "saved").unlink()
    web.sound()


def test_one_that_was_cut(web: DomainScene) -> None:
    remembered(web)
    memory, number = memory_of(web, "m1"), web.virsh("domid", "@")
    os.truncate(memory, memory.stat().st_size - 1000)
    assert "is cut" in web("revert @ m1", status=UNHEALTHY).err
    assert web.virsh("domid", "@") == number
    web.virsh("destroy", "@")


@pytest.mark.parametrize("form", ["sparse"])
def test_one_of_virsh_that_is_not_what_it_says(web: DomainScene) -> None:
    """virsh itself comes back from one of the two ways only, and has turned the guest off by then."""
    web.virsh("start", "@")
    memory = web.disks / "m1.saved"
    web.virsh("snapshot-create-as", "@", "m1", "--memspec", f"file={memory},snapshot=external")
    number = web.virsh("domid", "@")
    said = web("revert @ m1", status=UNHEALTHY)
    assert "says that it is sparse, and is not" in said.err and "virsh snapshot-revert" in said.err
    assert web.virsh("domid", "@") == number and web.show()["state"] == "running"
    web.virsh("destroy", "@")
    with pytest.raises(VirshRefusal, match="load of migration failed"):
        web.virsh("restore", memory)
    web.virsh("snapshot-revert", "@", "m1")
    assert web.virsh("domstate", "@").strip() == "running"
    web.virsh("destroy", "@")
