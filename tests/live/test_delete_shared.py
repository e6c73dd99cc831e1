"""Deleting by shared blocks while the guest writes: a merged file takes a layer's place under its QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.kit.by_hand import by_hand
from tests.kit.stage import Stage, killed_at
from tests.live.test_delete import kept, opened, snapshots


def files_open(stage: Stage) -> set[str]:
    return {path for path in opened(stage) if str(stage.disks) in path}


CASES = {
    "middle": ("s2", 3, False),
    "the root goes, and gets its name back": ("s1", 3, True),
}


@pytest.mark.parametrize("case", CASES)
def test_a_snapshot_is_deleted_while_the_guest_writes(sharing: Stage, case: str) -> None:
    stage = sharing
    name, count, renamed = CASES[case]
    guest = stage.start(raw=False)
    wanted = snapshots(stage, count)
    plan = stage(f"delete web1 {name} --plan --json").json
    assert plan["way"] == "reflink" and plan["bytes_to_copy"] < 1 << 17 < plan["bytes_to_share"], plan
    said = stage(f"delete web1 {name} --json").json
    assert said["paths_after"] == plan["paths_after"]
    guest.writes_on()
    assert files_open(stage) == {each["path"] for each in stage.show()["layers"]}
    assert len(stage.show()["layers"]) == 2 * count
    assert bool(stage.show()["pending"]) == renamed
    for each in wanted.keys() - {name}:
        assert stage.holds(each) == wanted[each]
    # What QEMU has open it can write to, by the name that the file has now.
    stage("delete web1 s3 --merge commit")
    guest.writes_on()
    stage("snapshot web1 after")
    guest.writes_on()
    stage.finish()
    assert stage.show()["pending"] == []
    assert {path.name for path in stage.disks.iterdir()} >= {"vda.qcow2", "vdb.qcow2"}
    left = next(each for each in wanted if each not in (name, "s3"))
    assert stage.holds(left) == wanted[left]


def test_into_the_running_tip(sharing: Stage) -> None:
    stage = sharing
    guest = stage.start(raw=False)
    wanted = snapshots(stage, 2)
    for disk in ("vda", "vdb"):
        images_written(stage, disk)
    plan = stage("delete web1 s2 --merge reflink --plan --json").json
    assert "reflink" in plan["way"]
    path = stage.path("main", "vda")
    stage("delete web1 s2 --merge reflink")
    assert stage.path("main", "vda") == path
    kept(stage, wanted, "s2")
    assert files_open(stage) == {each["path"] for each in stage.show()["layers"]}
    stage("snapshot web1 after")
    guest.writes_on()
    stage("delete web1 s1 after --merge reflink")
    guest.writes_on()
    stage.finish()
    assert {each["path"] for each in stage.show()["layers"]} == {
        str(stage.disks / name) for name in ("vda.qcow2", "vdb.qcow2")
    }


def images_written(stage: Stage, disk: str) -> None:
    assert Path(stage.path("s2", disk)).stat().st_size > 1 << 18


def test_what_a_plain_drive_has_open_is_copied(sharing: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """How QEMU has opened it is not known, and it would refuse to reopen it."""
    stage = sharing
    stage.make()
    monkeypatch.chdir(stage.disks)
    stage.guest = by_hand(stage, "drive")
    stage.guest.go()
    stage(f"add web1 --disk vda.qcow2 --disk vdb.raw,format=raw --qmp {stage.folder}/qmp")
    wanted = snapshots(stage, 3, 30)
    plan = stage("delete web1 s2 --plan --json").json
    assert plan["way"] in ("commit", "pull", "commit+pull", "reflink"), plan
    stage("delete web1 s2")
    kept(stage, wanted, "s2")
    stage.finish()


def loosen(stage: Stage, number: int) -> dict[str, tuple[int, ...]]:
    """Leave a loose layer in the middle, with more beneath and above; what the kept snapshots hold."""
    for name in (f"a{number}", f"b{number}", f"c{number}"):
        stage(f"snapshot web1 {name}")
        stage.guest.writes_on(20)
    held = {name: stage.holds(name) for name in (f"a{number}", f"c{number}")}
    stage(f"delete web1 b{number} --merge none")
    return held


@pytest.mark.parametrize("stride", [89, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_its_calls(sharing: Stage, stride: int) -> None:
    """Wherever snaptree is killed, the guest writes on, and recovery leaves the one or the other, whole."""
    stage = sharing
    guest = stage.start(raw=False)
    when, held, done = 1, loosen(stage, 0), 0
    while killed_at(stage, when, "gc web1"):
        guest.writes_on(3)
        stage("recover web1")
        guest.writes_on(3)
        assert {name: stage.holds(name) for name in held} == held
        assert files_open(stage) == {each["path"] for each in stage.show()["layers"]}
        stage.sound()
        if not any("waits" in each for each in stage.show()["pending"]):
            done += 1
            stage(f"delete web1 {' '.join(held)}")
            held = loosen(stage, when)
        when += stride
    assert done >= 1 and when > 40
    kept(stage, held)
    stage.finish()
