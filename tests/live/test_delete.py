"""Deleting while the guest writes: QEMU merges, and the guest sees nothing of it."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from tests.kit.by_hand import SNAPTREE, WAYS, WHO, add, begin, by_hand, start
from tests.kit.locked import watched
from tests.kit.qmp import Qmp
from tests.kit.stage import Stage

from snaptree.qemu import live_jobs


def snapshots(stage: Stage, count: int, more: int = 60) -> dict[str, tuple[int, ...]]:
    """Take so many snapshots, with writing after each; what each holds."""
    for number in range(1, count + 1):
        stage(f"snapshot web1 s{number}")
        stage.guest.writes_on(more)
    return {f"s{number}": stage.holds(f"s{number}") for number in range(1, count + 1)}


def kept(stage: Stage, wanted: dict[str, tuple[int, ...]], *gone: str) -> None:
    """The guest has seen nothing, the snapshots that were not deleted hold what they held, no file is over."""
    stage.guest.writes_on()
    names = stage.names()
    for name, counts in wanted.items():
        assert (name in names) == (name not in gone), name
        if name not in gone:
            assert stage.holds(name) == counts, name
    # A root that was pulled up gets its name back when the machine has stopped.
    assert all("has stopped" in each for each in stage.show()["pending"])
    stage.sound()


def opened(stage: Stage) -> set[str]:
    """The files that QEMU has open as images."""
    with stage.qmp() as qmp:
        return {each["file"] for each in qmp("query-named-block-nodes", flat=True) if each["drv"] == "file"}


CASES = {
    "middle, down": ("s2", "commit", 3),
    "middle, up": ("s2", "pull", 3),
    "first, down into the root": ("s1", "commit", 3),
    "first, up; the root goes": ("s1", "pull", 3),
    "last, up into the tip": ("s3", "pull", 3),
    "last, the tip goes down": ("s3", "commit", 3),
    "only one, the tip goes down into the root": ("s1", "commit", 1),
    "only one, the root comes up into the tip": ("s1", "pull", 1),
}
LONG = pytest.mark.slow
QUICK = ("middle, down", "middle, up", "last, up into the tip", "only one, the tip goes down into the root")
"""Those that are run by default."""


@pytest.mark.parametrize("case", [each if each in QUICK else pytest.param(each, marks=LONG) for each in CASES])
def test_a_snapshot_is_deleted_while_the_guest_writes(stage: Stage, case: str) -> None:
    name, way, count = CASES[case]
    guest = stage.start(raw=way == "commit")
    wanted = snapshots(stage, count)
    plan = stage(f"delete web1 {name} --merge {way} --plan --json").json
    assert plan["estimate"] is True and plan["way"] == way
    assert plan["cancel"] == ("pauses" if way == "commit" else "undoes")

    said = stage(f"delete web1 {name} --merge {way} --json").json

    assert said["paths_after"] == plan["paths_after"]
    assert said["paths_after"]["vda"] == stage("path web1 vda").out.strip()
    kept(stage, wanted, name)
    assert len(stage.show()["layers"]) == 2 * count
    assert {path for path in opened(stage) if str(stage.disks) in path} == {
        each["path"] for each in stage.show()["layers"]
    }
    stage("snapshot web1 after")
    guest.writes_on()
    stage.finish()
    assert all(stage.holds(each) == counts for each, counts in wanted.items() if each != name)


@LONG
def test_several_at_once_and_then_all(stage: Stage) -> None:
    guest = stage.start()
    wanted = snapshots(stage, 5, 30)
    stage("delete web1 s2 s3")
    kept(stage, wanted, "s2", "s3")
    stage("delete web1 s1 s4 s5")
    kept(stage, wanted, "s1", "s2", "s3", "s4", "s5")
    shown = stage.show()
    assert [each["role"] for each in shown["layers"]] == ["tip", "tip"]
    assert {each["path"] for each in shown["layers"]} == {str(stage.disks / "vda.qcow2"), str(stage.disks / "vdb.raw")}
    guest.writes_on()
    stage.finish()


def test_the_ways_that_are_chosen_keep_the_roots_name_and_pull_into_the_tip(stage: Stage) -> None:
    stage.start(raw=False)
    snapshots(stage, 3)
    plan = stage("delete web1 s3 --plan --json").json
    assert plan["way"] == "pull" and plan["guest_pause"] == 0
    plan = stage("delete web1 s1 --plan --json").json
    assert plan["way"] == "commit" and plan["guest_pause"] == 0
    plan = stage("delete web1 s1 s2 s3 --plan --json").json
    assert plan["way"] == "commit" and 0 < plan["guest_pause"] < 0.1
    assert plan["paths_after"]["vda"] == str(stage.disks / "vda.qcow2")


@LONG
def test_merging_is_put_off_and_done_later(stage: Stage) -> None:
    guest = stage.start()
    wanted = snapshots(stage, 3)
    stage("delete web1 s2 --merge none")
    assert len(stage.show()["pending"]) == 2
    guest.writes_on()
    stage("gc web1")
    kept(stage, wanted, "s2")
    stage("delete web1 s1 --merge none")
    stage(f"squash web1 --disk vdb --top {stage.path('s3', 'vdb')}")
    stage("gc web1")
    kept(stage, wanted, "s1", "s2")
    stage.finish()


@pytest.mark.parametrize("who", WHO)
def test_a_fork_point_and_the_middle_of_another_branch(stage: Stage, who: str) -> None:
    """What the guest has not open is merged beside it, as ever; what a sibling stands on is not written to."""
    stage.make(raw=False)
    add(stage, who, "--disk vda=vda.qcow2 --disk vdb=vdb.qcow2")
    for name in ("s1", "s2", "s3"):
        stage(f"snapshot web1 {name}")
    stage("branch web1 other --from s1")
    stage("switch web1 other")
    start(stage, who)
    stage("snapshot web1 o1")
    stage.guest.writes_on()
    before = {name: stage.holds(name) for name in ("s1", "s2", "s3", "o1", "main")}

    stage("delete web1 s3")
    kept(stage, before, "s3")
    stage("delete web1 s2")
    kept(stage, before, "s2", "s3")
    stage("delete web1 s1")
    kept(stage, before, "s1", "s2", "s3")
    roles = [each["role"] for each in stage.show()["layers"]]
    assert "shared" in roles
    stage("delete web1 --branch main")
    kept(stage, before, "s1", "s2", "s3", "main")
    assert "shared" not in [each["role"] for each in stage.show()["layers"]]
    stage("delete web1 o1")
    kept(stage, before, "s1", "s2", "s3", "main", "o1")
    stage.finish()


def test_layers_of_different_sizes_wait_until_the_machine_is_off(stage: Stage) -> None:
    """QEMU's jobs would show the lower layer's bytes past the end of a shorter one."""
    guest = stage.start(raw=False)
    wanted = snapshots(stage, 2)
    with stage.qmp() as qmp:
        top = next(each["inserted"]["node-name"] for each in qmp("query-block") if "/vda/" in each["qdev"])
        qmp("block_resize", node_name=top, size=48 << 20)
    plan = stage("delete web1 s2 --plan --json").json
    assert any("different sizes" in note for note in plan["notes"])
    said = stage("delete web1 s2")
    assert "different sizes" in said.out
    guest.writes_on()
    assert stage.holds("s1") == wanted["s1"] and len(stage.show()["pending"]) == 1
    stage("stop web1")
    stage("gc web1")
    assert stage.show()["pending"] == [] and stage.holds("s1") == wanted["s1"]
    stage.sound()


def test_a_job_of_somebody_elses_is_not_disturbed(stage: Stage) -> None:
    guest = stage.start(raw=False)
    wanted = snapshots(stage, 2)
    with stage.qmp() as qmp:
        nodes = {each["file"]: each["node-name"] for each in qmp("query-named-block-nodes") if each["drv"] == "qcow2"}
        top = next(name for file, name in nodes.items() if "vda.s2" in file)
        qmp("block-stream", job_id="mine", device=top, speed=1)
    assert "the job mine of its QEMU" in stage("delete web1 s2").out
    assert "s2" not in stage.names() and stage.holds("s1") == wanted["s1"]
    with stage.qmp() as qmp:
        assert [each["id"] for each in qmp("query-jobs")] == ["mine"]
        qmp("block-job-cancel", device="mine", force=True)
    guest.writes_on()
    stage("gc web1")
    kept(stage, wanted, "s2")
    stage.finish()


@pytest.mark.parametrize("way", [each if each == "drive" else pytest.param(each, marks=LONG) for each in WAYS])
def test_layers_of_a_machine_that_somebody_started_are_merged(
    stage: Stage, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.make()
    monkeypatch.chdir(stage.disks)
    stage.guest = by_hand(stage, way)
    stage.guest.go()
    stage(f"add web1 --disk vda.qcow2 --disk vdb.raw,format=raw --qmp {stage.folder}/qmp")
    wanted = snapshots(stage, 3, 30)
    stage("delete web1 s2 --merge commit")
    kept(stage, wanted, "s2")
    stage("delete web1 s3 --merge pull")
    kept(stage, wanted, "s2", "s3")
    stage("delete web1 s1")
    kept(stage, wanted, "s1", "s2", "s3")
    with Qmp(stage.folder / "qmp") as qmp:
        files = {each["file"] for each in qmp("query-named-block-nodes", flat=True) if each["drv"] == "file"}
    assert len(files) == 2
    stage.finish()


def test_a_guest_that_outruns_a_commit_has_its_data_pulled_up(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan changes its way rather than hang; the root has its name again when the machine has stopped."""
    guest = stage.start(raw=False)
    snapshots(stage, 1, 200)
    # Whatever is not done at once counts as outrun: how fast the guest writes nobody can tell.
    monkeypatch.setattr(live_jobs, "CONVERGE_SECONDS", 0.0)
    assert "faster" in stage("delete web1 s1 --merge commit --limit 256K", status=12).err
    guest.writes_on()
    stage("snapshot web1 s2")
    assert stage("delete web1 s2 --plan --json").json["way"] == "commit"
    found = watched(monkeypatch)
    said = stage("delete web1 s2 --limit 256K --json").json
    assert len(found) > 1, "what it turns to is locked, too"
    assert any("pulled up instead" in note for note in said["notes"])
    guest.writes_on()
    stage.finish()
    assert stage.show()["pending"] == []
    assert {Path(each["path"]).name for each in stage.show()["layers"]} == {"vda.qcow2", "vdb.qcow2"}


