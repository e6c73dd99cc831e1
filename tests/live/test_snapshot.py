"""Snapshots of a machine that runs: all disks at one instant, and the guest sees nothing of it."""

from __future__ import annotations

import pytest
from tests.kit.stage import Stage, killed_at


def test_a_snapshot_holds_what_was_written_and_the_guest_runs_on(stage: Stage) -> None:
    guest = stage.start()
    flushed = guest.writes_on()

    plan = stage("snapshot web1 s1 --plan --json").json
    assert plan["estimate"] is True and 0 < plan["guest_pause"] < 0.1
    assert [each["kind"] for each in plan["steps"]] == ["make-overlay", "make-overlay", "live-snapshot", "record"]
    said = stage("snapshot web1 s1 --json").json
    after = guest.flushed()

    assert (
        said["paths_after"]
        == {
            "vda": str(stage.disks / "vda.s1.qcow2"),
            "vdb": str(stage.disks / "vdb.s1.qcow2"),
        }
        == plan["paths_after"]
    )
    assert stage("path web1 vda").out.strip() == said["paths_after"]["vda"]
    assert stage.names()["s1"]["consistency"] == "crash"
    guest.writes_on()
    first = stage.holds("s1")
    assert flushed <= first[1] <= first[0] <= after + 100
    guest.writes_on(200)
    assert stage.holds("s1") == first
    assert "running" in stage("tree web1").out
    stage.sound()
    stage.finish()
    assert stage.holds("s1") == first


def test_two_snapshots_on_one_point_each_get_a_layer(stage: Stage) -> None:
    """A running tip counts as written: nobody can say that it was not."""
    guest = stage.start(raw=False)
    guest.hold()
    stage("snapshot web1 s1")
    stage("snapshot web1 s2")
    assert stage.holds("s1") == stage.holds("s2")
    assert stage.path("s1") != stage.path("s2")
    guest.go()
    stage.finish()


def test_a_branch_grows_from_here_while_the_guest_writes(stage: Stage) -> None:
    """It holds just a prefix, of one instant on both disks; the guest runs on, and nothing has a name there."""
    guest = stage.start()
    flushed = guest.writes_on()
    stage("branch web1 other")
    guest.writes_on()
    first = stage.holds("other")
    assert flushed <= min(first) and set(stage.names()) == {"main", "other"}
    guest.writes_on()
    assert stage.holds("other") == first
    shared = [each for each in stage.show()["layers"] if each["role"] == "shared"]
    assert len(shared) == 2
    stage("delete web1 --branch other")
    guest.writes_on()
    stage("gc web1")
    assert len(stage.show()["layers"]) == 2
    stage.finish()


def test_an_excluded_disk_goes_on_in_its_file(stage: Stage) -> None:
    guest = stage.start()
    stage("snapshot web1 s1 --exclude vdb --file vda=mine.qcow2 --description 'before it'")
    assert stage.path("main", "vda").name == "mine.qcow2" and stage.path("main", "vdb").name == "vdb.raw"
    assert set(stage.names()["s1"]["points"]) == {"vda"}
    guest.writes_on()
    stage("snapshot web1 s2")
    assert stage.holds("s1")[0] < stage.holds("s2")[0]
    stage.finish()


def test_a_paused_machine_stays_paused(stage: Stage) -> None:
    guest = stage.start()
    with stage.qmp() as qmp:
        qmp("stop")
    stage("snapshot web1 s1")
    assert stage.show()["state"] == "paused"
    with stage.qmp() as qmp:
        qmp("cont")
    guest.writes_on()
    stage.finish()


def test_what_is_not_done_while_it_runs_is_refused(stage: Stage) -> None:
    guest = stage.start()
    stage("snapshot web1 s1")
    before = stage.files()
    assert "is running" in stage("remove web1", status=6).err
    stage("snapshot web1 s1", status=4)
    stage("snapshot web1 s3 --file vda=vda.qcow2", status=4)
    stage("rename web1 s1 s0")
    assert stage.files() == before
    guest.writes_on()
    stage.finish()


def test_qemu_refuses_and_nothing_is_left(stage: Stage) -> None:
    """A block device of the guest's that a job holds cannot be frozen."""
    guest = stage.start(raw=False)
    with stage.qmp() as qmp:
        top = next(each["inserted"]["node-name"] for each in qmp("query-block") if "/vdb/" in each["qdev"])
        target = {"driver": "null-co", "node-name": "nothing", "size": 32 << 20, "read-zeroes": True}
        qmp("blockdev-add", **target)
        qmp("blockdev-mirror", job_id="mine", device=top, target="nothing", sync="full", speed=4096)
    before = stage.files()
    said = stage("snapshot web1 s1", status=12)
    assert "refused transaction" in said.err
    assert stage.files() == before and "s1" not in stage.names()
    assert stage.show()["pending"] == []
    with stage.qmp() as qmp:
        assert not [each for each in qmp("query-named-block-nodes", flat=True) if each["file"].endswith(".s1.qcow2")]
        qmp("block-job-cancel", device="mine", force=True)
    guest.writes_on()
    stage("snapshot web1 s1")
    stage.finish()


# ---- kills --------------------------------------------------------------------------------------------------------


def _points(every: int) -> range:
    return range(1, 200, every)


@pytest.mark.parametrize("every", [29, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_snaptree_killed_in_a_snapshot(stage: Stage, every: int) -> None:
    """The guest runs on; the snapshot is there or not, on all disks, and no file is over."""
    guest = stage.start()
    taken, lost = [], 0
    for when in _points(every):
        name = f"s{when}"
        killed = killed_at(stage, when, f"snapshot web1 {name}")
        guest.writes_on(10)
        stage("recover web1")
        there = name in stage.names()
        assert there or killed
        taken += [name] if there else []
        lost += not there
        assert stage.show()["pending"] == []
        stage.sound()
        guest.writes_on(10)
        if not killed:
            break
    else:
        raise AssertionError("it was killed to the last")
    assert len(taken) > 1 and lost > 1
    counts = [stage.holds(name) for name in taken]
    assert counts == sorted(counts)
    stage.finish()


@pytest.mark.parametrize("every", [43, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_snaptree_and_qemu_killed_in_a_snapshot(stage: Stage, every: int) -> None:
    """The image files are believed: what the guest had flushed is there, whichever file it wrote to last."""
    guest = stage.start()
    for when in _points(every):
        name = f"s{when}"
        killed = killed_at(stage, when, f"snapshot web1 {name}")
        guest.writes_on(10)
        flushed = guest.flushed()
        stage.kill_qemu()
        stage("recover web1")
        assert stage.show()["state"] == "off" and stage.show()["pending"] == []
        stage.sound()
        last = stage.holds("main", killed=True)
        assert min(last) >= flushed
        if name in stage.names():
            assert stage.holds(name) <= last
        stage("start web1")
        guest.go(at=min(last))
        if not killed:
            break
    stage.finish()
