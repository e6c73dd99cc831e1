"""What befalls a machine that runs in the middle of an operation: its monitor hangs up, it is reset, its guest ends."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from tests.kit.qmp import Qmp
from tests.kit.scene import command
from tests.kit.steps import at_command, hanging_up
from tests.kit.still import COMMAND, Still, placed

LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]


class TwoMonitors(Still):
    """The machine with a monitor of the test's own besides."""

    def start_command(self) -> str:
        return f"{COMMAND} -qmp unix:{self.folder}/second,server=on,wait=off"

    def second(self) -> Qmp:
        return Qmp(self.folder / "second")


def made(folder: Path) -> TwoMonitors:
    """The machine, with s1, s2 and s3, m with memory, and writing after the first three; it runs."""
    still = TwoMonitors(folder)
    for number, word in enumerate(("c", ".d", "..e"), 1):
        still(f"snapshot web1 s{number}")
        still.write(word)
    with still.second() as qmp:
        qmp("cont")
    still("snapshot web1 m --memory")
    return still


KEPT = {"s1": "b.......", "s2": "c.......", "s3": "cd......", "m": "cde.....", "main": "cde....."}
LINES = (
    "snapshot web1 new",
    "snapshot web1 new --memory",
    "delete web1 s2 --merge commit",
    "delete web1 s3 --merge pull",
    "delete web1 m --merge commit",
    "revert web1 m",
)


def right(still: Still, **more: str) -> None:
    """Everything that is kept shows what it showed, and the machine runs."""
    wanted = {**KEPT, **more}
    for name in wanted.keys() & still.names().keys():
        assert still.shows(name) == wanted[name], name
    assert still.show()["state"] == "running"


EVERY = [pytest.param(line, 3, after, marks=LONG) for line in LINES for after in (False, True)]


@pytest.mark.parametrize(("line", "stride", "after"), [("snapshot web1 new --memory", 37, False), *EVERY])
def test_the_monitor_hangs_up_at_a_command(line: str, stride: int, *, after: bool) -> None:
    """It is told, and recovery brings it to its end with the machine as it is: QEMU lives."""
    for number in range(1 + len(line) % 7 if stride > 3 else 1, 400, stride):
        with placed() as folder, pytest.MonkeyPatch.context() as patched:
            still = made(folder)
            came = at_command(patched, number, hanging_up(patched), after=after)
            status = still.any(line)
            patched.undo()
            if not came():
                assert status == 0
                return
            assert status in (0, 6, 7, 12), status
            # It goes on at once, not only when it is recovered.
            with still.second() as qmp:
                assert qmp("query-status")["running"], (number, status)
            assert not any("interrupted" in each for each in still.show()["pending"]), (number, status)
            still.write("...z")
            still("recover web1")
            right(still, main="cdez....")
            still("gc web1")
            right(still, main="cdez....")
            assert still.show()["pending"] == [] and still.jobs() == {}
            still.sound()


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
