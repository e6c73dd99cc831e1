"""A QEMU that answers nonsense while its guest runs: each operation ends in success or a clear error, and what is kept
is whole; the machine goes on, and the operation can be finished when it has come to its senses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from tests.kit.stage import processes_of
from tests.kit.steps import answering
from tests.kit.still import placed
from tests.kit.strange_monitor import StrangeMonitor
from tests.running.test_in_the_middle import JOBS, SEED, TwoMonitors, looked_after, made
from tests.running.test_no_answer import WAITS

LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]
WAYS = (
    *("no JSON", "an array", "nested", "binary", "no end of line", "a huge answer", "another id", "no id"),
    *("an error without id", "an id that is a list", "no answer in it", "an error that is a number"),
    "an event that is none",
)
"""What is no answer at all."""
VALUES: tuple[object, ...] = (
    *(5, "x", None, [], {}, [5], [{}], [None], True, {"status": 7}, [{"id": [], "status": 7}]),
    {"id": [], "status": None, "running": "x"},
    [{"node-name": 5, "device": [], "inserted": 5, "qdev": None, "file": 1, "drv": []}],
)
"""Answers, but not to what was asked."""
GUARDED = {"memory saved in the background", "reflink", "memory loaded"}
"""For these a process besides talks to QEMU, and has to know it: nothing can stand between."""
STATUSES = (0, 5, 6, 7, 12)


def carried_out(still: TwoMonitors, line: str) -> int:
    """Carry out a line, without waiting long for what does not come; its status."""
    with pytest.MonkeyPatch.context() as patched:
        for module, name in WAITS:
            patched.setattr(module, name, 1.0)
        said = still(line, status=None)
    assert said.status in STATUSES, said
    return said.status


def no_answer(job: str, way: object, number: int) -> str:
    """To which command it came, if it came so far."""
    with placed() as folder:
        still = made(folder, job)
        strange = StrangeMonitor(still.monitor, str(way), number)
        try:
            status = carried_out(still, JOBS[job].line)
        finally:
            strange.close()
        assert strange.came or status == 0
        looked_after(still, "")
        assert len(processes_of(folder)) == 1, "one that was to take over is there still"
        return strange.said[number - 1] if strange.came else ""


def wrong_answer(job: str, value: object, number: int) -> str:
    """To which command it came, if it came so far."""
    with placed("xfs" if job == "reflink" else "") as folder:
        still = made(folder, job)
        with pytest.MonkeyPatch.context() as patched:
            came = answering(patched, number, value)
            status = carried_out(still, JOBS[job].line)
        assert came() or status == 0
        looked_after(still, "")
        assert len(processes_of(folder)) == 1, "one that was to take over is there still"
        return came()


def at_each(job: str, whats: Sequence[object], attempt: Callable[[str, object, int], str], only: int | None) -> None:
    """Try it at each command, each time in the next way; or at one alone."""
    for number in range(1, 400) if only is None else (only,):
        what = whats[(number + SEED) % len(whats)]
        try:
            came = attempt(job, what, number)
        except BaseException as error:
            error.add_note(f"{what!r} at command {number}")
            raise
        assert came or only is None, "it has come to its end before"
        if not came:
            break
    assert only is not None or number > 20


@pytest.mark.root
@pytest.mark.parametrize(
    ("job", "only"),
    [
        *(("external snapshot", 26), ("commit", 26), ("memory saved in the background", 15)),
        *(pytest.param(job, None, marks=LONG) for job in JOBS),
    ],
)
def test_it_answers_something_else(job: str, only: int | None) -> None:
    at_each(job, VALUES, wrong_answer, only)


@pytest.mark.parametrize(
    ("job", "only"),
    [
        *(("external snapshot", 24), ("active commit", 30)),
        *(pytest.param(job, None, marks=LONG) for job in JOBS if job not in GUARDED),
    ],
)
def test_it_answers_nothing_that_is_an_answer(job: str, only: int | None) -> None:
    at_each(job, WAYS, no_answer, only)
