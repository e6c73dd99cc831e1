"""Merging in a QEMU that runs: what is on disk when it is said to be, and what is left where somebody is killed.

QEMU is real, with no guest in it; the test writes to its disk as the guest would.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.kit.order import Order
from tests.kit.still import Still, standing, writing
from tests.running.test_firmware import arranged

from snaptree.errors import CancelledError, StateError, ToolError
from snaptree.machines.connection import Connection
from snaptree.qemu import jobs, live_jobs
from snaptree.qemu.live_jobs import Merging
from snaptree.qemu.running import RunningQemu
from snaptree.qemu.session import QmpSession
from snaptree.running import recovery
from snaptree.running.carry import live_merge
from snaptree.running.guard import PIVOT, STAY, Guard
from snaptree.running.journal import Journal
from snaptree.store import operations

STATE, FAILED, BUSY, REFUSED, CANCELLED = 11, 12, 5, 6, 130


@pytest.fixture
def snapshots(still: Still) -> Still:
    """s1, s2 and s3, with writing after each."""
    _take(still)
    return still


def _take(still: Still) -> None:
    for number, word in enumerate(("c", ".d", "..e"), 1):
        still(f"snapshot web1 s{number}")
        for disk in still.targets:
            still.write(word, disk)


KEPT = {"s1": "b.......", "s2": "c.......", "s3": "cd......", "main": "cde....."}


def whole(still: Still, *gone: str, **more: str) -> None:
    """All that is kept shows what it showed, nothing is left to do, and QEMU has no job."""
    still("gc web1")
    wanted = {name: word for name, word in {**KEPT, **more}.items() if name not in gone}
    assert set(still.names()) == set(wanted)
    for name, word in wanted.items():
        for disk in still.targets:
            assert still.shows(name, disk) == word, (name, disk)
    assert still.show()["pending"] == []
    if still.show()["state"] != "off":
        assert still.jobs() == {}
        still.kill_qemu()
    still.sound()


def watched(patched: pytest.MonkeyPatch) -> Order:
    """What is done to bring files to disk, to finalize jobs and to change the tree, in its order."""
    order, settle = Order(patched), live_jobs.settle
    order.watch(Journal, "record", "record")

    async def settling(qmp: QmpSession, job: Merging) -> None:
        order.events.append("settle")
        await settle(qmp, job)
        order.events.append("settled")

    patched.setattr(live_jobs, "settle", settling)
    return order


@pytest.mark.parametrize(("way", "target"), [("commit", "vda.s1.qcow2"), ("pull", "vda.s2.qcow2")])
def test_what_is_moved_is_synced_before_a_header_and_before_the_tree_say_so(
    snapshots: Still, way: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU may have been told to sync nothing (``cache=unsafe``), and then its flush brings nothing to disk."""
    with monkeypatch.context() as patched:
        seen = watched(patched)
        snapshots(f"delete web1 s2 --merge {way}")
    assert str(snapshots.disks / target) in seen.before_last("settle", "record")
    assert str(snapshots.disks / target) in seen.before_last("record", "settled")
    whole(snapshots, "s2")


def killing(still: Still, kill: Callable[[], None]) -> None:
    """Kill QEMU, and be killed, when the first job has ended."""
    settle = live_jobs.settle

    async def settled(qmp: QmpSession, job: Merging) -> None:
        await settle(qmp, job)
        still.kill_qemu()
        kill()

    live_jobs.settle = settled


