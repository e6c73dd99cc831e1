"""Firmware state of a machine that runs: UEFI variables in QEMU's flash, and a TPM (row C11).

QEMU is real, and its devices are written to as firmware does it; no guest runs.
"""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.kit.firm import Firm, Trusted
from tests.kit.space import filled, mounted
from tests.kit.stage import killed_at, processes_of
from tests.kit.steps import at_command
from tests.kit.still import placed

from snaptree.images import small
from snaptree.qemu import memory
from snaptree.qemu.memory import Followed
from snaptree.qemu.session import QmpSession
from snaptree.running.guard import PIVOT
from snaptree.running.journal import Journal

REFUSED, FAILED, NO_SPACE = 6, 12, 8


@pytest.fixture
def firm() -> Iterator[Firm]:
    """The machine, with ``one`` as its variable, running."""
    with placed() as folder:
        found = Firm(folder)
        found.go()
        found.set("one")
        yield found


def quickly(every: Iterable[tuple[object, ...]], *some: tuple[object, ...]) -> list[object]:
    """Of these cases some are run by default."""
    later = [pytest.mark.slow, pytest.mark.mutants]
    return [each if each in some else pytest.param(*each, marks=later) for each in every]


def whole(firm: Firm, copies: int) -> None:
    """What the machine reads is what is in the file of its variables; there are so many copies, and nothing is over."""
    assert firm.kept() == firm.variable()
    firm.set("last")
    assert firm.kept() == "last", "what is written now goes elsewhere"
    assert len(firm.copies()) == copies
    assert firm.show()["pending"] == [] and len(processes_of(firm.folder)) == 1
    firm.sound()


# ---- disks alone --------------------------------------------------------------------------------------------------


def test_variables_go_with_each_snapshot_and_each_branch(firm: Firm) -> None:
    firm("snapshot web1 s1")
    firm.set("two")
    firm.write(".x")
    firm("snapshot web1 s2")
    # Nothing else is written: that is work enough to be kept.
    firm.set("three")
    firm("revert web1 s1 --running")
    assert firm.variable() == firm.kept() == "one"
    firm("switch web1 main.1 --running")
    assert firm.variable() == "three"
    firm("revert web1 s2 --discard --delete --running")
    assert firm.variable() == "two"
    whole(firm, 2)


