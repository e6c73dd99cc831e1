"""Internal snapshots of a machine whose guest writes all the while: taken, deleted, gone back to, killed between."""

from __future__ import annotations

import dataclasses

import pytest
from tests.kit.by_hand import WHO, begin
from tests.kit.points import tried
from tests.kit.stage import Stage, killed_around, killed_at, processes_of
from tests.live.test_memory import cancelled

from snaptree.images.facts import read_facts
from snaptree.qemu import memory

STALL_SECONDS = 2.0
"""A record may take no longer, whatever is killed: a second, and what an emulated guest on a busy machine adds."""
LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture
def lasting(stage: Stage) -> Stage:
    """The stage, with a console whose log goes on when the guest goes over to another QEMU."""
    stage.boot = dataclasses.replace(stage.boot, append=True)
    return stage


def tags(stage: Stage) -> set[str]:
    """All internal snapshots that the machine's files have."""
    paths = [each["path"] for each in stage.show()["layers"] if each["format"] == "qcow2"]
    return {each.name for path in paths for each in read_facts(path, "qcow2").internals}


# ---- taking and deleting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("raw", [True, pytest.param(False, marks=LONG)], ids=["mixed", "internal"])
def test_all_disks_are_of_one_instant(stage: Stage, who: str, *, raw: bool) -> None:
    """B11: what cannot hold internal snapshots gets an external point in the same transaction."""
    begin(stage, who, raw=raw)
    guest = stage.guest
    held = {}
    for number in range(6):
        since = guest.writes_on(20)
        stage(f"snapshot web1 s{number} --internal")
        after = guest.flushed()
        held[f"s{number}"] = stage.holds(f"s{number}")
        assert since <= held[f"s{number}"][-1] <= held[f"s{number}"][0] <= after + 100
        guest.writes_on(20)
        assert guest.stall(since) < STALL_SECONDS
    # Afterwards the raw disk goes on in a file that can hold them.
    assert [stage.names()[name]["kind"] for name in ("s0", "s5")] == ["mixed" if raw else "internal", "internal"]
    assert len(stage.show()["layers"]) == (3 if raw else 2)
    stage("delete web1 s1 s2 s4")
    guest.writes_on()
    for name in ("s0", "s3", "s5"):
        assert stage.holds(name) == held[name]
    assert tags(stage) == {"s0", "s3", "s5"}
    stage.sound()
    stage.finish()
    for name in ("s0", "s3", "s5"):
        assert stage.holds(name) == held[name]


@pytest.mark.parametrize("who", WHO)
def test_those_beneath_overlays_are_deleted_while_the_guest_writes(stage: Stage, who: str) -> None:
    """B7, two levels down; then what is loose goes down beside the one that stays."""
    begin(stage, who, raw=False)
    guest = stage.guest
    for name, words in (("i1", "--internal"), ("i2", "--internal"), ("s1", ""), ("i3", "--internal"), ("s2", "")):
        stage(f"snapshot web1 {name} {words}")
        guest.writes_on(20)
    held = {name: stage.holds(name) for name in ("i1", "i2", "s1", "i3", "s2")}
    for name in ("i3", "i1"):
        since = guest.flushed()
        stage(f"delete web1 {name}")
        guest.writes_on()
        assert guest.stall(since) < STALL_SECONDS
        del held[name]
        assert {each: stage.holds(each) for each in held} == held
        stage.sound()
    stage("delete web1 s1 s2")
    guest.writes_on()
    assert stage.holds("i2") == held["i2"]
    assert stage.files() == {"vda.qcow2", "vdb.qcow2"}
    stage.sound()
    stage.finish()
    assert stage.holds("i2") == held["i2"] and tags(stage) == {"i2"}


def test_going_back_and_to_and_fro(stage: Stage) -> None:
    """Without memory the machine is started again: within the tip, then on a branch made of the point."""
    guest = stage.start(raw=False)
    guest.writes_on()
    stage("snapshot web1 i1 --internal")
    first = stage.holds("i1")
    flushed = guest.writes_on(100)
    stage("branch web1 other --from i1")
    assert stage.holds("other") == first
    stage("revert web1 i1")
    assert stage.show()["state"] == "running" and stage.holds("main.1")[1] >= flushed
    guest.go(at=first[1])
    stage("switch web1 other")
    guest.go(at=first[1])
    stage("delete web1 --branch main.1")
    stage("delete web1 i1")
    guest.writes_on()
    assert tags(stage) == set()
    stage.finish()


# ---- with memory --------------------------------------------------------------------------------------------------


