"""The rows of FEATURES A1 to A8, B1 to B14 and C1 to C13 for a machine that runs.

Each has its test here, named after it, or is named with the test that has it anyway. What holds in all of them: the
guest runs on, has seen no I/O error, and all that it has flushed is there; each snapshot holds just a prefix.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit import guest, images
from tests.kit.by_hand import SNAPTREE, WHO, add, begin, start
from tests.kit.firm import Flash
from tests.kit.images import MiB
from tests.kit.records import DISK_BYTES, read_records
from tests.kit.space import filled, mounted
from tests.kit.stage import Stage
from tests.live.test_delete import kept, snapshots
from tests.live.test_disks import plug, unplug

LONG = pytest.mark.slow
SEABIOS = Path("/usr/share/seabios/bios-256k.bin")
TESTS = Path(__file__).parents[1]
ELSEWHERE = {
    "a2": "live/test_delete.py::test_a_snapshot_is_deleted_while_the_guest_writes",
    "a3": "live/test_memory_going_back.py::test_without_its_memory",
    "a4": "live/test_going_back.py::test_going_back_and_dropping_the_work_of_now",
    "a5": "live/test_memory_going_back.py::test_going_back_to_the_instant_and_deleting_it",
    "a6": "live/test_memory_going_back.py::test_branches_of_an_instant",
    "b1": "live/test_delete.py::test_a_fork_point_and_the_middle_of_another_branch",
    "b3": "live/test_delete.py::test_a_fork_point_and_the_middle_of_another_branch",
    "b7": "live/test_internal.py::test_those_beneath_overlays_are_deleted_while_the_guest_writes",
    "b9": "live/test_delete.py::test_snaptree_is_killed_while_the_job_runs_on",
    "b11": "live/test_internal.py::test_all_disks_are_of_one_instant",
    "c5": "live/test_memory_going_back.py::test_a_memory_file_that_is_not_what_it_was",
    "c6": "live/test_memory_going_back.py::test_without_its_memory",
    "c9": "live/test_steering.py::test_cancelled",
    "c12": "live/test_going_back.py::test_going_back_parks_the_work_of_now_and_the_machine_runs_on_the_old_disks",
}
NOT_RUNNING = {"c10": "it is of a machine that is off"}
"""Rows that are not a running machine's, and why."""


BY_A_PERSON = {
    "a2": "live/test_delete.py::test_layers_of_a_machine_that_somebody_started_are_merged",
    "b1": "live/test_delete.py::test_a_fork_point_and_the_middle_of_another_branch",
    "b3": "live/test_delete.py::test_a_fork_point_and_the_middle_of_another_branch",
    "b7": "live/test_internal.py::test_those_beneath_overlays_are_deleted_while_the_guest_writes",
    "b9": "live/test_delete.py::test_snaptree_is_killed_while_the_job_runs_on",
    "b11": "live/test_internal.py::test_all_disks_are_of_one_instant",
    "c9": "live/test_steering.py::test_cancelled",
}
"""The tests elsewhere in which a person has started the machine as well."""
BY_SNAPTREE = {"a5", "c5", "c10"}
"""Rows for which snaptree starts the machine: it loads memory, or does not run."""


def test_every_row_is_tried_with_a_machine_that_a_person_started_where_it_can_be() -> None:
    here = set[str]()
    for name, test in globals().items():
        if name.startswith("test_") and "who" in inspect.signature(test).parameters:
            here |= set(re.findall(r"(?<=_)([abc]\d+)(?=_)", name))
    assert not here & BY_SNAPTREE and here | set(BY_A_PERSON) | BY_SNAPTREE == rows_of_the_list()
    for where in BY_A_PERSON.values():
        file, _, name = where.partition("::")
        (test,) = [each for each in ast.parse((TESTS / file).read_text()).body if getattr(each, "name", "") == name]
        assert {"who", "way"} & {word.arg for word in ast.walk(test) if isinstance(word, ast.arg)}, where


def rows_of_the_list() -> set[str]:
    return {f"{part}{number}" for part, last in (("a", 8), ("b", 14), ("c", 13)) for number in range(1, last + 1)}


def test_every_row_has_its_test() -> None:
    here = {match for name in globals() for match in re.findall(r"(?<=_)([abc]\d+)(?=_)", name)}
    assert here | set(ELSEWHERE) | set(NOT_RUNNING) == rows_of_the_list()
    for where in ELSEWHERE.values():
        file, _, name = where.partition("::")
        parsed = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert name in {each.name for each in parsed.body if isinstance(each, ast.FunctionDef)}, where


