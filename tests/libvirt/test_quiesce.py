"""A domain's snapshot with its guest's file systems frozen by the real agent, which libvirt talks to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit import agent_guest, images
from tests.kit.domain import DomainScene, VirshRefusal
from tests.kit.domain_guest import booting
from tests.kit.guest import Guest

pytestmark = pytest.mark.root
FAILED = 12


@pytest.fixture(scope="module")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return agent_guest.boot(tmp_path_factory.mktemp("domain-agent")).initramfs


@pytest.fixture
def written(domain: DomainScene, initramfs: Path) -> Iterator[Guest]:
    """The domain's guest writes lines to the file system on ``vda``, and has an agent."""
    agent_guest.formatted(domain.disks / "vda.qcow2")
    channel = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
    found = booting(domain, initramfs, "vda=vda.qcow2", devices=channel)
    domain.virsh("start", "@")
    found.wait_for("W", lambda lines: any(line.startswith("W ") for line in lines), 120.0)
    yield found
    domain.be("off")


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
    said = agent_guest.written_lines(written)
    domain("snapshot @ q1 --quiesce")
    assert domain.names()["q1"]["consistency"] == "quiesced"
    written.wait_for("the guest writes on", lambda _: agent_guest.written_lines(written) > said + 5)
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
    now = agent_guest.written_lines(written)
    written.wait_for("the guest writes on", lambda _: agent_guest.written_lines(written) > now + 5)
    assert [each.name for each in domain.disks.iterdir()] == ["vda.qcow2"]