@pytest.mark.parametrize(("way", "target"), [("commit", "vda.s1.qcow2"), ("pull", "vda.s2.qcow2")])
def test_qemu_is_killed_just_after_it_has_changed_the_header(
    snapshots: Still, way: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU writes the header first, and holds its tables back as long as it may."""
    snapshots.killed(f"delete web1 s2 --merge {way}", lambda kill: killing(snapshots, kill))
    snapshots.forgiven.add("leaks")
    with monkeypatch.context() as patched:
        seen = watched(patched)
        snapshots("recover web1")
    assert str(snapshots.disks / target) in seen.before_last("record", "settled"), (
        "what QEMU has written is synced by nobody else"
    )
    whole(snapshots, "s2")


@pytest.mark.parametrize("options", [{}, {"extended_l2": "on"}], ids=["by the mover", "by QEMU"])
@pytest.mark.parametrize("way", ["commit", "pull"])
def test_qemu_is_killed_between_two_disks(way: str, options: dict[str, Any]) -> None:
    """One disk's merge is done, so that the other one's has to be, by whoever can."""
    with standing(2, **options) as two:
        _take(two)
        two.killed(f"delete web1 s2 --merge {way}", lambda kill: killing(two, kill))
        two("recover web1")
        whole(two, "s2")


def going_over(kill: Callable[[], None], when: str) -> None:
    """Be killed when the guest goes over: as all waits, when the journal has said where, or when it has gone."""
    note, settle = Journal.note, live_jobs.settle

    def noting(self: Journal, path: str, value: str) -> None:
        if value == PIVOT and when == "before":
            kill()
        note(self, path, value)
        if value == PIVOT and when == "after":
            kill()

    async def settled(qmp: QmpSession, job: Merging) -> None:
        await settle(qmp, job)
        if when == "gone over":
            kill()

    setattr(Journal, "note", noting)  # noqa: B010
    live_jobs.settle = settled


def with_its_guard(kill: Callable[[], None]) -> None:
    """Be killed, and the guard before, when the journal has said that the guest goes over."""
    enter, guards = Guard.__enter__, list[Guard]()

    def entered(self: Guard) -> Guard:
        guards.append(self)
        return enter(self)

    def killing_both() -> None:
        guards[-1]._process.kill()
        guards[-1]._process.wait()
        kill()

    setattr(Guard, "__enter__", entered)  # noqa: B010
    going_over(killing_both, "after")


def answers(still: Still, seconds: float = 5.0) -> None:
    """Wait until no job goes on: the guest's requests are answered again."""
    until = time.monotonic() + seconds
    while set(jobs := still.jobs().values()) - {"concluded"}:
        assert time.monotonic() < until, jobs
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("when", "disk"), [("before", "vda.s3.qcow2"), ("after", "vda.s2.qcow2"), ("gone over", "vda.s2.qcow2")]
)
@pytest.mark.parametrize("also", ["", "qemu"])
def test_killed_while_the_guest_goes_over(snapshots: Still, when: str, disk: str, also: str) -> None:
    """Its guard lets the guest go on; what is written afterwards is kept, wherever it went."""
    snapshots.killed("delete web1 s3 --merge commit", lambda kill: going_over(kill, when))
    answers(snapshots)
    assert snapshots.disk() == disk
    snapshots.write("...f")
    if also:
        snapshots.kill_qemu()
    snapshots("recover web1")
    whole(snapshots, "s3", main="cdef....")


def test_snaptree_and_its_guard_are_killed_while_the_guest_goes_over(snapshots: Still) -> None:
    """Nobody knows what the job that waits was told: it is begun anew."""
    snapshots.killed("delete web1 s3 --merge commit", with_its_guard)
    assert list(snapshots.jobs().values()) == ["pending"] and snapshots.disk() == "vda.s3.qcow2"
    snapshots("recover web1")
    assert snapshots.disk() == "vda.s2.qcow2"
    whole(snapshots, "s3")


async def writes(qmp: QmpSession) -> None:
    """What the guest would do."""
    for each in writing("..z"):
        assert await qmp.execute("human-monitor-command", command_line=each) == ""


def qemu_dies_soon(still: Still) -> Callable[[Callable[[], None]], None]:
    """As soon as the commit has been begun anew the guest writes; then QEMU is killed, and so are we."""

    def arrange(kill: Callable[[], None]) -> None:
        async def followed(qmp: QmpSession, jobs: Any, *_: Any) -> None:
            await qmp.execute("job-pause", id=jobs[0].id)
            await writes(qmp)
            still.kill_qemu()
            kill()

        setattr(live_jobs, "follow", followed)  # noqa: B010

    return arrange


def qemu_dies_at_once(still: Still) -> Callable[[Callable[[], None]], None]:
    """The same, as soon as the job has been given up."""

    def arrange(kill: Callable[[], None]) -> None:
        abandon = jobs.abandon

        async def abandoning(qmp: QmpSession, names: Any) -> bool:
            await abandon(qmp, names)
            await writes(qmp)
            still.kill_qemu()
            kill()
            return True

        setattr(live_merge, "abandon", abandoning)  # noqa: B010

    return arrange


@pytest.mark.parametrize("when", [qemu_dies_soon, qemu_dies_at_once])
def test_what_it_writes_after_that_is_not_taken_for_stale(
    snapshots: Still, when: Callable[[Still], Callable[[Callable[[], None]], None]]
) -> None:
    """The journal had said that the guest goes over; once the job has been given up that counts no more."""
    snapshots.killed("delete web1 s3 --merge commit", with_its_guard)
    snapshots.killed("recover web1", when(snapshots))
    snapshots("recover web1")
    whole(snapshots, "s3", main="cdz.....")


