"""A Linux guest in a domain writes all the while: what its snapshots hold is of one instant, and nothing is lost."""

from __future__ import annotations

import signal
import time

import pytest
from tests.kit.domain_guest import Written

pytestmark = [pytest.mark.root, pytest.mark.slow]


def test_snapshots_are_taken_and_deleted_under_a_guest_that_writes(written: Written) -> None:
    web = written.web
    written.start()
    kept: dict[str, tuple[int, ...]] = {}
    for number in range(1, 5):
        web(f"snapshot @ s{number}")
        kept[f"s{number}"] = written.holds(f"s{number}")
        written.guest.writes_on()
    assert list(kept.values()) == sorted(kept.values())
    for gone in ("s2", "s1", "s4"):
        web(f"delete @ {gone}")
        del kept[gone]
        written.guest.writes_on()
        assert {name: written.holds(name) for name in kept} == kept
        web.agree()
    web("delete @ s3")
    written.guest.writes_on()
    last = written.guest.hold()
    web.virsh("destroy", "@")
    assert web.files() == {"vda.qcow2", "vdb.raw"}
    assert min(written.holds("main")) >= written.guest.flushed() and max(written.holds("main")) <= last + 1
    web.forgiven.add("leaks")
    web.sound()


@pytest.mark.parametrize("after", [0.2, 1.0, 2.5])
@pytest.mark.parametrize("what", ["middle", "tip"])
def test_snaptree_is_killed_while_libvirt_merges(written: Written, what: str, after: float) -> None:
    web = written.web
    written.start()
    for number in (1, 2, 3):
        web(f"snapshot @ s{number}")
        written.guest.writes_on(200)
    kept = {name: written.holds(name) for name in ("s1", "s2", "s3")}
    gone = "s2" if what == "middle" else "s3"
    process = written.web.command(f"delete @ {gone} --limit 2MiB/s")
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    written.guest.writes_on()
    web("recover @")
    web("gc @")
    written.guest.writes_on()
    for name in kept:
        if name in web.names():
            assert written.holds(name) == kept[name]
    web.agree()
    web.virsh("destroy", "@")
    assert min(written.holds("main")) >= written.guest.flushed()
    web.forgiven.add("leaks")
    web.sound()