@pytest.fixture
def lasting(stage: Stage) -> Stage:
    """The stage, with a console whose log goes on when the guest goes over to another QEMU."""
    stage.boot = dataclasses.replace(stage.boot, append=True)
    return stage


@pytest.fixture(params=WHO)
def who(request: pytest.FixtureRequest) -> str:
    """Who starts the machine."""
    return str(request.param)


# ---- A ------------------------------------------------------------------------------------------------------------


def test_a1_b8_the_name_goes_and_the_files_stay_until_gc(stage: Stage, who: str) -> None:
    """What others have left beside is named by gc, and never touched."""
    begin(stage, who)
    wanted = snapshots(stage, 3)
    files = stage.files()
    plan = stage("delete web1 s2 --merge none --plan --json").json
    assert plan["bytes_to_copy"] == 0 and plan["way"] is None
    stage("delete web1 s2 --merge none")
    assert stage.files() == files and len(stage.show()["pending"]) == 2
    stage.guest.writes_on()
    root = stage.path("s1", "vda")
    left = images.create(stage.disks / "byhand.qcow2", DISK_BYTES, backing=(root, "qcow2"))
    stage.left.add(left)
    before, content = images.read_unlocked([(str(root), "qcow2")]), left.read_bytes()

    stage("delete web1 s1")
    stage.guest.writes_on()

    assert images.read_unlocked([(str(root), "qcow2")]) == before, "somebody else's overlay stands on it"
    assert left.read_bytes() == content and str(left) in stage("gc web1").out
    assert stage.holds("s3") == wanted["s3"]
    assert len([each for each in stage.show()["layers"] if each["disk"] == "vdb"]) == 2
    left.unlink()
    stage.left.clear()
    stage("delete web1 s3")
    stage("gc web1")
    kept(stage, wanted, "s1", "s2", "s3")
    assert len(stage.show()["layers"]) == 2
    stage.finish()


@pytest.mark.parametrize("who", WHO[1:])
def test_a3_c6_memory_that_is_no_longer_wanted(stage: Stage, who: str) -> None:
    """Snaptree cannot load it, but everything else is as it is of a machine that it has started."""
    begin(stage, who, raw=False)
    stage("snapshot web1 m --memory")
    wanted = stage.holds("m")
    (memory,) = (path for path in stage.disks.iterdir() if path.suffix == ".memory")
    stage.guest.writes_on()
    assert "you start" in stage("revert web1 m", status=6).err
    stage.guest.writes_on()
    stage("delete web1 m --memory-only")
    assert not memory.exists() and stage.names()["m"]["memory"] is None and stage.holds("m") == wanted
    stage.guest.writes_on()
    stage.kill_qemu()
    stage("revert web1 m")
    start(stage, who, min(wanted))
    assert stage.holds("m") == wanted and stage.holds("main.1", killed=True) > wanted
    stage.finish()


@pytest.mark.parametrize("who", WHO[1:])
def test_a6_two_lines_of_a_machine_that_its_user_turns_off_to_switch(stage: Stage, who: str) -> None:
    begin(stage, who, raw=False)
    stage("snapshot web1 fork")
    first = stage.holds("fork")
    stage("branch web1 feature --from fork --file vda=feature-a.qcow2 --file vdb=feature-b.qcow2")
    assert {stage.path("feature", disk).name for disk in guest.DISKS} == {"feature-a.qcow2", "feature-b.qcow2"}
    stage.guest.writes_on()
    stage.kill_qemu()
    main = stage.holds("main", killed=True)
    stage("switch web1 feature")
    start(stage, who, min(first))
    assert stage.holds("main", killed=True) == main and stage.holds("fork") == first
    stage.kill_qemu()
    feature = stage.holds("feature", killed=True)
    stage("switch web1 main")
    start(stage, who, min(main))
    assert stage.holds("feature", killed=True) == feature > first
    stage.finish()


def merged_into_each(stage: Stage, words: str = "") -> tuple[int, ...]:
    """A fork with three lines, which is then pulled up into each of them; what it held."""
    stage(f"snapshot web1 fork {words}")
    first = stage.holds("fork")
    stage.guest.writes_on()
    for name in ("other", "third"):
        stage(f"branch web1 {name} --from fork")
    stage("delete web1 fork --merge pull")
    stage.guest.writes_on()
    assert stage.holds("other") == stage.holds("third") == first
    assert "shared" not in {each["role"] for each in stage.show()["layers"]}, "each has got its own copy"
    return first