# ---- stopped and killed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["commit", pytest.param("pull", marks=LONG)])
def test_a_deletion_is_stopped_and_goes_on(stage: Stage, way: str) -> None:
    guest = stage.start(raw=False)
    wanted = snapshots(stage, 3)
    process = stage.command(f"delete web1 s2 --merge {way} --limit 64K")
    time.sleep(3)
    guest.writes_on()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "s2" not in stage.names() and len(stage.show()["pending"]) == 2
    with stage.qmp() as qmp:
        assert qmp("query-jobs") == []
    assert stage.holds("s1") == wanted["s1"] and stage.holds("s3") == wanted["s3"]
    guest.writes_on()
    stage("gc web1")
    kept(stage, wanted, "s2")
    stage.finish()


@pytest.mark.parametrize(
    ("way", "also", "who"),
    [
        ("commit", "", SNAPTREE),
        ("pull", "qemu", SNAPTREE),
        *(pytest.param(*each, SNAPTREE, marks=LONG) for each in [("pull", ""), ("commit", "qemu")]),
        *(pytest.param(way, "restart", SNAPTREE, marks=LONG) for way in ("commit", "pull")),
        *(pytest.param("commit", also, "drive", marks=LONG) for also in ("", "qemu")),
        *(pytest.param("pull", also, "blockdev", marks=LONG) for also in ("", "qemu")),
    ],
)
def test_snaptree_is_killed_while_the_job_runs_on(stage: Stage, way: str, also: str, who: str) -> None:
    """The job is found by its name and finished; when QEMU has died too, the image files are believed."""
    begin(stage, who, raw=False)
    guest = stage.guest
    wanted = snapshots(stage, 3)
    process = stage.command(f"delete web1 s2 --merge {way} --limit 64K")
    time.sleep(3)
    process.kill()
    process.communicate()
    assert stage.holds("s1") == wanted["s1"] and stage.holds("s3") == wanted["s3"]
    if also:
        guest.writes_on()
        flushed = guest.flushed()
        stage.kill_qemu()
    else:
        with stage.qmp() as qmp:
            jobs = qmp("query-jobs")
            assert len(jobs) == 2 and all(each["id"].startswith("snaptree-") for each in jobs)
            for each in jobs:
                if each["status"] == "running":
                    qmp("block-job-set-speed", device=each["id"], speed=0)
    if also == "restart":
        stage("start web1")
        last = 0
    else:
        assert "recover" in stage.show()["pending"][0]
        stage("recover web1")
    if also == "qemu":
        last = min(stage.holds("main", killed=True))
        assert last >= flushed
        assert stage.holds("s1") == wanted["s1"] and stage.holds("s3") == wanted["s3"]
        start(stage, who, last)
    if also == "restart":
        with stage.qmp() as qmp:
            qmp("stop")
        stage("snapshot web1 again")
        last = min(stage.holds("again"))
        with stage.qmp() as qmp:
            qmp("cont")
        guest.go(at=last)
    stage("gc web1")
    kept(stage, wanted, "s2")
    stage.finish()
