"""Killed on the way back to memory: snaptree, QEMU, or both.

One guest goes on, the old or the new one; what is kept is whole, no file is over, and no second QEMU.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.kit.points import tried
from tests.kit.stage import Stage, killed_around, killed_at, processes_of
from tests.live.test_memory import settings

from snaptree.qemu import memory

JOB = "memory loaded"
LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture
def lasting(stage: Stage) -> Stage:
    stage.boot = dataclasses.replace(stage.boot, append=True, before="env -u LD_PRELOAD")
    guest = stage.start(raw=False)
    guest.writes_on()
    stage("snapshot web1 s1 --memory")
    guest.writes_on()
    return stage


def require_right(stage: Stage) -> bool:
    """See that one guest goes on, and that nothing is left to be done; whether it has gone back."""
    stage("recover web1")
    stage.guest.went_over()
    assert len(processes_of(stage.folder)) == 1 and stage.show()["state"] == "running"
    stage("gc web1")
    assert stage.show()["pending"] == [] and stage.guest.errors() == []
    stage.sound()
    parked = [name for name in stage.names() if name.startswith("main.")]
    for name in parked:
        # It was parked with its memory, whole, and of the instant of its disks.
        assert stage.names()[name]["memory"] is not None
    stage.guest.writes_on(10)
    return bool(parked)


@pytest.mark.parametrize(
    ("command", "before", "there"),
    [
        ("stop", False, False),
        ("migrate", False, False),
        ("cont", True, True),
        ("cont", False, True),
        pytest.param("blockdev-set-active", False, True, marks=LONG),
        pytest.param("migrate-incoming", False, False, marks=LONG),
        *(pytest.param(each, True, False, marks=LONG) for each in ("add-fd", "query-yank", "stop", "migrate")),
    ],
)
def test_killed_around_a_command(lasting: Stage, command: str, before: bool, there: bool) -> None:
    """Somebody goes on without anybody's doing; recovery brings the rest in order."""
    stage = lasting
    first, asked = stage.holds("s1"), settings(stage)
    killed_around(stage, command, before=before, line="revert web1 s1")
    stage.guest.went_over()
    assert require_right(stage) == there
    tried(JOB, "snaptree is killed")
    assert stage.holds("s1") == first
    if not there:
        assert settings(stage) == asked, "its user's"
    if there:
        parked = stage.holds("main.1")
        stage("switch web1 main.1 --paused --no-memory" if command == "stop" else "switch web1 main.1 --paused")
        stage.agree_with(parked, stage.monitor)
        with stage.qmp() as qmp:
            qmp("cont")
        stage.guest.went_over()
    stage.finish()


@pytest.mark.parametrize("every", [61, pytest.param(1, marks=LONG)])
@pytest.mark.parametrize("words", ["", pytest.param("--discard", marks=LONG)])
def test_snaptree_killed_on_the_way_back(lasting: Stage, words: str, every: int) -> None:
    stage = lasting
    first, went, stayed = stage.holds("s1"), 0, 0
    for when in range(1 + every // 2, 400, every):
        killed = killed_at(stage, when, f"revert web1 s1 {words}")
        stage.guest.went_over()
        there = require_right(stage)
        went += there
        stayed += not there
        assert stage.holds("s1") == first
        for name in [each for each in stage.names() if each.startswith("main.")]:
            stage(f"delete web1 --branch {name}")
        if not killed:
            break
        tried(JOB, "snaptree is killed")
    else:
        raise AssertionError("it was killed to the last")
    assert words or (went > 1 and stayed > 1)
    stage.finish()


@pytest.mark.parametrize("every", [97, pytest.param(1, marks=LONG)])
def test_snaptree_and_qemu_killed_on_the_way_back(lasting: Stage, every: int) -> None:
    """The image files are believed; the memory of the snapshot is there to be gone back to again."""
    stage = lasting
    first = stage.holds("s1")
    for when in range(1 + every // 2, 400, every):
        killed = killed_at(stage, when, "revert web1 s1")
        stage.kill_every_qemu()
        stage("recover web1")
        stage("gc web1")
        assert stage.show()["pending"] == []
        stage.sound()
        assert stage.holds("s1") == first
        for name in [each for each in stage.names() if each.startswith("main.")]:
            stage(f"delete web1 --branch {name}")
        stage("revert web1 s1 --discard")
        stage.guest.went_over()
        stage.guest.writes_on(10)
        if not killed:
            break
        tried(JOB, "both are killed")
    else:
        raise AssertionError("it was killed to the last")
    stage.finish()


def kill_one(stage: Stage, *, new: bool) -> None:
    """Kill the QEMU that is to take over, or the one that runs."""
    for process in processes_of(stage.folder):
        words = (Path("/proc") / str(process) / "cmdline").read_bytes().split(b"\0")
        if (b"defer" in words) == new:
            os.kill(process, signal.SIGKILL)
            while process in processes_of(stage.folder):
                time.sleep(0.01)


@pytest.mark.parametrize("moment", ["load", pytest.param("until_done", marks=LONG)])
def test_the_new_qemu_is_killed_and_the_old_guest_goes_on(
    lasting: Stage, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, real = lasting, getattr(memory, moment)
    before = stage.files()

    async def killed(*arguments: Any) -> None:
        kill_one(stage, new=True)
        await real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(memory, moment, killed)
        assert stage("revert web1 s1", status=12).err
    assert not require_right(stage) and stage.files() == before
    tried(JOB, "QEMU is killed")
    stage.guest.hold()
    stage.guest.go()
    stage("revert web1 s1 --discard")
    stage.guest.went_over()
    stage.finish()


def test_the_old_qemu_is_killed_while_the_new_one_loads(lasting: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its guest's last disks are there; nothing has gone back."""
    stage, real = lasting, memory.load
    flushed = stage.guest.flushed()

    async def killed(*arguments: Any) -> None:
        kill_one(stage, new=False)
        await real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(memory, "load", killed)
        assert stage("revert web1 s1", status=12).err
    assert processes_of(stage.folder) == []
    stage.forgiven.add("leaks")
    stage("recover web1")
    assert stage.show()["state"] == "off" and stage.show()["pending"] == []
    assert min(stage.holds("main", killed=True)) >= flushed
    tried(JOB, "QEMU is killed")
    stage.sound()
    stage("revert web1 s1 --discard")
    stage.guest.went_over()
    stage.finish()


def test_stopped_by_its_user_when_it_has_loaded(lasting: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, real = lasting, memory.load
    before = stage.files()

    async def interrupted(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await real(*arguments)

    monkeypatch.setattr(memory, "load", interrupted)
    stage("revert web1 s1", status=130)
    assert not require_right(stage) and stage.files() == before
    stage.finish()