@LONG
def test_a7_the_fork_goes_when_the_last_line_goes(lasting: Stage) -> None:
    """No sibling's layer is committed into; layers and the memory go with the last that needs them."""
    stage = lasting
    stage.start(raw=False)
    first = merged_into_each(stage, "--memory")
    assert "web1.fork.memory" in stage.files()
    stage("delete web1 --branch third")
    stage("switch web1 other")
    stage.guest.went_over()
    stage.guest.writes_on()
    assert "web1.fork.memory" not in stage.files() and stage.holds("main") > first
    stage("delete web1 --branch main")
    stage.guest.writes_on()
    assert len(stage.show()["layers"]) == 2 and not [each for each in stage.files() if each.endswith(".memory")]
    stage.finish()


@pytest.mark.parametrize("who", WHO[1:])
def test_a7_forks_of_a_machine_that_its_user_turns_off_to_switch(stage: Stage, who: str) -> None:
    begin(stage, who, raw=False)
    first = merged_into_each(stage)
    stage("delete web1 --branch third")
    assert "you start" in stage("switch web1 other", status=6).err
    stage.guest.writes_on()
    stage.kill_qemu()
    stage("switch web1 other")
    start(stage, who, min(first))
    assert stage.holds("main", killed=True) > first
    stage("delete web1 --branch main")
    stage.guest.writes_on()
    assert len(stage.show()["layers"]) == 2
    stage.finish()


def test_a8_a_chain_without_snapshots_is_squashed(stage: Stage, who: str) -> None:
    for disk in guest.DISKS:
        below = None
        for name in ("root", "middle", "top"):
            path = stage.disks / f"{disk}.{name}.qcow2"
            below = images.create(path, DISK_BYTES, backing=None if below is None else (below, "qcow2"))
    words = " ".join(f"--disk {disk}={disk}.top.qcow2" for disk in guest.DISKS)
    add(stage, who, f"--adopt {words}")
    start(stage, who)
    stage.guest.writes_on()
    stage(f"squash web1 --disk vda --top {stage.disks}/vda.middle.qcow2 --base {stage.disks}/vda.root.qcow2")
    stage.guest.writes_on()
    for disk in guest.DISKS:
        stage(f"squash web1 --disk {disk}")
        stage.guest.writes_on()
    assert len(stage.show()["layers"]) == 2
    stage("snapshot web1 kept")
    stage.guest.writes_on()
    assert "'kept' needs it" in stage("squash web1 --disk vda", status=6).err
    stage.finish()


# ---- B ------------------------------------------------------------------------------------------------------------


def test_b2_b12_c1_gone_back_twice_and_deleted_in_the_middle(lasting: Stage) -> None:
    """No order of going back and deleting loses a file, nor do two within a second."""
    stage = lasting
    stage.start(raw=False)
    stage("snapshot web1 s1 --memory")
    stage.guest.writes_on()
    stage("snapshot web1 s2")
    stage.guest.writes_on()
    wanted = {name: stage.holds(name) for name in ("s1", "s2")}
    for _ in range(2):
        stage("revert web1 s1")
        stage.guest.went_over()
        stage.guest.writes_on(8)
    wanted |= {name: stage.holds(name) for name in ("main.1", "main.2")}
    assert wanted["s1"] < wanted["main.2"] and wanted["s2"] < wanted["main.1"]
    stage("delete web1 s1")
    kept(stage, wanted, "s1")
    stage("revert web1 s2 --discard")
    stage.guest.go(at=min(wanted["s2"]))
    stage("delete web1 s2")
    kept(stage, wanted, "s1", "s2")
    stage("delete web1 --branch main.1")
    stage("delete web1 --branch main.2")
    kept(stage, wanted, *wanted)
    assert len(stage.show()["layers"]) == 2
    stage.forgiven.add("leaks")
    stage.finish()