def test_memory_and_internal_points_are_of_the_same_record(lasting: Stage) -> None:
    stage = lasting
    guest = stage.start(raw=False)
    guest.writes_on()
    with guest.heard() as waits:
        said = stage("snapshot web1 s1 --internal --memory --json").json
        guest.writes_on(100)
    assert 0 < said["guest_pause"] < 1
    assert max(waits) < STALL_SECONDS
    first = stage.holds("s1")
    assert len(stage.show()["layers"]) == 2 and stage.names()["s1"]["kind"] == "internal"

    stage("revert web1 s1 --paused")
    assert len(processes_of(stage.folder)) == 1
    stage.agree("s1", stage.monitor)
    parked = stage.holds("main.1")
    assert parked > first and stage.holds("s1") == first
    with stage.qmp() as qmp:
        qmp("cont")
    guest.went_over()
    guest.writes_on()
    stage.sound()

    stage("switch web1 main.1 --paused")
    stage.agree_with(parked, stage.monitor)
    with stage.qmp() as qmp:
        qmp("cont")
    guest.went_over()
    stage("delete web1 s1")
    stage("delete web1 --branch main")
    guest.writes_on()
    assert stage.files() == {"vda.qcow2", "vdb.qcow2"} and tags(stage) == set()
    stage.finish()


def test_mixed_points_with_memory(lasting: Stage) -> None:
    stage = lasting
    guest = stage.start()
    guest.writes_on()
    stage("snapshot web1 s1 --internal --memory")
    guest.writes_on(100)
    first = stage.holds("s1")
    stage("revert web1 s1 --discard --delete --paused")
    stage.agree_with(first, stage.monitor)
    with stage.qmp() as qmp:
        qmp("cont")
    guest.went_over()
    # A QEMU that has loaded and not run yet merges nothing.
    stage("gc web1")
    assert set(stage.names()) == {"main"} and len(stage.show()["layers"]) == 2
    guest.writes_on()
    stage.finish()


@pytest.mark.parametrize("raw", [True, pytest.param(False, marks=LONG)], ids=["mixed", "internal"])
def test_memory_that_is_not_saved_leaves_no_internal_point(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, *, raw: bool
) -> None:
    guest = stage.start(raw=raw)
    guest.writes_on()
    before = stage.files()
    with monkeypatch.context() as patched:
        patched.setattr(memory, "until_done", cancelled)
        stage("snapshot web1 s1 --internal --memory", status=130)
    assert stage.files() == before and tags(stage) == set()
    assert "s1" not in stage.names() and stage.show()["pending"] == []
    guest.writes_on()
    stage("snapshot web1 s1 --internal --memory")
    stage.finish()


# ---- killed -------------------------------------------------------------------------------------------------------


def require_right(stage: Stage, name: str) -> bool:
    """See that the snapshot is there or not, with all that belongs to it, and that nothing is left to do; whether."""
    stage("recover web1")
    stage("gc web1")
    assert stage.show()["pending"] == []
    stage.sound()
    there = name in stage.names()
    assert (name in tags(stage)) == there
    return there


@pytest.mark.parametrize("every", [53, pytest.param(1, marks=LONG)])
@pytest.mark.parametrize("also", [pytest.param("", marks=LONG), "qemu"])
def test_killed_while_one_is_taken_and_deleted(stage: Stage, also: str, every: int) -> None:
    guest = stage.start()
    known = dict[str, tuple[int, ...]]()
    for when in range(1 + every // 2, 200, every):
        name, ended = f"s{when}", 0
        for line in (f"snapshot web1 {name} --internal", f"delete web1 {name}"):
            if line.startswith("delete") and name not in stage.names():
                stage(f"snapshot web1 {name} --internal")
            since = guest.flushed()
            killed = killed_at(stage, when, line)
            ended += not killed
            guest.writes_on(10)
            assert guest.stall(since) < STALL_SECONDS
            if also:
                flushed = guest.flushed()
                stage.kill_qemu()
            there = require_right(stage, name)
            if also:
                last = min(stage.holds("main", killed=True))
                assert last >= flushed
                stage("start web1")
                guest.go(at=last)
            guest.writes_on(10)
            if there and name not in known:
                known[name] = stage.holds(name)
            elif not there:
                known.pop(name, None)
            assert {each: stage.holds(each) for each in known} == known
            job = "internal snapshot taken" if line.startswith("snapshot") else "internal snapshot deleted"
            tried(job, "both are killed" if also else "snaptree is killed", int(killed))
        if ended == 2:
            break
    else:
        raise AssertionError("it was killed to the last")
    if not also:
        stage.finish()


@pytest.mark.parametrize(
    ("command", "before", "there"),
    [
        ("transaction", True, False),
        ("transaction", False, False),
        ("cont", False, False),
        pytest.param("remove-fd", True, True, marks=LONG),
    ],
)
def test_killed_while_memory_is_saved_beside_internal_points(
    stage: Stage, command: str, *, before: bool, there: bool
) -> None:
    """The guest goes on within a second, and the points are there with their memory or not at all."""
    guest = stage.start(raw=False)
    guest.writes_on()
    with guest.heard() as waits:
        killed_around(stage, command, before=before, line="snapshot web1 s1 --internal --memory")
        guest.writes_on()
    assert max(waits) < STALL_SECONDS
    assert require_right(stage, "s1") == there
    guest.writes_on()
    stage("snapshot web1 s2 --internal --memory")
    stage.finish()
