"""Killed at every call that changes a file, while QEMU merges: snaptree, QEMU, or both.

The guest goes on within a second, what it had flushed is there, what is kept holds what it held, and no file is over.
"""

from __future__ import annotations

import pytest
from tests.kit.points import tried
from tests.kit.stage import Stage, killed_at

STALL_SECONDS = 1.0
"""A record may take no longer, whatever is killed: a second, and what an emulated guest on a busy machine adds."""


def started_again(stage: Stage) -> None:
    """Kill QEMU, bring all in order, and let the guest go on where its disks are."""
    flushed = stage.guest.flushed()
    stage.kill_qemu()
    stage("recover web1")
    stage.sound()
    last = stage.holds("main", killed=True)
    assert min(last) >= flushed
    stage("start web1")
    stage.guest.go(at=min(last))


CYCLES = {
    # name: snapshots taken, the one that is deleted while snaptree is killed, way
    "into the tip": (1, "commit"),
    "up into the tip": (1, "pull"),
    "in the middle": (2, "commit"),
    "up in the middle": (2, "pull"),
}

JOBS = dict(zip(CYCLES, ("active commit", "pull", "commit", "pull"), strict=True))


LONG = pytest.mark.slow


@pytest.mark.parametrize(
    ("cycle", "also", "every"),
    [
        ("into the tip", "", 47),
        ("up in the middle", "qemu", 83),
        *(
            pytest.param(cycle, also, 3, marks=[LONG, pytest.mark.timeout(3600)])
            for cycle in CYCLES
            for also in ("", "qemu")
        ),
    ],
)
def test_killed_in_a_merge(stage: Stage, cycle: str, also: str, every: int) -> None:
    count, way = CYCLES[cycle]
    guest = stage.start(raw=way == "commit" and count == 2)
    lost = 0
    for when in range(1 + every // 2, 400, every):
        names = [f"s{when}-{number}" for number in range(count)]
        for name in names:
            stage(f"snapshot web1 {name}")
            guest.writes_on(20)
        wanted = {name: stage.holds(name) for name in names[1:]}
        since = guest.flushed()
        killed = killed_at(stage, when, f"delete web1 {names[0]} --merge {way}")
        guest.writes_on(20)
        assert guest.stall(since) < STALL_SECONDS
        for name, counts in wanted.items():
            assert stage.holds(name) == counts
        if also:
            started_again(stage)
        else:
            stage("recover web1")
        there = names[0] in stage.names()
        assert there <= killed
        lost += not there
        if there:
            stage(f"delete web1 {names[0]} --merge {way}")
        said = stage("gc web1").out
        guest.writes_on(20)
        assert not any("waits" in each or "recover" in each for each in stage.show()["pending"]), said
        for name, counts in wanted.items():
            assert stage.holds(name) == counts
        stage.sound()
        for name in names[1:]:
            stage(f"delete web1 {name}")
        assert len(stage.show()["layers"]) == 2
        if not killed:
            break
        tried(JOBS[cycle], "both are killed" if also else "snaptree is killed")
    else:
        raise AssertionError("it was killed to the last")
    assert lost > 1
    stage.finish()
