"""Going back and switching with a machine that runs, without memory: it is started again on other disks."""

from __future__ import annotations

import pytest
from tests.kit.by_hand import by_hand
from tests.kit.stage import Stage


def state(stage: Stage) -> str:
    found: str = stage.show()["state"]
    return found


def test_going_back_parks_the_work_of_now_and_the_machine_runs_on_the_old_disks(stage: Stage) -> None:
    guest = stage.start()
    stage("snapshot web1 s1")
    flushed = guest.writes_on(100)
    plan = stage("revert web1 s1 --plan --json").json
    assert plan["estimate"] is True and any("turned off" in note for note in plan["notes"])
    assert state(stage) == "running"

    stage("revert web1 s1")

    assert state(stage) == "running"
    assert stage.holds("main.1")[1] >= flushed
    first = stage.holds("s1")
    guest.go(at=first[1])
    stage("snapshot web1 s2")
    assert first < stage.holds("s2")
    stage.finish()


def test_going_back_and_dropping_the_work_of_now(stage: Stage) -> None:
    """A4 for a machine that runs: the experiment goes, the chain is as short as before."""
    guest = stage.start()
    stage("snapshot web1 s1")
    first = stage.holds("s1")
    guest.writes_on(100)
    stage("revert web1 s1 --discard --delete --paused")
    assert state(stage) == "paused" and len(stage.show()["layers"]) == 2
    assert stage.holds("main") == first, "the experiment is not merged into it"
    with stage.qmp() as qmp:
        qmp("cont")
    guest.go(at=first[1])
    stage.finish()


@pytest.mark.parametrize(
    "word", ["stopped", *(pytest.param(word, marks=pytest.mark.slow) for word in ("paused", "running"))]
)
def test_what_the_machine_does_afterwards(stage: Stage, word: str) -> None:
    guest = stage.start()
    stage("snapshot web1 s1")
    guest.writes_on()
    stage(f"revert web1 s1 --{word}")
    assert state(stage) == {"stopped": "off"}.get(word, word)
    if word == "stopped":
        stage("revert web1 s1 --running")
        assert state(stage) == "running"
    stage("stop web1 --force")
    stage.forgiven.add("leaks")
    stage.sound()


@pytest.mark.slow
def test_switching_to_and_fro(stage: Stage) -> None:
    guest = stage.start(raw=False)
    stage("snapshot web1 s1")
    first = stage.holds("s1")
    guest.writes_on(100)
    stage("branch web1 other --from s1")
    flushed = guest.writes_on(20)
    stage("switch web1 other")
    assert state(stage) == "running"
    assert stage.holds("main")[1] >= flushed
    there = stage.holds("main")
    guest.go(at=first[1])
    stage("switch web1 main")
    assert stage.holds("other") > first
    guest.go(at=there[1])
    stage.finish()


def test_what_could_not_be_started_again_is_not_turned_off(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.make()
    monkeypatch.chdir(stage.disks)
    stage.guest = by_hand(stage, "drive")
    stage.guest.go()
    stage(f"add web1 --disk vda.qcow2 --disk vdb.raw,format=raw --qmp {stage.folder}/qmp")
    stage("snapshot web1 s1")
    assert "one that you start" in stage("revert web1 s1", status=6).err
    stage("revert web1 nothing --stopped", status=3)
    stage("revert web1 s1 --stopped --file vda=vda.qcow2", status=4)
    stage.guest.writes_on()
    stage("revert web1 s1 --stopped")
    assert state(stage) == "off"


@pytest.mark.slow
def test_a_start_command_that_fails_is_told_and_the_disks_are_right(stage: Stage) -> None:
    guest = stage.start()
    stage("snapshot web1 s1")
    guest.writes_on()
    stage("set web1 --start 'qemu-system-x86_64 -nonsense'")
    assert "nonsense" in stage("revert web1 s1", status=12).err
    assert state(stage) == "off" and stage.show()["pending"] == []
    assert stage.holds("main") == stage.holds("s1")
    stage.forgiven.add("leaks")
    stage.sound()
