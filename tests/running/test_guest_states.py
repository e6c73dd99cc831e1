"""A guest that does not run, and has not been paused either: it sleeps (ACPI S3), has shut down, or has panicked.

Saved in a form for which it waits, QEMU is in ``postmigrate`` afterwards and has forgotten that. One that sleeps cannot
be woken up any more then, and ``cont`` ends QEMU 10.0.2 ("invalid runstate transition").
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.kit.stage import processes_of
from tests.kit.steps import at_command
from tests.kit.still import placed
from tests.running.test_in_the_middle import TwoMonitors

from snaptree.errors import ToolError
from snaptree.model.memory import BACKGROUND, MAPPED, PLAIN
from snaptree.qemu import memory
from snaptree.qemu.memory import Followed
from snaptree.qemu.session import QmpSession

POWER = (
    b"\xba\xf8\x0c\x66\xb8\x40\xf8\x00\x80\x66\xef\xba\xfc\x0c\x66\xb8\x01\x06\x00\x00\x66\xef"
    b"\xba\xf8\x0c\x66\xb8\x44\xf8\x00\x80\x66\xef\xba\xfc\x0c\xb0\x80\xee\xba\x04\x06\xb8\x00%c\xef\xf4\xeb\xfd"
)
"""PMBASE = 0x600, ACPI on, SLP_EN with the type of a state: what a guest does that goes to sleep, or off."""
CODES = {
    "suspended": POWER % 0x24,
    "shutdown": POWER % 0x20,
    "guest-panicked": b"\xba\x05\x05\xb0\x01\xee\xf4\xeb\xfd",
}
"""What a guest does that comes into a state, as the firmware of a processor of 1978."""


class Doing(TwoMonitors):
    """The machine with a guest that comes into a run state when it is told to go on."""

    def __init__(self, folder: Path, state: str) -> None:
        code = CODES[state].ljust(0xFFF0, b"\xf4")
        # The processor begins 16 bytes before the end, and jumps to the code.
        (folder / "rom").write_bytes(code + b"\xe9\x0d\x00".ljust(16, b"\xf4"))
        super().__init__(folder)

    def start_command(self) -> str:
        words = f"-bios {self.folder}/rom -no-shutdown -device pvpanic -action panic=pause"
        return f"{super().start_command()} {words}"

    def doing(self) -> str:
        """QEMU's word for what it does."""
        with self.second() as qmp:
            return str(qmp("query-status")["status"])

    def comes_into(self, state: str) -> None:
        """Let the guest go on, and wait until it has come into the state."""
        with self.second() as qmp:
            qmp("cont")
        until = time.monotonic() + 20
        while self.doing() != state:
            assert time.monotonic() < until, self.doing()
            time.sleep(0.05)

    def wakes_up(self) -> None:
        """See that a guest that sleeps can be woken up, in the process that it is in."""
        before = processes_of(self.folder)
        assert self.doing() == "suspended"
        with self.second() as qmp:
            for each in ("stop", "cont", "system_wakeup"):
                qmp(each)
        assert processes_of(self.folder) == before, "QEMU has died"


@pytest.mark.parametrize("line", ["snapshot web1 m --memory", "snapshot web1 s", "snapshot web1 i --internal"])
def test_a_guest_that_sleeps_can_be_woken_up_afterwards(line: str) -> None:
    with placed() as folder:
        still = Doing(folder, "suspended")
        still.comes_into("suspended")
        still(line)
        still.wakes_up()
        still.sound()


def test_gone_back_to_it_sleeps_as_it_did() -> None:
    """It is not paused, which it was not: nobody would know that it is to be told to go on."""
    with placed() as folder:
        still = Doing(folder, "suspended")
        still.comes_into("suspended")
        still("snapshot web1 m --memory")
        still.write(".x")
        plan = still("revert web1 m --discard --paused --plan --json").json
        assert any("and is paused then" in each for each in plan["notes"])
        still("revert web1 m --discard")
        still.wakes_up()
        assert still.shows() == "b......."
        still("revert web1 m --discard --paused")
        assert still.doing() == "paused"
        still.sound()


@pytest.mark.parametrize("forms", [(BACKGROUND, PLAIN), (MAPPED, PLAIN), (PLAIN,)], ids=lambda forms: forms[0])
def test_one_that_slept_when_it_was_paused(forms: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU says that it is paused, and no more. It goes on as one that sleeps; where it can only be saved while it
    waits QEMU forgets that, and ends when it is told to go on: what was saved has it all the same.
    """
    with placed() as folder:
        still = Doing(folder, "suspended")
        still.comes_into("suspended")
        with still.second() as qmp:
            qmp("stop")
        assert still.doing() == "paused" == still.show()["state"]
        with monkeypatch.context() as patched:
            patched.setattr(memory, "forms_known", lambda found: forms)
            still("snapshot web1 m --memory")
        still.write(".x")
        with still.second() as qmp:
            if forms[0] == BACKGROUND:
                qmp("cont")
            else:
                with pytest.raises((AssertionError, OSError)):
                    qmp("cont")
        if forms[0] != BACKGROUND:
            still.forgiven.add("leaks")
            until = time.monotonic() + 20
            while processes_of(folder):
                assert time.monotonic() < until, "QEMU knows by now what it does: say so in README.md"
                time.sleep(0.05)
            assert still.show()["state"] == "off"
        else:
            still.wakes_up()
        assert still.shows() == "bx......"
        still("revert web1 m --discard --running")
        still.wakes_up()
        assert still.shows() == "b......."
        still.sound()


def test_a_guest_that_sleeps_is_not_saved_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where QEMU does not save in the background, and where the memory is parked."""
    with placed() as folder:
        still = Doing(folder, "suspended")
        still("snapshot web1 s1")
        still.comes_into("suspended")
        still("snapshot web1 m --memory")
        still.write(".x")
        before = still.files()
        assert "sleeps" in still("revert web1 m", status=6).err
        with monkeypatch.context() as patched:
            patched.setattr(memory, "forms_known", lambda found: (MAPPED, PLAIN))
            assert "sleeps" in still("snapshot web1 n --memory", status=6).err
        assert still.files() == before
        still.wakes_up()
        still.sound()


@pytest.mark.parametrize("state", ["suspended", "shutdown"])
def test_it_comes_into_that_state_when_it_is_about_to_be_saved(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    until_instant = memory.until_instant

    async def fails_in_background(qmp: QmpSession, form: str, followed: Followed) -> None:
        if form == BACKGROUND:
            raise ToolError("a device is in the way")
        await until_instant(qmp, form, followed)

    with placed() as folder, monkeypatch.context() as patched:
        still = Doing(folder, state)
        before = still.files()
        came = at_command(patched, "query-yank", lambda: still.comes_into(state))
        patched.setattr(memory, "until_instant", fails_in_background)
        still("snapshot web1 m --memory", status=12)
        assert came() and still.doing() == state and still.files() == before
        still.sound()


@pytest.mark.parametrize("state", ["shutdown", "guest-panicked"])
def test_what_would_be_forgotten_is_not_saved(state: str) -> None:
    with placed() as folder:
        still = Doing(folder, state)
        still("snapshot web1 m --memory")
        still.write(".x")
        still.comes_into(state)
        before = still.files()
        for line in ("snapshot web1 n --memory", "revert web1 m"):
            assert "QEMU would forget" in still(line, status=6).err
        assert still.files() == before and still.doing() == state
        still("snapshot web1 s")
        assert still.doing() == state
        still.sound()
