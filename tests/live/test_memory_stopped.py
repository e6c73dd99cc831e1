"""The saving of memory fails, or is stopped, while the guest waits for it: it is ended, and then the guest goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.kit import guest as guest_kit
from tests.kit.programs import killed
from tests.kit.stage import Stage
from tests.live.test_memory import cancelled, go_back_and_agree, settings
from tests.live.test_memory_back_killed import kill_one
from tests.running.test_firmware import arranged

from snaptree.errors import ToolError
from snaptree.model.memory import BACKGROUND
from snaptree.qemu import memory
from snaptree.qemu.memory import Followed, Settings
from snaptree.qemu.running import RunningQemu
from snaptree.qemu.session import QmpSession

SPEED = 20 << 20
"""In bytes per second: saving is not over by the time at which it is ended. What is saved in the background is not
limited by QEMU (10.0.2)."""


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that monitors are told, in its order; memory is saved slowly."""
    told, real, use = list[str](), QmpSession.execute, memory.use

    async def slowly(qmp: QmpSession, before: Settings, form: str, speed: int) -> None:
        await use(qmp, before, form, SPEED)

    monkeypatch.setattr(memory, "use", slowly)

    async def executed(self: QmpSession, command: str, **more: Any) -> Any:
        told.append(command)
        return await real(self, command, **more)

    monkeypatch.setattr(QmpSession, "execute", executed)
    return told


def after_stop(said: list[str]) -> list[str]:
    """What was told since the guest was stopped, of that which has to do with it."""
    return [each for each in said[said.index("stop") :] if each in ("migrate", "migrate_cancel", "cont")]


def test_what_waits_for_its_memory_goes_on_when_it_fails(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    guest = stage.start(raw=False)
    guest.writes_on()
    before = stage.files(), settings(stage)

    async def failing(*arguments: Any) -> None:
        raise ToolError("it cannot")

    with monkeypatch.context() as patched:
        patched.setattr(memory, "forms_known", lambda found: ("plain",))
        patched.setattr(memory, "until_instant", failing)
        said.clear()
        stage("snapshot web1 s1 --memory", status=12)
    assert after_stop(said) == ["migrate", "migrate_cancel", "cont"]
    assert (stage.files(), settings(stage)) == before
    assert "s1" not in stage.names() and stage.show()["pending"] == []
    guest.writes_on()
    stage.finish()


@pytest.mark.skipif(not guest_kit.knows(8, 1), reason="no memory is saved in the background there")
def test_what_was_begun_in_the_background_is_ended(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    guest, real = stage.start(raw=False), memory.until_instant

    async def failing(qmp: QmpSession, form: str, followed: Followed) -> None:
        if form == BACKGROUND:
            raise ToolError("a device is in the way")
        await real(qmp, form, followed)

    monkeypatch.setattr(memory, "until_instant", failing)
    said.clear()
    assert "the memory was saved while the guest waited" in stage("snapshot web1 s1 --memory").out
    assert after_stop(said)[:3] == ["migrate", "migrate_cancel", "migrate"]
    guest.writes_on()
    monkeypatch.undo()
    go_back_and_agree(stage, "s1")


@pytest.fixture
def lasting(stage: Stage) -> Stage:
    """It runs, with a memory that it can go back to."""
    stage.start(raw=False).writes_on()
    stage("snapshot web1 s1 --memory")
    stage.guest.writes_on()
    return stage


def goes_on(stage: Stage, before: object) -> None:
    """See that all is as it was."""
    assert (stage.files(), settings(stage)) == before
    assert set(stage.names()) == {"s1", "main"} and stage.show()["pending"] == []
    stage.guest.writes_on()
    stage.finish()


def test_stopped_while_the_memory_of_now_is_saved(
    lasting: Stage, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    stage = lasting
    before = stage.files(), settings(stage)
    with monkeypatch.context() as patched:
        patched.setattr(memory, "until_done", cancelled)
        said.clear()
        stage("revert web1 s1", status=130)
    assert after_stop(said) == ["migrate", "migrate_cancel", "cont"]
    goes_on(stage, before)


def test_the_new_qemu_dies_when_it_is_to_go_on(lasting: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old guest goes on, although the journal has it that the new one does."""
    stage, real = lasting, QmpSession.execute
    before = stage.files(), settings(stage)
    killed: list[str] = []

    async def executed(self: QmpSession, command: str, **more: Any) -> Any:
        if command == "cont" and not killed:
            killed.append(command)
            kill_one(stage, new=True)
        return await real(self, command, **more)

    with monkeypatch.context() as patched:
        patched.setattr(QmpSession, "execute", executed)
        stage("revert web1 s1", status=12)
    assert killed
    goes_on(stage, before)


@pytest.fixture
def dripping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Memory is saved into a pipe out of which it drips until the test is over: the saving lasts for minutes."""
    pipe, over = tmp_path / "pipe", threading.Event()
    os.mkfifo(pipe)
    lend, reader = memory.lend, os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    async def into_pipe(qemu: RunningQemu, descriptor: int, known: Sequence[str]) -> memory.Lent:
        writer = os.open(pipe, os.O_WRONLY)
        try:
            return await lend(qemu, writer, ())
        finally:
            os.close(writer)

    def drip() -> None:
        while not over.wait(0.05):
            with suppress(BlockingIOError):
                os.read(reader, 16 << 10)

    monkeypatch.setattr(memory, "lend", into_pipe)
    reading = threading.Thread(target=drip)
    reading.start()
    try:
        yield
    finally:
        over.set()
        reading.join()
        os.close(reader)


def test_what_is_still_being_saved_after_a_kill_is_ended(stage: Stage, said: list[str], dripping: None) -> None:
    """The guest ran on, and nobody knew yet in which form its memory was being saved."""
    guest = stage.start(raw=False)
    guest.writes_on()
    before = settings(stage)
    killed(lambda: stage("snapshot web1 s1 --memory"), arranged("after"))
    said.clear()
    stage("recover web1")
    assert "migrate_cancel" in said and settings(stage) == before
    assert "s1" not in stage.names()
    guest.writes_on()
    stage("gc web1")
    stage.finish()
