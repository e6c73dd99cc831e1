"""Snapshots with the guest's file systems frozen by its agent, the real one, and by agents that are not one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.kit import agent_guest
from tests.kit.agent_guest import AgentStage
from tests.kit.guest import Boot
from tests.kit.stage import kill_all, processes_of

from snaptree.qemu import agent
from snaptree.qemu.agent import GuestAgent


@pytest.fixture(scope="module")
def agent_boot(tmp_path_factory: pytest.TempPathFactory) -> Boot:
    return agent_guest.boot(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def one(agent_boot: Boot) -> Iterator[AgentStage]:
    """One machine for all tests: each leaves its guest writing."""
    folder = Path(tempfile.mkdtemp(prefix="live"))
    stage = AgentStage(folder, agent_boot)
    try:
        stage.start()
        yield stage
    finally:
        kill_all(folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def quiet(one: AgentStage) -> Iterator[AgentStage]:
    """The machine, whose guest writes before and after the test, and of which nothing is over."""
    one.goes_on()
    before = set(one.names())
    yield one
    one.goes_on()
    for name in sorted(set(one.names()) - before):
        one(f"delete web1 {name}")
    assert one.show()["pending"] == []
    one.sound()


def answers(stage: AgentStage, seconds: float = 30.0) -> None:
    """Wait until the real agent answers."""
    until = time.monotonic() + seconds
    while True:
        try:
            GuestAgent.connect(str(stage.channel)).close()
            return
        except Exception:
            assert time.monotonic() < until
            time.sleep(0.1)


def test_all_that_the_guest_has_written_is_in_the_snapshot(quiet: AgentStage) -> None:
    answers(quiet)
    quiet("snapshot web1 crash")
    written = quiet.written_lines()
    plan = quiet("snapshot web1 q1 --quiesce --plan --json").json
    assert any("quiesced" in each["summary"] for each in plan["steps"]) and plan["guest_pause"] > 0

    began = time.monotonic()
    quiet("snapshot web1 q1 --quiesce")
    took = time.monotonic() - began

    quiet.goes_on()
    assert quiet.names()["q1"]["consistency"] == "quiesced"
    assert quiet.names()["crash"]["consistency"] == "crash"
    assert "quiesced" in quiet("show web1 q1").out and "quiesced" in quiet("tree web1").out
    assert quiet.lines_in("q1") >= written
    # Without the agent the guest's last lines are in its memory, and its journal is open.
    needs, count = quiet.looked_at("crash")
    assert needs and count < written
    assert took < 30


def test_an_internal_snapshot_is_quiesced_too(quiet: AgentStage) -> None:
    answers(quiet)
    written = quiet.written_lines()
    quiet("snapshot web1 i1 --internal --quiesce")
    quiet.goes_on()
    found = quiet.names()["i1"]
    assert found["consistency"] == "quiesced" and found["kind"] != "external"
    assert quiet.lines_in("i1") >= written


def test_one_after_the_other_and_from_a_program(quiet: AgentStage) -> None:
    import asyncio

    import snaptree

    written = {}

    async def story() -> None:
        async with snaptree.connect(str(quiet.state)) as machines:
            for number in range(3):
                written[f"p{number}"] = quiet.written_lines()
                await machines["web1"].snapshot(f"p{number}", quiesce=True)

    asyncio.run(story())
    for name, count in written.items():
        assert quiet.lines_in(name) >= count


FROZEN = """
import contextlib, sys, time
from snaptree.running.carry import live
real = live.quiesced
@contextlib.asynccontextmanager
async def slow(*words):
    async with real(*words):
        print("frozen", flush=True)
        time.sleep(60)
        yield
live.quiesced = slow
from snaptree.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