@pytest.mark.parametrize("outrun", [1, 2])
def test_a_guest_that_writes_too_fast_to_go_over(outrun: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one disk of two: either both are merged otherwise, or the one has gone over, and the other waits."""
    stop, seen = live_jobs.stop_the_guest, list[str]()

    async def stopping(qmp: QmpSession, job: Merging) -> bool:
        seen.append(job.id)
        with monkeypatch.context() as patched:
            if len(seen) == outrun:
                patched.setattr(live_jobs, "PENDING_SECONDS", -1.0)
            return await stop(qmp, job)

    monkeypatch.setattr(live_jobs, "stop_the_guest", stopping)
    with standing(2) as two:
        two("snapshot web1 s1")
        for disk in two.targets:
            two.write(".x", disk)
        said = two("delete web1 s1", status=None)
        assert said.status == (0 if outrun == 1 else FAILED), said.err
        assert ("pulled up instead" in said.out + said.err) == (outrun == 1)
        assert two.jobs() == {}
        for disk in two.targets:
            two.write("..z", disk)
        two("recover web1")
        two("gc web1")
        assert two.jobs() == {} and set(two.names()) == {"main"}
        assert [two.shows(disk=disk) for disk in two.targets] == ["bxz.....", "bxz....."]
        two("stop web1 --force")
        two.sound()


async def finalize(qmp: QmpSession, job: str) -> None:
    """What somebody does who wants a commit that is ready to come to its end."""
    for command, until in (("job-complete", "pending"), ("job-finalize", "concluded")):
        await qmp.execute(command, id=job)
        while (await qmp.execute("query-jobs"))[0]["status"] != until:
            await asyncio.sleep(0.01)


def by_somebody(still: Still, kill: Callable[[], None]) -> None:
    """Somebody finalizes the job; then the guest writes, QEMU is killed, and so are we."""
    follow = live_jobs.follow

    async def followed(qmp: QmpSession, jobs: Any, *words: Any) -> None:
        await follow(qmp, jobs, *words)
        await finalize(qmp, jobs[0].id)

    async def close(qemu: RunningQemu, *_: Any) -> None:
        for each in writing("..z"):
            await qemu.qmp.execute("human-monitor-command", command_line=each)
        still.kill_qemu()
        kill()

    setattr(live_jobs, "follow", followed)  # noqa: B010
    setattr(live_merge, "_close", close)  # noqa: B010


def test_the_guest_goes_over_because_somebody_has_it_do_so(snapshots: Still) -> None:
    """The tip is stale then, which the files do not tell: it is not merged once more."""
    snapshots.killed("delete web1 s3 --merge commit", lambda kill: by_somebody(snapshots, kill))
    snapshots.forgiven.add("leaks")
    snapshots("recover web1")
    whole(snapshots, "s3", main="cdz.....")


@pytest.mark.parametrize("when", ["it is followed", "it has been followed"])
def test_somebody_finalizes_a_commit_and_dismisses_it(
    snapshots: Still, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is known then is that it is gone; where the guest is has to be known when QEMU is."""
    follow = live_jobs.follow

    async def followed(qmp: QmpSession, jobs: Any, *words: Any) -> None:
        await follow(qmp, jobs, *words)
        await finalize(qmp, jobs[0].id)
        await qmp.execute("job-dismiss", id=jobs[0].id)
        if when == "it is followed":
            await follow(qmp, jobs, *words)

    with monkeypatch.context() as patched:
        patched.setattr(live_jobs, "follow", followed)
        assert "does not know the" in snapshots("delete web1 s3 --merge commit", status=FAILED).err
    assert snapshots.disk() == "vda.s2.qcow2"
    snapshots.write("..z")
    snapshots.kill_qemu()
    snapshots("recover web1")
    whole(snapshots, "s3", main="cdz.....")


@pytest.mark.parametrize("what", ["the journal", "QEMU"])
def test_the_guest_cannot_go_over(snapshots: Still, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal cannot be written while its requests wait, or QEMU refuses at last: it goes on where it was."""
    note, settle = Journal.note, live_jobs.settle

    def noting(self: Journal, path: str, value: str) -> None:
        if value == PIVOT and what == "the journal":
            raise StateError("no room")
        note(self, path, value)

    async def refused(qmp: QmpSession, job: Merging) -> None:
        if what == "QEMU":
            await qmp.execute("job-cancel", id=job.id)
            raise ToolError("it does not want to")
        await settle(qmp, job)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "note", noting)
        patched.setattr(live_jobs, "settle", refused)
        snapshots("delete web1 s3 --merge commit", status=FAILED if what == "QEMU" else STATE)
    answers(snapshots)
    assert snapshots.disk() == "vda.s3.qcow2"
    snapshots.write("...f")
    snapshots.kill_qemu()
    snapshots("recover web1")
    whole(snapshots, "s3", main="cdef....")


@pytest.mark.parametrize("way", ["commit", "pull"])
def test_a_merge_that_is_stopped_leaves_no_job(snapshots: Still, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stopped(*_: object) -> None:
        raise CancelledError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(live_jobs, "follow", stopped)
        snapshots(f"delete web1 s2 --merge {way}", status=CANCELLED)
    assert snapshots.jobs() == {}
    assert snapshots.show()["pending"] and not any("interrupted" in each for each in snapshots.show()["pending"])
    whole(snapshots, "s2")


@pytest.mark.parametrize("also", ["", "qemu", "stop web1 --force"])
def test_a_commit_that_somebody_cancels_when_it_is_ready(
    still: Still, also: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the human monitor's ``block_job_cancel`` does: it ends without an error, and the guest stays where it was."""
    still("snapshot web1 s1")
    still.write(".c")
    follow = live_jobs.follow

    async def cancelled(qmp: QmpSession, jobs: Any, *words: Any) -> None:
        await follow(qmp, jobs, *words)
        await qmp.execute("block-job-cancel", device=jobs[0].id)

    with monkeypatch.context() as patched:
        patched.setattr(live_jobs, "follow", cancelled)
        assert "somebody has cancelled" in still("delete web1 s1 --merge commit", status=FAILED).err
    assert still.disk() == "vda.s1.qcow2"
    still.write("..z")
    if also == "qemu":
        still.kill_qemu()
    elif also:
        still(also)
        still.forgiven.add("leaks")
    still("recover web1")
    still("gc web1")
    assert still.shows() == "bcz....."
    still.sound()


@pytest.mark.parametrize("way", ["commit", "pull"])
def test_killed_when_a_job_has_been_finalized(snapshots: Still, way: str) -> None:
    """QEMU 10.0.2 dies when it is asked for its nodes while a finished stream is there."""
    snapshots.killed(f"delete web1 s2 --merge {way}", arranged("job-finalize"))
    snapshots("recover web1")
    answers(snapshots)
    whole(snapshots, "s2")


def test_a_finished_stream_of_somebody_else_is_not_looked_behind(snapshots: Still) -> None:
    """QEMU dies of it (10.0.2); snaptree's own, however it came there, is dismissed."""
    for name in ("mine", "snaptree-1"):
        with snapshots.qmp() as qmp:
            top = qmp("query-block")[0]["inserted"]
            (below,) = (each for each in qmp("query-named-block-nodes") if each["file"] == top["backing_file"])
            qmp("block-stream", device=top["node-name"], base_node=below["node-name"], job_id=name, auto_dismiss=False)
        answers(snapshots)
        if name == "mine":
            said = snapshots("snapshot web1 s4", status=REFUSED)
            assert "job-dismiss" in said.err and "mine" in said.err
            with snapshots.qmp() as qmp:
                qmp("job-dismiss", id=name)
    snapshots("show web1")
    assert snapshots.jobs() == {}
    answers(snapshots)


def test_what_a_qemu_has_open_that_does_not_answer_is_left_alone(
    snapshots: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for dead because its monitor is gone."""
    monkeypatch.setattr(recovery, "DYING_SECONDS", 0.2)

    def arrange(kill: Callable[[], None]) -> None:
        async def follow(*_: object) -> None:
            kill()

        setattr(live_jobs, "follow", follow)  # noqa: B010

    snapshots.killed("delete web1 s2 --merge commit", arrange)
    hidden = Path(f"{snapshots.monitor}.hidden")
    snapshots.monitor.rename(hidden)
    snapshots("recover web1", status=BUSY)
    hidden.rename(snapshots.monitor)
    snapshots("recover web1")
    whole(snapshots, "s2")


def test_what_the_journal_said_of_a_job_does_not_hold_for_one_that_is_begun_anew() -> None:
    """snaptree and its guard are killed, and somebody cancels the job that was pending: the guest has not gone over."""

    def early(kill: Callable[[], None]) -> None:
        async def stopping(*_: object) -> bool:
            kill()
            return False

        setattr(live_jobs, "stop_the_guest", stopping)  # noqa: B010

    with standing(2) as two:
        _take(two)
        two.killed("delete web1 s3 --merge commit", with_its_guard)
        (pending,) = (name for name, status in two.jobs().items() if status == "pending")
        with two.qmp() as qmp:
            qmp("job-cancel", id=pending)
        two.killed("recover web1", early)
        assert two.disk("vda") == "vda.s3.qcow2"
        database = Connection(str(two.state)).database
        (operation,) = operations.unfinished(database, "web1")
        assert operations.note_of(database, operation.id, operation.step, str(two.disks / "vda.s2.qcow2")) == STAY
        database.close()
        two("recover web1")
        whole(two, "s3")