def test_they_are_of_the_instant_of_the_disks(firm: Firm, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guest writes after they were copied is copied once more, while it stands still."""
    with monkeypatch.context() as patched:
        at_command(patched, "stop", lambda: firm.set("late"))
        said = firm("snapshot web1 s1 --json").json
    assert 0 < said["guest_pause"] < 2 and firm.run_state() == "running"
    firm.set("later")
    firm("revert web1 s1 --running --discard")
    assert firm.variable() == "late"
    whole(firm, 1)


def test_a_paused_machine_stays_paused(firm: Firm) -> None:
    with firm.qmp() as qmp:
        qmp("stop")
    firm("snapshot web1 s1")
    firm("snapshot web1 s2 --memory")
    assert firm.run_state() == "paused"
    whole(firm, 2)


@pytest.mark.root
@pytest.mark.parametrize("words", ["", "--memory"])
def test_no_room_for_the_copies(firm: Firm, words: str) -> None:
    """Nothing has been touched by then, and the machine goes on in the file that it has."""
    before = firm.files()
    folder = firm.state / "firmware"
    folder.mkdir(exist_ok=True)
    with mounted(firm.folder, "xfs", 320 << 20) as place:
        folder.rmdir()
        folder.symlink_to(place)
        with filled(place, 48 << 10):
            firm(f"snapshot web1 s1 {words}", status=NO_SPACE)
        assert firm.files() == before and firm.show()["pending"] == [] and firm.disk() == "vda.qcow2"
        assert not [each for each in place.iterdir() if each.is_file()]
        folder.unlink()
    firm.write(".x")
    firm(f"snapshot web1 s1 {words}")
    whole(firm, 1)


STANDING = [(when, also) for when in ("stop", "transaction", "cont") for also in ("", "guard", "qemu")]


@pytest.mark.parametrize(
    ("when", "also"), quickly(STANDING, ("stop", ""), ("transaction", "guard"), ("transaction", "qemu"))
)
def test_killed_while_the_machine_stands_still_for_them(firm: Firm, when: str, also: str) -> None:
    """Its guard lets it go on, recovery does when that was killed too."""

    def arrange(kill: Callable[[], None]) -> None:
        execute = QmpSession.execute

        async def executed(self: QmpSession, command: str, **arguments: Any) -> Any:
            answer = await execute(self, command, **arguments)
            if command == when:
                if also == "guard":
                    end_guards()
                kill()
            return answer

        setattr(QmpSession, "execute", executed)  # noqa: B010

    firm.killed("snapshot web1 s1", arrange)
    if also == "qemu":
        firm.kill_qemu()
    elif also:
        assert firm.run_state() == ("running" if when == "cont" else "paused")
    else:
        firm.runs()
    firm("recover web1")
    # Where QEMU has died, the overlay is taken for the tip.
    there = "s1" in firm.names()
    assert there == (when != "stop" or also == "qemu")
    if also == "qemu":
        assert firm.kept() == "one" and len(firm.copies()) == there
        firm("start web1")
    firm.runs() if also != "qemu" else firm.go()
    whole(firm, int(there))


def end_guards() -> None:
    """Kill the processes that stand by."""
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if b"snaptree.running.guard" in words and parent == os.getpid():
            os.kill(int(process.name), signal.SIGKILL)


# ---- with memory --------------------------------------------------------------------------------------------------


def test_variables_go_with_memory_and_back_again(firm: Firm) -> None:
    firm("snapshot web1 s1 --memory")
    firm.set("two")
    firm("revert web1 s1 --keep-as idea")
    assert firm.run_state() == "running"
    assert firm.variable() == firm.kept() == "one"
    firm.set("three")
    assert firm.kept() == "three"
    firm("switch web1 idea")
    assert firm.variable() == firm.kept() == "two"
    # Without its memory the disks and the variables of then are what the machine starts with.
    firm("switch web1 main --no-memory --running")
    assert firm.variable() == firm.kept() == "three"
    firm("stop web1 --force")
    firm("revert web1 s1 --discard")
    assert firm.run_state() == "running" and firm.variable() == "one"
    whole(firm, 2)


def test_parked_with_memory_are_those_of_the_instant(firm: Firm, monkeypatch: pytest.MonkeyPatch) -> None:
    firm("snapshot web1 s1 --memory")
    with monkeypatch.context() as patched:
        # The new QEMU is there by now, and the old one's socket has another name.
        at_command(patched, "migrate-incoming", lambda: Old(firm).set("late"))
        firm("revert web1 s1 --paused")
    assert firm.run_state() == "paused" and firm.kept() == "one"
    firm("switch web1 main.1 --running")
    assert firm.variable() == "late"
    whole(firm, 2)


class Old(Firm):
    """The QEMU of before, whose socket is kept under a hidden name while another one loads."""

    def __init__(self, firm: Firm) -> None:
        self.folder, self.state = firm.folder, firm.state

    @property
    def socket(self) -> Path:
        (hidden,) = self.folder.glob(".snaptree-*-bus")
        return hidden


def test_written_to_while_memory_is_saved(firm: Firm, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU saves in the background what the flash has by then: memory and flash would not agree."""
    real = memory.until_done

    async def until_done(qmp: QmpSession, followed: Followed) -> None:
        firm.set("late")
        await real(qmp, followed)

    with monkeypatch.context() as patched:
        patched.setattr(memory, "until_done", until_done)
        said = firm("snapshot web1 s1 --memory", status=FAILED)
    assert str(firm.variables) in said.err and "take the snapshot again" in said.err
    assert "s1" not in firm.names() and firm.copies() == []
    firm("gc web1")
    firm("snapshot web1 s1 --memory")
    whole(firm, 1)


def test_a_load_that_fails_leaves_the_old_machine_its_variables(firm: Firm) -> None:
    firm.bus(f"memset {2 << 20} {4 << 20} 85")
    firm("snapshot web1 s1 --memory")
    file = Path(firm.names()["s1"]["memory"])
    content, kept = file.read_bytes(), file.stat()
    whole_file = file.rename(firm.folder / "whole")
    middle = len(content) // 2
    file.write_bytes(content[: middle - (1 << 18)] + bytes(1 << 19) + content[middle + (1 << 18) :])
    os.utime(file, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    firm.set("two")
    inode = firm.variables.stat().st_ino
    firm("revert web1 s1", status=FAILED)
    assert firm.variables.stat().st_ino == inode and firm.run_state() == "running"
    assert firm.variable() == firm.kept() == "two"
    whole_file.rename(file)
    whole(firm, 1)


def test_a_copy_that_is_gone_is_told_before_anything_is_touched(firm: Firm) -> None:
    firm("snapshot web1 s1 --memory")
    firm.set("two")
    (copy,) = firm.copies()
    copy.rename(firm.folder / "away")
    said = firm("revert web1 s1", status=3)
    assert "no nvram state" in said.err and str(copy) in said.err
    (firm.folder / "away").rename(copy)
    whole(firm, 1)


def arranged(when: str) -> Callable[[Callable[[], None]], None]:
    """Be killed when the copies have been brought, when the journal says who goes on, or when that one does."""

    def arrange(kill: Callable[[], None]) -> None:
        execute, note = QmpSession.execute, Journal.note

        async def executed(self: QmpSession, command: str, **arguments: Any) -> Any:
            answer = await execute(self, command, **arguments)
            if command == when:
                kill()
            return answer

        def noting(self: Journal, path: str, value: str) -> None:
            if value == PIVOT and when == "before":
                kill()
            note(self, path, value)
            if value == PIVOT and when == "after":
                kill()

        setattr(QmpSession, "execute", executed)  # noqa: B010
        setattr(Journal, "note", noting)  # noqa: B010

    return arrange


OVER = [(when, also) for when in ("migrate-incoming", "stop", "before", "after", "cont") for also in ("", "qemu")]


@pytest.mark.parametrize(("when", "also"), quickly(OVER, ("migrate-incoming", "qemu"), ("before", ""), ("after", "")))
def test_killed_while_another_one_takes_over(firm: Firm, when: str, also: str) -> None:
    firm("snapshot web1 s1 --memory")
    firm.set("two")
    firm.write(".x")
    firm.killed("revert web1 s1", arranged(when))
    went = when in ("after", "cont")
    if also:
        firm.kill_every_qemu()
    firm("recover web1")
    assert firm.show()["pending"] == []
    state = firm.show()["state"]
    if state == "off":
        assert firm.kept() == ("one" if went else "two")
        firm("start web1")
        firm.go()
    firm.runs()
    assert firm.variable() == firm.kept() == ("one" if went else "two")
    assert ("main.1" in firm.names()) == went
    whole(firm, 2 if went else 1)


def test_what_has_died_before_it_wrote_anything_is_loaded_again(firm: Firm) -> None:
    """Its tip has something in it, which was written before its memory was saved."""
    firm("snapshot web1 s1 --memory")
    firm.set("two")
    firm.write(".x")
    firm("revert web1 s1")
    firm.killed("switch web1 main.1", arranged("after"))
    firm.kill_every_qemu()
    firm("recover web1")
    assert firm.show()["state"] == "running" and firm.show()["active_branch"] == "main.1"
    assert firm.variable() == firm.kept() == "two"
    whole(firm, 2)


@pytest.mark.parametrize("memory", ["", " --memory"])
def test_killed_when_the_guest_goes_on(firm: Firm, memory: str) -> None:
    """Whoever pauses the guest after that has it paused; of its memory nobody knows yet in which form it is saved."""
    firm.killed(f"snapshot web1 s2{memory}", arranged("after"))
    with firm.qmp() as qmp:
        qmp("stop")
    firm("recover web1")
    assert ("s2" in firm.names()) == (not memory) and firm.run_state() == "paused"
    firm.go()
    firm("gc web1")
    whole(firm, 0 if memory else 1)


LINES = ("snapshot web1 s2", "snapshot web1 s2 --memory", "revert web1 s1", "revert web1 s1 --no-memory")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("every", [83, 1])
@pytest.mark.parametrize("line", LINES)
def test_killed_at_its_calls(firm: Firm, line: str, every: int) -> None:
    """Wherever snaptree is killed, the variables are those of the line that the machine is on."""
    firm("snapshot web1 s1 --memory")
    firm.set("two")
    when, done = 1, 0
    while killed_at(firm, when, line):
        firm("recover web1")
        assert not any("interrupted" in each for each in firm.show()["pending"])
        if firm.show()["state"] == "off":
            firm("start web1")
        if firm.run_state() != "running":
            firm.go()
        # A snapshot whose memory was not saved leaves its overlays to be merged.
        firm("gc web1")
        went = len(firm.names()) > 2
        assert firm.variable() == firm.kept() == ("one" if went and "revert" in line else "two"), when
        assert len(firm.copies()) == 1 + went
        firm.sound()
        if went:
            done += 1
            gone = "s2" if "snapshot" in line else "--branch main.1"
            firm(f"delete web1 {gone}")
            firm("gc web1")
            firm.set("two")
        when += every
    assert when > every
    print(f"{line}: killed at {when // every} calls, done all the same {done} times")


# ---- TPM ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trusted() -> Iterator[Trusted]:
    """The machine, with a TPM that keeps ``one``, running."""
    with placed() as folder:
        found = Trusted(folder)
        found.go()
        found.begin()
        found.seal("one")
        yield found


def test_the_tpm_goes_with_snapshots_and_memory(trusted: Trusted) -> None:
    first = trusted.register()
    trusted("snapshot web1 s1 --memory")
    assert trusted.run_state() == "running"
    trusted.seal("two")
    assert trusted.sealed() == "two" and trusted.register() != first
    said = trusted("revert web1 s1", status=REFUSED).err
    assert "serves one QEMU alone" in said and "snaptree stop" in said
    trusted.seal("three")
    third = trusted.register()
    trusted("snapshot web1 s3 --memory")
    trusted("stop web1 --force")
    trusted("revert web1 s1")
    assert trusted.run_state() == "running"
    assert trusted.sealed() == "one" and trusted.register() == first, "it goes on from the instant"
    trusted("stop web1 --force")
    # Without memory its register begins anew, and what it keeps is that of the snapshot.
    trusted("revert web1 s3 --no-memory --discard --running")
    trusted.command_of(0x144, b"\0\0", authorised=False)
    assert trusted.sealed() == "three" and trusted.register() != third
    trusted("stop web1 --force")
    trusted("revert web1 s3 --discard")
    assert trusted.sealed() == "three" and trusted.register() == third
    trusted.sound()


def test_a_load_that_fails_leaves_the_tpm_as_it_was(trusted: Trusted) -> None:
    trusted("snapshot web1 s1 --memory")
    trusted.seal("two")
    trusted("stop web1 --force")
    file = Path(trusted.names()["s1"]["memory"])
    content = file.read_bytes()
    start = trusted.start_command()
    trusted("set web1 --start 'qemu-system-x86_64 -nonsense'")
    trusted("revert web1 s1", status=FAILED)
    trusted(f"set web1 --start {shlex.quote(start)}")
    trusted("start web1")
    trusted.go()
    trusted.command_of(0x144, b"\0\0", authorised=False)
    assert trusted.sealed() == "two" and file.read_bytes() == content
    trusted.sound()


def test_small_files_are_told_apart(tmp_path: Path) -> None:
    """Content alone counts: a time of change may be the same when it is not."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "a").write_bytes(b"x" * (1 << 20) + b"y")
    assert small.same(str(one), str(other))
    for change in (b"x" * (1 << 20) + b"z", b"x" * (1 << 20)):
        (other / "a").write_bytes(change)
        assert not small.same(str(one), str(other))
    (other / "a").write_bytes((one / "a").read_bytes())
    (other / "b").touch()
    assert not small.same(str(one), str(other)) and not small.same(str(one), str(tmp_path / "nothing"))
    assert not small.same(str(one / "a"), str(other))