def frozen(stage: AgentStage, name: str) -> subprocess.Popen[str]:
    """Begin a snapshot that stands still while the guest is frozen."""
    place = {**os.environ, "SNAPTREE_STATE": str(stage.state)}
    words = [sys.executable, "-c", FROZEN, "snapshot", "web1", name, "--quiesce"]
    process = subprocess.Popen(words, env=place, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "frozen\n"
    at = stage.written_lines()
    time.sleep(1.0)
    assert stage.written_lines() <= at + 1, "the guest writes on"
    return process


def test_snaptree_killed_while_the_guest_is_frozen(quiet: AgentStage) -> None:
    process = frozen(quiet, "lost")
    process.kill()
    process.communicate()
    quiet.goes_on()
    quiet("recover web1")
    assert "lost" not in quiet.names()
    quiet.sound()
    quiet("snapshot web1 q2 --quiesce")


def test_snaptree_and_its_guard_killed_while_the_guest_is_frozen(quiet: AgentStage) -> None:
    """Whatever is left frozen is thawed by the recovery."""
    process = frozen(quiet, "lost")
    (guard,) = _guards(quiet)
    os.kill(guard, signal.SIGKILL)
    process.kill()
    process.communicate()
    at = quiet.written_lines()
    time.sleep(1.0)
    assert quiet.written_lines() <= at + 1
    quiet("recover web1")
    quiet.goes_on()
    assert "lost" not in quiet.names()


def _guards(stage: AgentStage) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"snaptree.running.quiescing" in words and os.fsencode(stage.channel) in words:
                found.append(int(process.name))
    return found


def test_an_agent_that_hangs(quiet: AgentStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "ANSWER_SECONDS", 1.5)
    before = quiet.files()
    quiet.guest.tell("killall -STOP qemu-ga")
    time.sleep(0.5)
    began = time.monotonic()
    said = quiet("snapshot web1 s --quiesce", status=12).err
    assert "does not answer" in said and time.monotonic() - began < 15
    quiet.goes_on()
    assert quiet.files() == before and "s" not in quiet.names()
    quiet.guest.tell("killall -CONT qemu-ga")
    answers(quiet)
    quiet("snapshot web1 s --quiesce")


def test_a_guest_without_an_agent(quiet: AgentStage) -> None:
    before = quiet.files()
    quiet.guest.tell("killall -9 qemu-ga")
    time.sleep(1.0)
    said = quiet("snapshot web1 s --quiesce", status=12).err
    assert "no agent listens in the guest" in said and "--quiesce" in said
    assert quiet.files() == before and "s" not in quiet.names()
    quiet.guest.tell("/usr/sbin/qemu-ga -m virtio-serial -p /dev/vport*p1 -t /run > /dev/null 2>&1 &")
    answers(quiet)
    quiet("snapshot web1 s --quiesce")


def test_a_channel_that_somebody_else_has(quiet: AgentStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "ANSWER_SECONDS", 1.0)
    answers(quiet)
    with contextlib.closing(GuestAgent.connect(str(quiet.channel))):
        assert "does not answer" in quiet("snapshot web1 s --quiesce", status=12).err
    quiet.goes_on()


def test_what_somebody_else_has_frozen_is_not_thawed(quiet: AgentStage) -> None:
    answers(quiet)
    with contextlib.closing(GuestAgent.connect(str(quiet.channel))) as mine:
        assert mine.freeze() > 0
    assert "frozen already" in quiet("snapshot web1 s --quiesce", status=5).err
    at = quiet.written_lines()
    time.sleep(0.5)
    assert quiet.written_lines() <= at + 1
    with contextlib.closing(GuestAgent.connect(str(quiet.channel))) as mine:
        mine.thaw()


def test_paused_or_off(quiet: AgentStage) -> None:
    with quiet.qmp() as qmp:
        qmp("stop")
    assert "is paused" in quiet("snapshot web1 s --quiesce", status=6).err
    with quiet.qmp() as qmp:
        qmp("cont")


# ---- agents that are not what they say ----------------------------------------------------------------------------


class Fake:
    """Somebody who listens on a socket in an agent's place; ``asked`` is what it was told."""

    def __init__(self, path: Path, way: str) -> None:
        self.asked: list[str] = []
        self._way = way
        self._frozen = False
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(5)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with contextlib.suppress(OSError), connection:
                    self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        if self._way == "closes":
            return
        if self._way == "says old things":
            connection.sendall(b'{"return": 7}\n\xff\xff{"return": {}}\nrubbish{{\n')
        for line in connection.makefile("rb"):
            said: dict[str, Any] = json.loads(line.lstrip(b"\xff"))
            self.asked.append(said["execute"])
            answer = self._answer(said)
            if answer is not None:
                connection.sendall(answer)

    def _answer(self, said: dict[str, Any]) -> bytes | None:
        command, way = said["execute"], self._way
        if way == "says nothing":
            return None
        if way == "talks nonsense":
            return b"\x00hello\xff\xfe[[[\n"
        if way == "talks without end":
            return b"x" * (2 << 20)
        if command == "guest-sync-delimited":
            return b"\xff" + _line({"return": said["arguments"]["id"]})
        if command == "guest-fsfreeze-status":
            return _line({"return": "frozen" if self._frozen else "thawed"})
        if command == "guest-fsfreeze-freeze":
            if way == "goes away":
                self._socket.close()
                raise OSError
            if way == "freezes for long":
                time.sleep(FOR_LONG)
            self._frozen = way not in ("refuses", "has nothing to freeze")
            refused = {"error": {"class": "CommandNotFound", "desc": "the command is disabled"}}
            return {
                "refuses": _line(refused),
                "has nothing to freeze": _line({"return": 0}),
                "freezes in silence": None,
                "says that it has frozen a text": _line({"return": "all"}),
                "says neither yes nor no": _line({"hello": 1}),
            }.get(way, _line({"return": 2}))
        if command == "guest-fsfreeze-thaw" and way != "never thaws":
            self._frozen = False
            return _line({"return": 2})
        return _line({"error": {"desc": "no"}})

    @property
    def frozen(self) -> bool:
        return self._frozen


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


FOR_LONG = 5.0
STRANGE = {
    "closes": "went away",
    "says nothing": "does not answer",
    "talks nonsense": "does not answer",
    "talks without end": "without end",
    "refuses": "the command is disabled",
    "has nothing to freeze": "no file system",
    "freezes in silence": "does not answer",
    "says that it has frozen a text": "'all'",
    "says neither yes nor no": "makes no sense",
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "ANSWER_SECONDS", 0.7)
    monkeypatch.setattr(agent, "FREEZE_SECONDS", 0.7)
    monkeypatch.setattr(agent, "THAW_SECONDS", 2.0)


@pytest.mark.parametrize("way", STRANGE)
def test_a_strange_agent(quiet: AgentStage, way: str, impatient: None) -> None:
    path = quiet.folder / f"fake-{len(list(quiet.folder.iterdir()))}"
    fake = Fake(path, way)
    before = quiet.files()
    quiet(f"set web1 --agent {path}")
    said = quiet("snapshot web1 s --quiesce", status=12).err
    assert STRANGE[way] in said
    assert not fake.frozen and ("guest-fsfreeze-thaw" in fake.asked) == ("guest-fsfreeze-freeze" in fake.asked)
    assert quiet.files() == before and "s" not in quiet.names() and quiet.show()["pending"] == []
    quiet("set web1 --agent ''")


def test_what_was_in_the_channel_before_is_passed_over(quiet: AgentStage, impatient: None) -> None:
    fake = Fake(quiet.folder / "fake-old", "says old things")
    quiet(f"set web1 --agent {quiet.folder}/fake-old")
    quiet("snapshot web1 s --quiesce")
    quiet("set web1 --agent ''")
    assert fake.asked.count("guest-fsfreeze-freeze") == 1 and not fake.frozen


def test_an_agent_that_goes_away_while_it_freezes(quiet: AgentStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it, and nobody is left behind."""
    Fake(quiet.folder / "fake-gone", "goes away")
    quiet(f"set web1 --agent {quiet.folder}/fake-gone")
    since = time.monotonic()
    assert "went away" in quiet("snapshot web1 s --quiesce", status=12).err
    assert time.monotonic() - since < 10
    quiet("set web1 --agent ''")
    assert "s" not in quiet.names()
    found = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if b"fake-gone" in path.read_bytes()]
    assert found == []


def test_one_that_freezes_for_longer_than_it_is_waited_for(quiet: AgentStage, impatient: None) -> None:
    """It is thawed when it is done at last, though all others have gone home."""
    fake = Fake(quiet.folder / "fake-slow", "freezes for long")
    quiet(f"set web1 --agent {quiet.folder}/fake-slow")
    since = time.monotonic()
    assert "does not answer" in quiet("snapshot web1 s --quiesce", status=12).err
    assert time.monotonic() - since < FOR_LONG and "s" not in quiet.names()
    quiet("set web1 --agent ''")
    while "guest-fsfreeze-thaw" not in fake.asked or fake.frozen:
        assert time.monotonic() - since < FOR_LONG + 10
        time.sleep(0.05)


def test_a_guest_that_does_not_thaw_is_told_of(quiet: AgentStage, impatient: None) -> None:
    """The snapshot has been taken; the user must see to the guest."""
    Fake(quiet.folder / "fake-ice", "never thaws")
    quiet(f"set web1 --agent {quiet.folder}/fake-ice")
    said = quiet("snapshot web1 s --quiesce", status=12).err
    assert "does not thaw" in said and "fsfreeze -u" in said and "recover web1" in said
    quiet("set web1 --agent ''")
    assert "s" in quiet.names()


def test_a_socket_that_is_not_there(quiet: AgentStage) -> None:
    quiet(f"set web1 --agent {quiet.folder}/none")
    assert "nothing listens" in quiet("snapshot web1 s --quiesce", status=3).err
    quiet("set web1 --agent ''")


def test_a_machine_without_a_channel_and_one_that_is_off(one: AgentStage) -> None:
    """The last: the machine is stopped."""
    one.goes_on()
    one("stop web1 --force")
    said = one("snapshot web1 off --quiesce").out
    assert "nothing to quiesce" in said and one.names()["off"]["consistency"] == "off"
    command = "qemu-system-x86_64 -nodefaults -machine q35 -accel tcg -m 64 -display none"
    one(f"set web1 --start '{command}'")
    one("start web1")
    assert "no channel for a guest agent" in one("snapshot web1 s --quiesce", status=3).err
    one("stop web1 --force")
    assert processes_of(one.folder) == []
