"""An operation that runs, looked at and steered from another terminal."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.kit import images
from tests.kit.images import MiB
from tests.kit.scene import TOOL, Scene, command

import snaptree
from snaptree.errors import CancelledError, NotFoundError, RefusedError
from snaptree.running import calling

WRITTEN = 48 * MiB
Started = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def slow(scene: Scene) -> Scene:
    """A machine whose deletion of ``s1`` moves 48 MiB down, or 32 MiB up."""
    path = images.create(scene.disks / "web1.qcow2", 256 * MiB)
    images.io(path, "qcow2", "write -q -P 1 0 32M", "write -q -P 3 128M 32M")
    scene("add web1 --disk vda=web1.qcow2")
    scene("snapshot web1 s0")
    images.io(scene.path("main"), "qcow2", "write -q -P 1 0 32M")
    scene("snapshot web1 s1")
    images.io(scene.path("main"), "qcow2", "write -q -P 2 64M 48M")
    return scene


@pytest.fixture
def started(slow: Scene) -> Iterator[Started]:
    """Runs commands in processes of their own."""
    running: list[subprocess.Popen[str]] = []

    def start(line: str, **environment: str) -> subprocess.Popen[str]:
        place = {**os.environ, "SNAPTREE_STATE": str(slow.state), **environment}
        words = [*TOOL, *shlex.split(line)]
        running.append(subprocess.Popen(words, env=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.communicate(timeout=30)


def going_on(scene: Scene) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = scene("operations web1 --json").json
    return found


def until(scene: Scene, holds: Callable[[dict[str, Any]], bool], seconds: float = 30.0) -> dict[str, Any]:
    """Wait until an operation is as it should be; it as it is then."""
    end = time.monotonic() + seconds
    while True:
        found = going_on(scene)
        for each in found:
            if holds(each):
                return each
        assert time.monotonic() < end, found
        time.sleep(0.05)


def moving(scene: Scene) -> dict[str, Any]:
    """Wait until data moves."""
    return until(scene, lambda each: each["state"] == "running" and each["bytes_moved"] > 0)


def whole(scene: Scene) -> None:
    """All shows what it is to show."""
    path = scene.path("main")
    images.io(path, "qcow2", "read -q -P 1 0 32M", "read -q -P 2 64M 48M", "read -q -P 3 128M 32M")


WAYS = {
    "mover, down": ("commit", {}, "pauses"),
    "mover, up": ("pull", {}, "undoes"),
    "QEMU, down": ("commit", {"SNAPTREE_MOVER": "qemu"}, "pauses"),
    "QEMU, up": ("pull", {"SNAPTREE_MOVER": "qemu"}, "undoes"),
}


@pytest.mark.parametrize("case", WAYS)
def test_paused_slowed_down_and_resumed(slow: Scene, started: Started, case: str) -> None:
    way, environment, cancel = WAYS[case]
    process = started(f"delete web1 s1 --merge {way} --limit 2MiB/s", **environment)

    told = moving(slow)

    assert told["process"] == process.pid and told["operation"] == "merge" and told["machine"] == "web1"
    assert told["limit"] == 2 * MiB and told["cancel"] == cancel and told["pausable"]
    assert 0 < told["bytes_moved"] < told["bytes_total"] <= WRITTEN
    until(slow, lambda each: each["bytes_per_second"] > 0)
    said = slow("operations").out
    assert f"process {process.pid} of " in said and "limited to 2.0 MiB/s" in said and " left" in said
    (paused,) = slow("pause web1 --json").json
    assert paused["state"] == "paused" and paused["seconds_left"] is None
    assert "(paused, " in slow("pause web1").out, "once more changes nothing"
    time.sleep(1.0)
    (still,) = going_on(slow)
    assert still["state"] == "paused" and still["bytes_moved"] == paused["bytes_moved"]
    (limited,) = slow("limit web1 1GiB/s --json").json
    assert limited["limit"] == 1 << 30 and limited["state"] == "paused"
    assert "(running, " in slow("resume web1").out
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "paused by process" in err and "resumed by process" in err and "1.0 GiB/s" in err
    assert "done" in out
    assert going_on(slow) == []
    whole(slow)
    slow.sound()


def test_the_limit_is_lifted_and_kept(slow: Scene, started: Started) -> None:
    """A limit that is set while a piece waits holds at once, in both directions."""
    process = started("delete web1 s1 --merge commit --limit 64KiB/s")
    moving(slow)
    began = time.monotonic()
    (told,) = slow("limit web1 8MiB/s --json").json
    assert told["limit"] == 8 * MiB
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert 2.0 < time.monotonic() - began < 20.0
    for rate in ("0", "fast", "-1"):
        assert "is not a rate" in slow(f"limit web1 -- {rate}", status=2).err
    images.io(slow.path("main"), "qcow2", "write -q -P 2 64M 48M")
    slow("snapshot web1 s2")
    images.io(slow.path("main"), "qcow2", "write -q -P 2 64M 48M")
    process = started("delete web1 s2 --merge commit --limit 64KiB/s")
    moving(slow)
    slow("limit web1 none")
    process.communicate(timeout=20)
    assert process.returncode == 0
    whole(slow)


QUICK = [("mover, down", True), ("QEMU, up", True), ("mover, up", False), ("QEMU, down", False)]
"""Those that are run by default."""


@pytest.mark.parametrize(
    ("case", "paused"),
    [
        pytest.param(case, paused, marks=[] if (case, paused) in QUICK else [pytest.mark.slow])
        for case in WAYS
        for paused in (False, True)
    ],
)
def test_cancelled(slow: Scene, started: Started, case: str, paused: bool) -> None:
    way, environment, cancel = WAYS[case]
    outcome = {"pauses": "paused", "undoes": "undone"}[cancel]
    process = started(f"delete web1 s1 --merge {way} --limit 2MiB/s", **environment)
    moving(slow)
    if paused:
        slow("pause web1")
    (ended,) = slow("cancel web1 --json").json
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "stopping: process" in err and "gc web1" in err
    assert ended["process"] == process.pid and ended["outcome"] == outcome
    assert slow("log web1 --json").json[-1]["state"] == outcome
    assert [each["state"] for each in going_on(slow)] == ["pending"]
    assert "waits" in slow("operations").out
    whole(slow)
    again = slow("cancel web1", status=3).err
    assert "nothing runs on machine web1" in again and f"is {outcome}" in again
    slow("gc web1")
    assert going_on(slow) == []
    whole(slow)
    slow.sound()


def test_a_reflink_that_is_cancelled_leaves_nothing(slow: Scene) -> None:
    """What waits for its turn, and what has just ended."""
    assert "nothing runs" in slow("cancel web1", status=3).err
    slow("delete web1 s1")
    said = slow("cancel web1", status=3).err
    assert "is done" in said


def test_cancelled_by_many_at_once_and_asked_by_more(slow: Scene, started: Started) -> None:
    process = started("delete web1 s1 --merge commit --limit 2MiB/s")
    moving(slow)
    asking = [started("operations --json") for _ in range(8)]
    for each in asking:
        out, err = each.communicate(timeout=60)
        assert each.returncode == 0 and str(process.pid) in out, err
    cancelling = [started("cancel web1") for _ in range(8)]
    statuses = []
    for each in cancelling:
        each.communicate(timeout=60)
        statuses.append(each.returncode)
    assert set(statuses) <= {0, 3} and 0 in statuses
    process.communicate(timeout=30)
    assert process.returncode == 130
    whole(slow)
    slow("gc web1")
    slow.sound()


def test_what_waits_for_its_turn_is_shown_and_cancelled(slow: Scene, started: Started) -> None:
    first = started("delete web1 s1 --merge commit --limit 1MiB/s")
    moving(slow)
    second = started("snapshot web1 s2 --wait 60")
    until(slow, lambda each: each["state"] == "waiting" and each["process"] == second.pid)
    assert "waits for another operation" in slow("operations web1").out
    assert [each["process"] for each in slow("pause web1 --json").json] == [first.pid]
    slow("resume web1")
    both = slow("cancel web1 --all --json").json
    assert {each["process"]: each["outcome"] for each in both} == {first.pid: "paused", second.pid: "not begun"}
    for each in (first, second):
        each.communicate(timeout=30)
        assert each.returncode == 130
    assert "s2" not in slow.names()
    whole(slow)


def test_what_waits_is_cancelled_where_nothing_of_this_state_folder_runs(slow: Scene, started: Started) -> None:
    from snaptree.images.locks import MachineLock

    lock = MachineLock()
    lock.acquire([str(slow.path("main"))])
    process = started("snapshot web1 s2 --wait 60")
    until(slow, lambda each: each["state"] == "waiting")
    assert "has not begun" in slow("pause web1", status=3).err
    slow("cancel web1")
    process.communicate(timeout=30)
    assert process.returncode == 130 and "s2" not in slow.names()
    lock.release()


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_one_whose_process_was_killed_is_interrupted(slow: Scene, started: Started, paused: bool) -> None:
    process = started("delete web1 s1 --merge commit --limit 2MiB/s", SNAPTREE_MOVER="qemu" if paused else "")
    moving(slow)
    if paused:
        slow("pause web1")
    process.kill()
    process.communicate()
    found = until(slow, lambda each: each["state"] == "interrupted")
    assert found["operation"] == "merge" and found["process"] is None and "commit" in found["doing"]
    assert "recover web1" in slow("operations").out
    for line in ("cancel web1", "pause web1", "resume web1", "limit web1 1M"):
        said = slow(line, status=3).err
        assert "its process is gone" in said and "recover web1" in said
    assert list((slow.state / "operations").iterdir()) == []
    slow("recover web1")
    assert [each["state"] for each in going_on(slow)] == ["pending"]
    slow("gc web1")
    whole(slow)
    slow.sound()


def test_one_that_does_not_answer(slow: Scene, started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    process = started("delete web1 s1 --merge commit --limit 2MiB/s")
    moving(slow)
    process.send_signal(signal.SIGSTOP)
    while not all(") T " in each.read_text() for each in Path(f"/proc/{process.pid}/task").glob("*/stat")):
        time.sleep(0.01)
    with monkeypatch.context() as patch:
        patch.setattr(calling, "ANSWER_SECONDS", 0.5)
        (found,) = going_on(slow)
        assert found["state"] == "unknown" and found["process"] == process.pid
        assert "does not answer" in slow("operations").out
        assert f"process {process.pid}" in slow("pause web1", status=5).err
    process.send_signal(signal.SIGCONT)
    slow("cancel web1")
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_one_that_cannot_listen_runs_all_the_same(slow: Scene, started: Started) -> None:
    folder = slow.state / "operations"
    folder.rmdir()
    folder.write_text("")
    process = started("delete web1 s1 --merge commit --limit 2MiB/s")
    found = until(slow, lambda each: each["operation"] == "merge" and each["step"] == 2)
    assert found["state"] == "unknown" and found["process"] is None
    assert "does not answer" in slow("cancel web1", status=5).err
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    whole(slow)


def test_what_moves_no_data_cannot_be_paused(slow: Scene) -> None:
    from snaptree.planning.create import SnapshotRequest
    from snaptree.running.control import Control

    control = Control("web1")
    refused: list[str] = []

    def look(_: object) -> None:
        with pytest.raises(RefusedError) as error:
            control.pause()
        refused.append(error.value.message)

    machine = snaptree_machine(slow)
    machine.run(SnapshotRequest("s2"), progress=look, control=control)
    assert refused and all("cannot be paused" in each for each in refused)


def snaptree_machine(scene: Scene) -> Any:
    from snaptree.machines.connection import Connection

    return Connection(str(scene.state)).machine("web1")


@pytest.mark.parametrize("by_qemu", [False, True])
def test_going_back_to_an_internal_point_is_paused(slow: Scene, started: Started, by_qemu: bool) -> None:
    """The new layer is built by the mover, or by qemu-img, which is kept from running meanwhile."""
    tip = slow.path("main")
    if by_qemu:
        images.io(tip, "qcow2", "write -q -c -P 2 192M 1M")
    slow("snapshot web1 in --internal")
    slow("snapshot web1 out")
    images.io(slow.path("main"), "qcow2", "write -q -P 9 0 1M")
    plan = slow("branch web1 old --from in --plan --json").json
    assert any(each["kind"] == "build-from-point" for each in plan["steps"])
    process = started("revert web1 in --limit 2MiB/s")
    moving(slow)
    (paused,) = slow("pause web1 --json").json
    assert paused["state"] == "paused" and paused["operation"] == "revert"
    time.sleep(0.7)
    (still,) = going_on(slow)
    assert still["bytes_moved"] == paused["bytes_moved"]
    slow("limit web1 none")
    slow("resume web1")
    if by_qemu:
        # qemu-img keeps the limit that it was started with.
        assert going_on(slow)
        slow("cancel web1")
        process.communicate(timeout=30)
        assert process.returncode == 130
        images.io(slow.path("main"), "qcow2", "read -q -P 9 0 1M")
    else:
        process.communicate(timeout=30)
        assert process.returncode == 0
        whole(slow)
    slow.sound()


# ---- where there is nothing ---------------------------------------------------------------------------------------


def test_without_a_state_folder_nothing_is_made(tmp_path: Path) -> None:
    state = tmp_path / "none"
    assert "nothing is going on" in command("operations", state=state).out
    assert command("operations", "--json", state=state).json == []
    for line in (["operations", "web1"], ["cancel", "web1"], ["pause", "web1"], ["resume", "web1"]):
        said = command(*line, state=state)
        assert said.status == 3 and "no machine 'web1'" in said.err
    assert not state.exists()


@pytest.mark.root
def test_a_state_folder_that_cannot_be_written_to(slow: Scene, started: Started) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    place = f"{slow.state}"
    script = (
        f"mount --bind {place} {place} && mount -o remount,bind,ro {place} && "
        f"{shlex.join(TOOL)} operations; echo {{$?}}; {shlex.join(TOOL)} cancel web1; echo {{$?}}"
    )
    environment = {**os.environ, "SNAPTREE_STATE": place}
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.count("{11}") == 2 and "cannot be used" in done.stderr, done
    assert "Traceback" not in done.stderr


# ---- from a program -----------------------------------------------------------------------------------------------


def test_from_a_program(slow: Scene) -> None:
    async def story() -> None:
        async with snaptree.connect(str(slow.state)) as machines:
            web1 = machines["web1"]
            with pytest.raises(NotFoundError):
                await web1.pause()
            operation = web1.delete("s1", merge="commit", pace=snaptree_pace(2 * MiB))
            task = asyncio.ensure_future(_awaited(operation))
            while not any(each["bytes_moved"] for each in await machines.operations()):
                await asyncio.sleep(0.02)
            (paused,) = await web1.pause()
            assert paused["state"] == "paused" == operation.tell()["state"]
            (resumed,) = await web1.resume()
            assert resumed["state"] == "running"
            operation.pause()
            assert operation.tell()["state"] in ("pausing", "paused")
            operation.limit(4 * MiB)
            operation.resume()
            (limited,) = await web1.limit(3 * MiB)
            assert limited["limit"] == 3 * MiB
            (ended,) = await web1.cancel()
            assert ended["outcome"] == "paused"
            with pytest.raises(CancelledError):
                await task
            assert [each["state"] for each in await web1.operations()] == ["pending"]

    asyncio.run(story())
    whole(slow)


async def _awaited(operation: Any) -> Any:
    return await operation


def snaptree_pace(limit: float) -> Any:
    from snaptree.running.pace import Pace

    return Pace(limit)