def test_b4_a_snapshot_and_all_that_grew_from_it(stage: Stage, who: str) -> None:
    begin(stage, who)
    wanted = snapshots(stage, 4, 30)
    stage("branch web1 other --from s3")
    stage("delete web1 s2 --children-only --with-branches")
    kept(stage, wanted, "s3", "s4")
    assert set(stage.names()) == {"s1", "s2", "main"}
    stage("delete web1 s1 --children")
    kept(stage, wanted, *wanted)
    assert len(stage.show()["layers"]) == 2
    assert stage.path("main", "vda").name == "vda.qcow2"
    stage.finish()


def test_b5_external_and_internal_children(stage: Stage, who: str) -> None:
    begin(stage, who, raw=False)
    wanted = {}
    for name, words in (("s1", ""), ("i2", "--internal"), ("s3", ""), ("i4", "--internal")):
        stage(f"snapshot web1 {name} {words}")
        stage.guest.writes_on(30)
        wanted[name] = stage.holds(name)
    assert list(wanted.values()) == sorted(wanted.values())
    stage("delete web1 i2 --children-only")
    kept(stage, wanted, "s3", "i4")
    stage("delete web1 s1 --children")
    kept(stage, wanted, *wanted)
    assert len(stage.show()["layers"]) == 2
    stage.finish()


@LONG
def test_b6_an_external_one_that_has_an_internal_parent(stage: Stage, who: str) -> None:
    """What the guest writes goes down into the layer that has it, which shows it as before."""
    stage.make(raw=False)
    add(stage, who, "--disk vda=vda.qcow2 --disk vdb=vdb.qcow2")
    stage("snapshot web1 inner --internal")
    start(stage, who)
    wanted = snapshots(stage, 2)
    stage("delete web1 s1 --merge commit")
    kept(stage, {"s2": wanted["s2"]})
    stage("delete web1 s2")
    kept(stage, {})
    stage.finish()
    assert stage.names()["inner"]["points"]["vda"]["path"] == str(stage.path("main", "vda"))
    content = images.read(stage.path("inner", "vda"), "qcow2", "inner")
    assert read_records(content, 0).prefix == 0


@LONG
def test_b10_a_disk_that_is_no_longer_there(stage: Stage, who: str) -> None:
    """It is plugged in and unplugged while the guest writes to the others."""
    stage.boot = dataclasses.replace(stage.boot, more=("-device", "virtio-scsi-pci,id=scsi,addr=0x8"))
    begin(stage, who, raw=False)
    disk = images.create(stage.disks / "vdc.qcow2", 32 * MiB)
    with stage.qmp() as qmp:
        plug(qmp, str(disk))
    stage(f"disk attach web1 vdc={disk}")
    wanted = snapshots(stage, 2)
    with stage.qmp() as qmp:
        unplug(qmp)
    stage("disk detach web1 vdc")
    with stage.qmp() as qmp:
        # What snaptree had opened of it is closed; the node that it was plugged in with is its user's.
        assert not [each for each in qmp("query-named-block-nodes", flat=True) if "vdc.s" in each["file"]]
        qmp("blockdev-del", node_name="n-vdc")
    stage.guest.writes_on()
    assert set(stage.names()["s1"]["points"]) == {"vda", "vdb", "vdc"}
    stage("delete web1 s1")
    stage.guest.writes_on()
    assert stage.holds("s2") == wanted["s2"]
    stage("delete web1 s2")
    stage("delete web1 --branch main-vdc")
    stage.finish()
    stage("gc web1")
    assert {each for each in stage.files() if each.startswith("vd")} == {"vda.qcow2", "vdb.qcow2"}
    stage.sound()


def test_b13_a_disk_that_was_left_out_stays_as_it_is(stage: Stage, who: str) -> None:
    """Thrown away or parked, what was written to the others: the one that was left out keeps all.

    A machine that a person has started, who alone can start it again, is turned off by that person.
    """
    begin(stage, who, raw=False)
    stage("snapshot web1 s1 --exclude vdb")
    (first,) = stage.holds("s1")
    flushed = stage.guest.writes_on(60)
    before = stage.path("main", "vdb")
    if who == SNAPTREE:
        stage("revert web1 s1 --discard --paused")
        assert stage.show()["state"] == "paused"
    else:
        assert "start" in stage("revert web1 s1 --discard", status=6).err
        stage.guest.writes_on()
        stage.kill_qemu()
        stage("revert web1 s1 --discard")
    assert stage.path("main", "vdb") == before, "no overlay is made for it"
    stage("snapshot web1 s2")
    held = stage.holds("s2", killed=True)
    assert held[0] == first and held[1] >= flushed
    if who == SNAPTREE:
        with stage.qmp() as qmp:
            qmp("cont")
        stage.guest.go(at=first)
    else:
        start(stage, who, first)
    stage("revert web1 s1 --stopped")
    assert stage.path("main", "vdb") != stage.path("main.1", "vdb"), "it has been forked where it stood"
    parked = stage.holds("main.1", killed=True)
    assert parked[0] > first and stage.holds("main", killed=True) == (first, parked[1])
    stage.forgiven.add("leaks")
    stage.sound()


