"""A merge in a running machine, steered from another terminal while the guest writes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.kit.by_hand import SNAPTREE, begin
from tests.kit.stage import Stage

SECONDS = 60.0


def until(stage: Stage, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait until what is going on is as it should be; it as it is then."""
    end = time.monotonic() + SECONDS
    while True:
        found = stage("operations web1 --json").json
        for each in found:
            if holds(each):
                assert isinstance(each, dict)
                return each
        assert time.monotonic() < end, found
        time.sleep(0.05)


def merging(stage: Stage, line: str, who: str = SNAPTREE) -> tuple[subprocess.Popen[str], dict[str, tuple[int, ...]]]:
    """Take three snapshots, and begin to delete one at a rate at which it takes long; what the snapshots hold."""
    begin(stage, who, raw=False)
    for number in range(1, 4):
        stage(f"snapshot web1 s{number}")
        stage.guest.writes_on(80)
    wanted = {name: stage.holds(name) for name in ("s1", "s2", "s3")}
    process = stage.command(f"{line} --limit 32K")
    until(stage, lambda each: each["operation"] == "merge" and each["bytes_moved"] > 0)
    return process, wanted


CASES = {
    "down in the middle": "delete web1 s2 --merge commit",
    "up in the middle": "delete web1 s2 --merge pull",
    "the tip goes down": "delete web1 s3 --merge commit",
}
LONG = pytest.mark.slow


@pytest.mark.parametrize(
    "case",
    ["down in the middle", *(pytest.param(each, marks=LONG) for each in ("the tip goes down", "up in the middle"))],
)
def test_paused_resumed_and_let_go_faster(stage: Stage, case: str) -> None:
    process, wanted = merging(stage, CASES[case])
    (paused,) = stage("pause web1 --json").json
    assert paused["state"] == "paused" and "running machine" in paused["doing"]
    stage.guest.writes_on()
    time.sleep(1.0)
    (still,) = stage("operations web1 --json").json
    # What the guest writes to a tip that goes down is to be moved as well.
    assert still["state"] == "paused" and abs(still["bytes_moved"] - paused["bytes_moved"]) <= 1 << 16
    stage("limit web1 none")
    assert stage("resume web1 --json").json[0]["state"] == "running"
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    stage.guest.writes_on()
    gone = CASES[case].split()[2]
    assert gone not in stage.names() and stage.show()["pending"] == []
    assert all(stage.holds(name) == counts for name, counts in wanted.items() if name != gone)
    stage.sound()
    stage.finish()


@pytest.mark.parametrize(
    "case",
    ["the tip goes down", *(pytest.param(each, marks=LONG) for each in ("up in the middle", "down in the middle"))],
)
@pytest.mark.parametrize(
    ("paused", "who"),
    [(True, SNAPTREE), pytest.param(False, SNAPTREE, marks=LONG), pytest.param(False, "drive", marks=LONG)],
    ids=["paused", "running", "of-a-person"],
)
def test_cancelled(stage: Stage, case: str, paused: bool, who: str) -> None:
    process, wanted = merging(stage, CASES[case], who)
    if paused:
        stage("pause web1")
    (ended,) = stage("cancel web1 --json").json
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert ended["outcome"] == ("undone" if "pull" in CASES[case] else "paused")
    with stage.qmp() as qmp:
        assert qmp("query-jobs") == []
    stage.guest.writes_on()
    gone = CASES[case].split()[2]
    assert all(stage.holds(name) == counts for name, counts in wanted.items() if name not in (gone, "s3"))
    assert {each["state"] for each in stage("operations web1 --json").json} == {"pending"}
    stage("gc web1")
    stage.guest.writes_on()
    assert stage.show()["pending"] == []
    stage.sound()
    stage.finish()


def test_killed_while_paused_and_recovered(stage: Stage) -> None:
    """The job is found paused and slow, and is let go."""
    process, wanted = merging(stage, CASES["down in the middle"])
    stage("pause web1")
    process.kill()
    process.communicate()
    with stage.qmp() as qmp:
        assert {each["status"] for each in qmp("query-jobs")} == {"paused"}
    assert until(stage, lambda each: each["state"] == "interrupted")["operation"] == "merge"
    assert "recover web1" in stage("cancel web1", status=3).err
    began = time.monotonic()
    stage("recover web1")
    stage("gc web1")
    assert time.monotonic() - began < 20
    stage.guest.writes_on()
    assert stage.show()["pending"] == [] and "s2" not in stage.names()
    assert stage.holds("s1") == wanted["s1"] and stage.holds("s3") == wanted["s3"]
    stage.sound()
    stage.finish()
