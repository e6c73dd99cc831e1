"""A QEMU that says nothing for longer than snaptree waits, as while its disk stands still: the guest goes on with it.

``SIGSTOP`` stands for that, and what snaptree waits is shortened.
"""

from __future__ import annotations

import os
import signal
import time

import pytest
from tests.kit.stage import processes_of
from tests.kit.steps import at_command
from tests.kit.still import placed
from tests.running.test_in_the_middle import TwoMonitors, made, right

from snaptree.machines import asking, standalone
from snaptree.qemu import live_jobs, memory, running, session
from snaptree.running.carry import live, standing
from snaptree.running.carry import memory as saving

WAITS = (
    *((module, "FLUSH_SECONDS") for module in (live, live_jobs, saving, standing)),
    *((module, "GREETING_SECONDS") for module in (session, running)),
    *((module, "WORK_SECONDS") for module in (asking, standalone)),
    *((memory, name) for name in ("CANCEL_SECONDS", "QUIET_SECONDS")),
    (session, "COMMAND_SECONDS"),
)
SAVED, GONE_BACK, MERGED = "snapshot web1 new --memory", "revert web1 m", "delete web1 m --merge commit"


def silent(still: TwoMonitors, line: str, command: str, *, after: bool) -> int:
    """Carry out a line; from a command on QEMU says nothing, until the line has come to its end. Its status."""
    (process,) = processes_of(still.folder)
    with pytest.MonkeyPatch.context() as patched:
        for module, name in WAITS:
            patched.setattr(module, name, 0.7)
        came = at_command(patched, command, lambda: os.kill(process, signal.SIGSTOP), after=after)
        try:
            status = still.any(line)
        finally:
            os.kill(process, signal.SIGCONT)
    assert came()
    return status


def goes_on(still: TwoMonitors) -> bool:
    """Whether the guest runs and its requests do not wait, in a moment."""
    until = time.monotonic() + 5
    with still.second() as qmp:
        while time.monotonic() < until:
            pending = "pending" in {each["status"] for each in qmp("query-jobs")}
            if qmp("query-status")["running"] and not pending:
                return True
            time.sleep(0.05)
    return False


SLOW = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
        (SAVED, "stop", False),
        (SAVED, "transaction", False),
        (SAVED, "cont", False),
        (GONE_BACK, "stop", True),
        (MERGED, "job-complete", True),
        (MERGED, "job-finalize", False),
    )
]


@pytest.mark.parametrize(
    ("line", "command", "after"),
    [(SAVED, "stop", True), (GONE_BACK, "migrate", True), (MERGED, "job-complete", False), *SLOW],
)
def test_the_guest_goes_on_when_qemu_does(line: str, command: str, *, after: bool) -> None:
    """At once, not only when it is recovered."""
    with placed() as folder:
        still = made(folder)
        status = silent(still, line, command, after=after)
        assert goes_on(still), status
        still("recover web1")
        right(still)
        with still.second() as qmp:
            assert not any(each["state"] for each in qmp("query-migrate-capabilities")), "it is as its user had it"
        still("gc web1")
        assert still.show()["pending"] == [] and still.jobs() == {}
        still.sound()