def test_b14_a_machine_with_snapshots_is_removed_when_it_has_stopped(stage: Stage, who: str) -> None:
    begin(stage, who)
    snapshots(stage, 1, 8)
    stage("branch web1 other --from s1")
    for words in ("", "--delete-files --yes"):
        assert "snaptree stop web1" in stage(f"remove web1 {words}", status=6).err
    stage.guest.writes_on()
    stage.finish()
    stage("remove web1 --delete-files --yes")
    assert stage.files() == set()


# ---- C ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", WHO[1:])
def test_a4_b2_b12_c1_c12_gone_back_when_its_user_had_turned_it_off(stage: Stage, who: str) -> None:
    """Who alone can start it again turns it off before: it goes back twice within a second, and what was gone back to
    is deleted while the machine runs on what grew from it."""
    begin(stage, who, raw=False)
    wanted = snapshots(stage, 2)
    stage.kill_qemu()
    for _ in range(2):
        stage("revert web1 s1")
    # Nothing was written in between: there is nothing to be parked a second time.
    assert set(stage.names()) == {"s1", "s2", "main", "main.1"} and stage.holds("main.1", killed=True) > wanted["s2"]
    start(stage, who, min(wanted["s1"]))
    wanted["main.1"] = stage.holds("main.1", killed=True)
    stage("delete web1 s1")
    stage.guest.writes_on()
    assert {name: stage.holds(name, killed=True) for name in wanted if name != "s1"} == {
        name: counts for name, counts in wanted.items() if name != "s1"
    }
    stage.kill_qemu()
    stage("revert web1 s2 --discard --delete")
    start(stage, who, min(wanted["s2"]))
    stage("delete web1 --branch main.1")
    stage.guest.writes_on()
    assert set(stage.names()) == {"main"} and len(stage.show()["layers"]) == 2
    stage.forgiven.add("leaks")
    stage.finish()


def inner_and_outer(stage: Stage, who: str) -> dict[str, tuple[int, ...]]:
    """An internal snapshot, an external one on it, with writing after each; what they hold."""
    begin(stage, who, raw=False)
    for line in ("inner --internal", "outer"):
        stage(f"snapshot web1 {line}")
        stage.guest.writes_on(60)
    return {name: stage.holds(name) for name in ("inner", "outer")}


def test_c2_an_internal_one_with_an_external_one_on_it(lasting: Stage) -> None:
    """Going back to it leaves what stands on it as it was."""
    stage = lasting
    wanted = inner_and_outer(stage, SNAPTREE)
    stage("revert web1 inner")
    stage.guest.go(at=min(wanted["inner"]))
    assert {name: stage.holds(name) for name in wanted} == wanted
    parked = stage.holds("main.1", killed=True)
    assert parked > wanted["outer"] > wanted["inner"]
    stage("delete web1 inner")
    stage.guest.writes_on()
    assert stage.holds("outer") == wanted["outer"] and stage.holds("main.1", killed=True) == parked
    stage.forgiven.add("leaks")
    stage.finish()


@pytest.mark.parametrize("who", WHO[1:])
def test_c2_of_a_machine_that_its_user_had_turned_off(stage: Stage, who: str) -> None:
    wanted = inner_and_outer(stage, who)
    stage.kill_qemu()
    stage("revert web1 inner")
    start(stage, who, min(wanted["inner"]))
    assert {name: stage.holds(name) for name in wanted} == wanted
    assert stage.holds("main.1", killed=True) > wanted["outer"]
    stage.forgiven.add("leaks")
    stage.finish()


