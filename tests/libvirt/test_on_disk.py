"""What libvirt and QEMU have written is on disk before snaptree says, or does, what rests on it."""

from __future__ import annotations

import os

import pytest
from tests.kit.domain import DomainScene, line
from tests.kit.order import Order

from snaptree.running.journal import Journal
from snaptree.store.libvirt.memory import DomainMemory

pytestmark = pytest.mark.root


def watched(patched: pytest.MonkeyPatch) -> Order:
    """What is brought to disk, and what is said to the journal and to libvirt, in its order."""
    order = Order(patched)
    order.watch(Journal, "record", "record")
    order.watch(DomainMemory, "restore", "load")
    return order


def running(web: DomainScene) -> None:
    line(web)
    web.virsh("start", "@")


@pytest.mark.parametrize(("gone", "way", "into"), [("s2", "commit", "web.s1.qcow2"), ("s3", "pull", "web.s3.qcow2")])
def test_what_was_merged(web: DomainScene, gone: str, way: str, into: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """libvirt says that a job has ended; what it has written may be in memory still, and the rest goes."""
    running(web)
    with monkeypatch.context() as patched:
        seen = watched(patched)
        web(f"delete @ {gone} --merge {way}")
    assert str(web.disks / into) in seen.before_last("record"), seen.events
    web.agree()
    web.virsh("destroy", "@")
    web.sound()


def test_memory_and_its_name(web: DomainScene, monkeypatch: pytest.MonkeyPatch) -> None:
    running(web)
    with monkeypatch.context() as patched:
        seen = watched(patched)
        web("snapshot @ m1 --memory")
    memory = web.names()["m1"]["memory"]
    folder = os.path.dirname(memory)
    made = seen.events.index(folder)
    assert memory in seen.events[made:] and folder in seen.events[made + 1 : seen.events.index("record", made)], (
        seen.events
    )
    # The memory of now is parked before the domain stops being what it was saved of.
    with monkeypatch.context() as patched:
        seen = watched(patched)
        web("revert @ m1")
    parked = web.names()["main.1"]["memory"]
    at = seen.events.index("load")
    assert parked in seen.events[:at] and folder in seen.events[seen.events.index(parked) : at], seen.events
    web.virsh("destroy", "@")
    web.sound()
