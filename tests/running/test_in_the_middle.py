"""What befalls a machine that runs in the middle of an operation: its monitor hangs up, it is reset, its guest ends."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.kit.points import tried
from tests.kit.programs import dies
from tests.kit.qmp import Qmp
from tests.kit.scene import command
from tests.kit.stage import processes_of
from tests.kit.steps import at_command, hanging_up
from tests.kit.still import COMMAND, Still, placed

LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]
HANGS_UP = "it hangs up"
POINTS = int(os.environ.get("SNAPTREE_RUNNING_POINTS", "6"))
"""At so many points, or a few more, each thing befalls each job."""
SEED = int(os.environ.get("SNAPTREE_SEED", "0"))
"""Another one has other points tried."""


class TwoMonitors(Still):
    """The machine with a monitor of the test's own besides."""

    def start_command(self) -> str:
        return f"{COMMAND} -qmp unix:{self.folder}/second,server=on,wait=off"

    def second(self) -> Qmp:
        return Qmp(self.folder / "second")


class Job(NamedTuple):
    """A job of QEMU's, by what has it done: so many commands are said for it, more or less."""

    line: str
    commands: int


JOBS = {
    "external snapshot": Job("snapshot web1 new", 28),
    "memory saved in the background": Job("snapshot web1 new --memory", 68),
    "commit": Job("delete web1 s2 --merge commit", 42),
    "active commit": Job("delete web1 m --merge commit", 49),
    "pull": Job("delete web1 s3 --merge pull", 41),
    "reflink": Job("delete web1 s2 --merge reflink", 49),
    "memory loaded": Job("revert web1 m", 94),
    "internal snapshot taken": Job("snapshot web1 new --internal", 27),
    "internal snapshot deleted": Job("delete web1 in", 51),
}


def made(folder: Path, job: str = "") -> TwoMonitors:
    """The machine, with s1, s2 and s3, m with memory, and writing after the first three; it runs.

    For one that deletes an internal snapshot there is one, below the tip.
    """
    still = TwoMonitors(folder)
    for number, word in enumerate(("c", ".d", "..e"), 1):
        still(f"snapshot web1 s{number}")
        still.write(word)
    with still.second() as qmp:
        qmp("cont")
    if job == "internal snapshot deleted":
        still("snapshot web1 in --internal")
    still("snapshot web1 m --memory")
    return still


KEPT = {"s1": "b.......", "s2": "c.......", "s3": "cd......", "m": "cde.....", "main": "cde....."}


def right(still: Still, state: str = "running", **more: str) -> None:
    """Everything that is kept shows what it showed, and the machine runs."""
    wanted = {**KEPT, "in": KEPT["m"], "new": KEPT["main"], **more}
    for name in wanted.keys() & still.names().keys():
        assert still.shows(name) == wanted[name], name
    assert still.show()["state"] == state


# ---- what befalls it ----------------------------------------------------------------------------------------------


def quits(still: TwoMonitors) -> None:
    """It comes to its end in order, as when its guest has powered off."""
    with still.second() as qmp, contextlib.suppress(AssertionError, OSError):
        qmp("quit")
    until = time.monotonic() + 30
    while processes_of(still.folder) and time.monotonic() < until:
        time.sleep(0.01)


def resets(still: TwoMonitors) -> None:
    with still.second() as qmp:
        qmp("system_reset")


BEFALLS = ("it hangs up", "QEMU is killed", "it powers off", "it is reset", "snaptree is killed", "both are killed")


def befalls(still: TwoMonitors, what: str, line: str, number: int, *, after: bool) -> tuple[bool, int | None]:
    """Carry out a line, and let something befall the machine at the n-th command; whether it came so far, and the
    status, where snaptree lives.
    """
    if "snaptree" in what or "both" in what:

        def arrange(kill: Callable[[], None]) -> None:
            at_command(pytest.MonkeyPatch(), number, kill, after=after)

        died = dies(partial(still, line), arrange)
        if "both" in what:
            still.kill_every_qemu()
        return died, None
    with pytest.MonkeyPatch.context() as patched:
        works: dict[str, Callable[[], object]] = {
            "it hangs up": hanging_up(patched),
            "QEMU is killed": still.kill_every_qemu,
            "it powers off": partial(quits, still),
            "it is reset": partial(resets, still),
        }
        came = at_command(patched, number, works[what], after=after)
        status = still.any(line)
    return came(), status