@LONG
def test_c3_killed_in_the_middle_of_a_delete_and_gone_back(stage: Stage, who: str) -> None:
    """What is half-merged has no name by then; going back to another finishes it first."""
    begin(stage, who, raw=False)
    wanted = snapshots(stage, 3)
    process = stage.command("delete web1 s2 --merge commit --limit 64K")
    until = time.monotonic() + 60
    while "half-merged" not in stage("show web1").out:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with stage.qmp() as qmp:
        for each in qmp("query-jobs"):
            qmp("block-job-set-speed", device=each["id"], speed=0)
    stage.guest.writes_on()
    if who != SNAPTREE:
        # Nobody else can start it again: it is turned off first.
        assert "start" in stage("revert web1 s3 --discard", status=6).err
        stage.guest.writes_on()
        stage("stop web1")
    assert "'s2'" in stage("revert web1 s2", status=3).err
    if who == SNAPTREE:
        stage("revert web1 s3 --discard")
        stage.guest.go(at=min(wanted["s3"]))
    else:
        stage("revert web1 s3 --discard")
        start(stage, who, min(wanted["s3"]))
    stage("gc web1")
    kept(stage, wanted, "s2")
    stage.finish()


def test_c4_c13_what_others_stand_on_is_never_changed(stage: Stage, who: str) -> None:
    """A golden image under two machines, and a layer of one that the other stands on."""
    golden = {disk: images.create(stage.disks / f"golden-{disk}.qcow2", DISK_BYTES) for disk in guest.DISKS}
    for disk, path in golden.items():
        images.io(path, "qcow2", "write -P 0x67 24M 1M")
        path.chmod(0o444)
        images.create(stage.disks / f"{disk}.qcow2", DISK_BYTES, backing=(path, "qcow2"))
    words = " ".join(f"--disk {disk}={disk}.qcow2" for disk in guest.DISKS)
    add(stage, who, words)
    start(stage, who)
    wanted = snapshots(stage, 2, 30)
    frozen = stage.path("s1", "vda")
    other = images.create(stage.disks / "web2.qcow2", DISK_BYTES, backing=(frozen, "qcow2"))
    stage("add web2 --disk vda=web2.qcow2")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (*golden.values(), frozen, other)}

    stage("delete web1 s1")
    stage.guest.writes_on()
    stage("delete web1 s2 --merge pull")
    stage("squash web1 --disk vdb --merge pull", status=6)
    kept_files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}

    assert kept_files == before
    assert "machine 'web2' stands on" in stage("gc web1").out
    stage.guest.writes_on()
    assert stage.names().keys() == {"main"} and wanted
    stage("stop web1")
    stage("remove web2 --delete-files --yes")
    stage("gc web1")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in golden.values()} == {
        path: before[path] for path in golden.values()
    }
    flushed = stage.guest.flushed()
    assert stage.holds("main") == (flushed, flushed)
    assert images.read(stage.path("main", "vdb"))[24 << 20] == 0x67


def test_c7_deleting_just_after_a_memory_snapshot_of_a_paused_machine(stage: Stage, who: str) -> None:
    begin(stage, who)
    with stage.qmp() as qmp:
        qmp("stop")
    stage("snapshot web1 s1 --memory")
    stage("delete web1 s1")
    assert stage.show()["state"] == "paused" and set(stage.names()) == {"main"}
    assert not [each for each in stage.files() if each.endswith(".memory")]
    with stage.qmp() as qmp:
        qmp("cont")
    stage.guest.writes_on()
    stage.finish()


@pytest.fixture
def small_disk(stage: Stage) -> Iterator[Stage]:
    """The images' disk is small; the guest writes to tips elsewhere."""
    with mounted(stage.folder, "ext4", 160 * MiB) as place:
        before, stage.disks = stage.disks, place
        yield stage
        stage.kill_every_qemu()
        stage.disks = before


@LONG
@pytest.mark.root
@pytest.mark.parametrize("way", ["pull", "commit"])
def test_c8_a_full_disk_leaves_all_disks_of_one_time(small_disk: Stage, way: str, who: str) -> None:
    """It fills up in the middle of a merge: nothing that is kept is lost, and with room it goes on."""
    stage = small_disk
    begin(stage, who, raw=False)
    wanted = snapshots(stage, 2, 1200)
    elsewhere = stage.folder / "elsewhere"
    elsewhere.mkdir()
    files = " ".join(f"--file {disk}={elsewhere}/{disk}.qcow2" for disk in guest.DISKS)
    stage(f"snapshot web1 s3 {files}")
    wanted["s3"] = stage.holds("s3")
    process = stage.command(f"delete web1 s2 --merge {way} --limit 1M")
    begun(stage, process, "s2")
    with filled(stage.disks, 4 * MiB):
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 8 and "gc web1" in said, said
        stage.guest.writes_on()
        assert stage.holds("s1") == wanted["s1"] and stage.holds("s3") == wanted["s3"]
    assert len(stage.show()["pending"]) == 2
    stage("gc web1")
    stage.guest.writes_on()
    assert stage.holds("s1") == wanted["s1"] and stage.holds("s3") == wanted["s3"]
    assert len(stage.show()["layers"]) == 6
    stage("stop web1")
    flushed = stage.guest.flushed()
    assert stage.holds("main") == (flushed, flushed)


