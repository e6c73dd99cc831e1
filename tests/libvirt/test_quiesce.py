"""A domain's snapshot with its guest's file systems frozen by the real agent, which libvirt talks to."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit import agent_guest, guest, images
from tests.kit.domain import DomainScene, VirshRefusal
from tests.kit.guest import Guest
from tests.kit.records import DISK_BYTES

pytestmark = pytest.mark.root
FAILED = 12


@pytest.fixture(scope="module")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return agent_guest.boot(tmp_path_factory.mktemp("domain-agent")).initramfs


@pytest.fixture
def written(domain: DomainScene, initramfs: Path) -> Iterator[Guest]:
    """The domain's guest writes lines to the file system on ``vda``, and has an agent."""
    place = domain.folder / "guest"
    place.mkdir()
    place.chmod(0o777)
    shutil.copy(guest.kernel(), place / "kernel")
    shutil.copy(initramfs, place / "initramfs")
    plain = domain.folder / "plain"
    with plain.open("wb") as file:
        file.truncate(DISK_BYTES)
    images.run("mkfs.ext4", "-q", "-F", plain)
    images.run("qemu-img", "convert", "-O", "qcow2", plain, domain.disks / "vda.qcow2")
    log = f"<log file='{place}/console.log' append='on'/>"
    console = f"<serial type='unix'><source mode='bind' path='{place}/console'/>{log}</serial>"
    channel = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
    domain.define("vda=vda.qcow2", devices=f"{console}{channel}<memballoon model='none'/>")
    text = (domain.folder / "domain.xml").read_text().replace("<memory unit='MiB'>64<", "<memory unit='MiB'>96<")
    boot = f"<kernel>{place}/kernel</kernel><initrd>{place}/initramfs</initrd>"
    boot += "<cmdline>console=ttyS0 quiet panic=1 no_timer_check</cmdline></os>"
    domain.define_xml(text.replace("</os>", boot))
    domain.virsh("start", "@")
    found = Guest(place)
    found.wait_for("W", lambda lines: any(line.startswith("W ") for line in lines), 120.0)
    yield found
    domain.be("off")


def lines(found: Guest) -> int:
    """The last line that the guest says it has written; it need not be on its disk."""
    return int([line for line in found.lines() if re.fullmatch(r"W \d+", line)][-1].split()[1])


def answers(domain: DomainScene, seconds: float = 60.0) -> None:
    """Wait until the agent answers."""
    until = time.monotonic() + seconds
    while True:
        try:
            domain.virsh("qemu-agent-command", "@", '{"execute": "guest-ping"}')
            return
        except VirshRefusal:
            assert time.monotonic() < until
            time.sleep(0.2)


def test_all_that_the_guest_has_written_is_in_the_snapshot(domain: DomainScene, written: Guest) -> None:
    answers(domain)
    said = lines(written)
    domain("snapshot @ q1 --quiesce")
    assert domain.names()["q1"]["consistency"] == "quiesced"
    written.wait_for("the guest writes on", lambda _: lines(written) > said + 5)
    point = domain.path("q1")
    plain = domain.folder / "plain"
    plain.write_bytes(images.read_unlocked([(str(point), "qcow2")]))
    assert "needs_recovery" not in images.run("dumpe2fs", "-h", plain)
    assert images.run("debugfs", "-R", "cat /log", plain).count("\n") >= said


@pytest.mark.slow
def test_an_agent_that_is_not_there(domain: DomainScene, written: Guest) -> None:
    """libvirt says so, and the guest goes on as if nothing had happened."""
    written.tell("killall qemu-ga")
    time.sleep(1)
    said = domain("snapshot @ q1 --quiesce", status=FAILED)
    assert "agent" in said.err
    assert domain.names().keys() == {"main"}
    now = lines(written)
    written.wait_for("the guest writes on", lambda _: lines(written) > now + 5)
    assert [each.name for each in domain.disks.iterdir()] == ["vda.qcow2"]
