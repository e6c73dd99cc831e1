"""What libvirt and QEMU have written is on disk before snaptree says, or does, what rests on it."""

from __future__ import annotations

import os
from typing import Any

import pytest
from tests.kit.domain import DomainScene

from snaptree.running.journal import Journal
from snaptree.store.libvirt.memory import DomainMemory

pytestmark = pytest.mark.root


class Seen:
    """What is brought to disk, and what is said to the journal and to libvirt, in its order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        fsync, record, restore = os.fsync, Journal.record, DomainMemory.restore

        def syncing(descriptor: int) -> None:
            fsync(descriptor)
            self.events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

        def recording(self_: Journal, *words: Any) -> None:
            self.events.append("record")
            record(self_, *words)

        def restoring(self_: DomainMemory, *words: Any) -> None:
            self.events.append("load")
            restore(self_, *words)

        monkeypatch.setattr(os, "fsync", syncing)
        monkeypatch.setattr(Journal, "record", recording)
        monkeypatch.setattr(DomainMemory, "restore", restoring)

    def before(self, event: str, file: str) -> bool:
        """Whether the file was brought to disk before the last of the events."""
        end = len(self.events) - 1 - self.events[::-1].index(event)
        return file in self.events[:end]


def running(web: DomainScene) -> None:
    for number in (1, 2, 3):
        web(f"snapshot @ s{number}")
        web.write("." * number + str(number))
    web.virsh("start", "@")


@pytest.mark.parametrize(("gone", "way", "into"), [("s2", "commit", "web.s1.qcow2"), ("s3", "pull", "web.s3.qcow2")])
def test_what_was_merged(web: DomainScene, gone: str, way: str, into: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """libvirt says that a job has ended; what it has written may be in memory still, and the rest goes."""
    running(web)
    with monkeypatch.context() as patched:
        seen = Seen(patched)
        web(f"delete @ {gone} --merge {way}")
    assert seen.before("record", into), seen.events
    web.agree()
    web.virsh("destroy", "@")
    web.sound()


def test_memory_and_its_name(web: DomainScene, monkeypatch: pytest.MonkeyPatch) -> None:
    running(web)
    with monkeypatch.context() as patched:
        seen = Seen(patched)
        web("snapshot @ m1 --memory")
    memory = web.names()["m1"]["memory"]
    name, folder = os.path.basename(memory), os.path.basename(os.path.dirname(memory))
    made = seen.events.index(folder)
    assert name in seen.events[made:] and folder in seen.events[made + 1 : seen.events.index("record", made)], (
        seen.events
    )
    # The memory of now is parked before the domain stops being what it was saved of.
    with monkeypatch.context() as patched:
        seen = Seen(patched)
        web("revert @ m1")
    parked = os.path.basename(web.names()["main.1"]["memory"])
    at = seen.events.index("load")
    assert parked in seen.events[:at] and folder in seen.events[seen.events.index(parked) : at], seen.events
    web.virsh("destroy", "@")
    web.sound()