@LONG
def test_c11_variables_go_with_disks_and_memory(lasting: Stage, who: str) -> None:
    """They are written to the machine's flash as its firmware does it, while the guest writes to its disks."""
    stage = lasting
    flash = Flash(stage.folder / "vars.fd", stage.folder / "bus", SEABIOS.stat().st_size)
    flash.make()
    stage.boot = dataclasses.replace(stage.boot, more=tuple(flash.words(SEABIOS)))
    stage.make(raw=False)
    add(stage, who, f"--disk vda=vda.qcow2 --disk vdb=vdb.qcow2 --nvram {flash.file}")
    start(stage, who)
    wanted = {}
    for number, memory in enumerate(("", "--memory"), 1):
        flash.set(f"at s{number}")
        stage(f"snapshot web1 s{number} {memory}")
        stage.guest.writes_on()
        wanted[f"s{number}"] = stage.holds(f"s{number}")
    flash.set("now")
    stage.guest.writes_on()
    if who == SNAPTREE:
        stage("revert web1 s2")
        stage.guest.went_over()
        assert flash.variable() == flash.kept() == "at s2"
        stage.guest.writes_on()
        stage("revert web1 s1 --running")
        stage.guest.go(at=min(wanted["s1"]))
    else:
        stage.kill_qemu()
        stage("revert web1 s1")
        start(stage, who, min(wanted["s1"]))
    assert flash.variable() == flash.kept() == "at s1"
    assert {name: stage.holds(name) for name in wanted} == wanted
    stage("stop web1")
    stage("switch web1 main.1 --no-memory")
    assert flash.kept() == "now"
    stage.forgiven.add("leaks")
    stage.sound()


@LONG
@pytest.mark.root
@pytest.mark.parametrize("end", ["ended", "killed", "killed, then there is room"])
def test_a_guest_that_a_full_disk_stops_in_a_pull_goes_on_when_that_has_ended(small_disk: Stage, end: str) -> None:
    """While it goes on, what the guest reads of it is written to the upper file; there QEMU found no room."""
    stage = small_disk
    begin(stage, SNAPTREE, raw=False)
    wanted = snapshots(stage, 2, 1200)
    # What it has not written to since, it reads.
    stage.guest.hold()
    elsewhere = stage.folder / "elsewhere"
    elsewhere.mkdir()
    stage("snapshot web1 s3 " + " ".join(f"--file {disk}={elsewhere}/{disk}.qcow2" for disk in guest.DISKS))
    wanted["s3"] = stage.holds("s3")
    # The next that the job itself writes comes in ten seconds.
    process = stage.command("delete web1 s2 --merge pull --limit 6K")
    begun(stage, process, "s2")
    with filled(stage.disks, 0):
        stage.guest.tell("go")
        time.sleep(2)
        last = stage.guest.flushed()
        time.sleep(1)
        assert stage.guest.flushed() == last and process.poll() is None, "QEMU has not stopped it"
        if end != "ended":
            process.kill()
        said = process.communicate(timeout=120)[0]
        assert end != "ended" or (process.returncode == 8 and "gc web1" in said), said
        if end == "killed":
            stage("recover web1", status=None)
        if end != "killed, then there is room":
            stage.guest.writes_on()
    if end != "ended":
        stage("recover web1")
        stage.guest.writes_on()
    stage("gc web1")
    stage.guest.writes_on()
    assert stage.holds("s1") == wanted["s1"] and stage.holds("s3") == wanted["s3"]
    stage("stop web1")
    flushed = stage.guest.flushed()
    assert stage.holds("main") == (flushed, flushed)


def begun(stage: Stage, process: subprocess.Popen[str], name: str) -> None:
    """Wait until the merge goes on that follows when the name has gone."""
    until = time.monotonic() + 60
    while name in stage.names():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