def one_that_goes(still: TwoMonitors) -> Path | None:
    """The monitor of a QEMU whose guest runs. One that is to take over has its second where this one's was."""
    for path in (still.folder / "second", still.monitor):
        with contextlib.suppress(OSError, AssertionError), Qmp(path, 0.3) as qmp:
            if qmp("query-status")["running"]:
                return path
    return None


def looked_after(still: TwoMonitors, what: str) -> None:
    """What is left after it is right at once, when it is recovered, and when all is done; no file is over."""
    alive = bool(processes_of(still.folder))
    still.forgiven.add("leaks")
    if alive:
        # It goes on at once, not only when it is recovered.
        until = time.monotonic() + 2
        while (goes := one_that_goes(still)) is None:
            assert time.monotonic() < until, "it stands still"
        monitor, still.monitor = still.monitor, goes
        still.write("...z")
        still.monitor = monitor
    if what == HANGS_UP:
        # Snaptree has lived, and has put right what there was to be, before it ended.
        assert not any("interrupted" in each for each in still.show()["pending"])
    still("recover web1")
    more = {"main": "cdez...."} if alive else {}
    for line in ("recover web1", "gc web1"):
        still(line)
        right(still, "running" if processes_of(still.folder) else "off", **more)
    if not processes_of(still.folder):
        still("start web1")
    still.write("...z")
    right(still, still.show()["state"], main="cdez....")
    assert not [each for each in still.show()["pending"] if "has stopped" not in each] and still.jobs() == {}
    still.sound()


SHORT = (
    ("memory saved in the background", "it hangs up"),
    ("active commit", "both are killed"),
    ("reflink", "snaptree is killed"),
    ("pull", "it powers off"),
)
"""What is tried by default, at one point."""


@pytest.mark.root
@pytest.mark.parametrize(
    ("job", "what", "points"),
    [
        *((*each, 1) for each in SHORT),
        *(pytest.param(job, what, POINTS, marks=LONG) for job in JOBS for what in BEFALLS if what != HANGS_UP),
        *(pytest.param(job, HANGS_UP, POINTS, marks=[*LONG, pytest.mark.mutants]) for job in JOBS),
    ],
)
def test_at_any_moment(job: str, what: str, points: int) -> None:
    """So many points, or more, lie evenly between the commands that are said for it."""
    line, commands = JOBS[job]
    stride = max(1, commands // (points + 1))
    first = stride if points == 1 else 1 + (SEED + BEFALLS.index(what)) % stride
    for turn, number in enumerate(range(first, 400, stride)):
        with placed("xfs" if job == "reflink" else "") as folder:
            still = made(folder, job)
            came, status = befalls(still, what, line, number, after=bool((turn + SEED) % 2))
            assert came or not status, status
            assert status in (None, 0, 5, 6, 7, 12), status
            looked_after(still, what)
        if not came:
            break
        tried(job, what)
        if points == 1:
            return
    assert turn >= points, "these are too few points"


@pytest.mark.slow
@pytest.mark.parametrize("line", ["delete web1 s2 --merge commit", "delete web1 s3 --merge pull"])
def test_the_machine_is_reset_in_a_merge(line: str) -> None:
    """Its devices begin anew, and the merge goes on."""
    with placed() as folder:
        still = made(folder)
        process = still.command(f"{line} --limit 32K")
        with still.second() as qmp:
            until = time.monotonic() + 30
            while not qmp("query-jobs"):
                assert time.monotonic() < until and process.poll() is None
                time.sleep(0.01)
            qmp("system_reset")
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 0, said
        right(still)
        assert still.show()["pending"] == []
        still.sound()


@pytest.mark.parametrize("number", [66, *(pytest.param(each, marks=pytest.mark.slow) for each in (65, 67, 68))])
def test_it_powers_off_on_the_way_back(number: int) -> None:
    """Its session has ended when the guard is to be started, which is said in a sentence."""
    with placed() as folder, pytest.MonkeyPatch.context() as patched:
        still = made(folder)

        def quits() -> None:
            with still.second() as qmp, contextlib.suppress(AssertionError):
                qmp("quit")

        came = at_command(patched, number, quits)
        status = command("revert", "web1", "m", state=still.state, folder=still.disks).status
        patched.undo()
        assert came() and status in (0, 6, 7, 12), status
        still.forgiven.add("leaks")
        still("recover web1")
        assert {name: still.shows(name) for name in KEPT} == KEPT
        still.sound()
