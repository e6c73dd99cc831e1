"""Machines that run: started by snaptree or by somebody else, found running, paused or off, and stopped."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from pathlib import Path

import pytest
from tests.kit import guest, images
from tests.kit.by_hand import QUICK, WAYS, by_hand
from tests.kit.qmp import Qmp
from tests.kit.records import DISK_BYTES
from tests.kit.space import held
from tests.kit.stage import Stage

EMPTY = "qemu-system-x86_64 -nodefaults -machine q35 -accel tcg -m 64 -display none"
"""A machine that has nothing to boot."""


def state(stage: Stage) -> str:
    found: str = stage.show()["state"]
    return found


def test_a_machine_is_started_found_and_shut_down(stage: Stage) -> None:
    stage.add("--start", stage.boot.command(stage.folder))
    assert state(stage) == "off"
    assert "{vda}" not in stage("start web1 --plan").out
    assert state(stage) == "off"
    assert stage("start web1 --json").json == {"machine": "web1", "state": "running"}
    assert state(stage) == "running"
    assert (stage.monitor.stat().st_mode & 0o777, stage.monitor.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    stage.guest.go()
    assert "running already" in stage("start web1", status=5).err
    with stage.qmp() as qmp:
        qmp("stop")
    assert state(stage) == "paused"
    assert "paused" in stage("stop web1", status=6).err
    with stage.qmp() as qmp:
        qmp("cont")
    stage.guest.writes_on()
    stage.finish()
    assert state(stage) == "off"
    assert "it was off" in stage("stop web1").out
    assert not stage.monitor.exists()


def test_a_guest_that_does_not_listen_is_turned_off(stage: Stage) -> None:
    stage.add("--start", EMPTY)
    stage("start web1")
    assert "turn it off" in stage("stop web1 --force --plan").out
    assert "turned off" in stage("stop web1 --within 0.5").out
    stage("start web1")
    assert "turned off" in stage("stop web1 --force").out
    stage.sound()


def test_disks_get_their_places_or_devices(stage: Stage) -> None:
    stage.add("--start", EMPTY)
    stage("start web1")
    with stage.qmp() as qmp:
        assert {each["qdev"].split("/")[-2] for each in qmp("query-block") if "inserted" in each} == {"vda", "vdb"}
    stage("stop web1 --force")
    stage(f"set web1 --start '{EMPTY} -device virtio-blk-pci,drive={{vda}},id=mine'")
    assert "no place for disk vdb" in stage("start web1", status=2).err
    stage(f"set web1 --start '{EMPTY} -device virtio-blk-pci,drive={{vdc}}'")
    assert "vdc" in stage("start web1", status=2).err


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        ("qemu-system-x86_64 -nonsense", 12, "nonsense"),
        ("qemu-of-nobody -m 64", 12, "not installed"),
        ("sleep 0.1", 12, "ended with"),
    ],
)
def test_what_does_not_start_leaves_nothing(stage: Stage, command: str, status: int, words: str) -> None:
    stage.add("--start", command)
    assert words in stage("start web1", status=status).err
    assert state(stage) == "off"
    assert not stage.monitor.exists()
    stage.sound()


def test_start_commands_that_cannot_be(stage: Stage) -> None:
    stage.add()
    assert "no start command" in stage("start web1", status=2).err
    assert "quotes" in stage('set web1 --start "\'unended"', status=2).err
    assert "-daemonize" in stage("set web1 --start 'qemu-system-x86_64 -daemonize'", status=2).err
    stage(f"set web1 --start '{EMPTY} -drive file={stage.disks}/vda.qcow2,format=qcow2'")
    assert "belongs to disk vda" in stage("start web1", status=6).err
    stage("set web1 --start ''")
    assert "no start command" in stage("start web1", status=2).err


def test_a_start_command_is_run_where_it_was_stored(stage: Stage) -> None:
    (stage.disks / "options").write_text('[machine]\n  type = "q35"\n')
    stage.add("--start", "qemu-system-x86_64 -nodefaults -accel tcg -display none -readconfig options")
    stage("start web1")
    stage("stop web1 --force")


def test_a_disk_that_somebody_has_open_is_not_started_on(stage: Stage) -> None:
    stage.add("--start", EMPTY)
    with held(stage.path("main")):
        said = stage("start web1", status=5).err
        assert "qemu-io" in said and "--qmp" in said
        assert state(stage) == "unknown"
    assert state(stage) == "off"


# ---- a QEMU that somebody else started ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_a_machine_that_somebody_started_is_taken_and_its_disks_are_frozen(
    stage: Stage, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.make()
    monkeypatch.chdir(stage.disks)
    stage.guest = by_hand(stage, way)
    assert stage.guest.process is not None
    stage.guest.go()
    assert "open for writing" in stage("add web1 --disk vda.qcow2", status=5).err
    stage(f"add web1 --disk vda.qcow2 --disk vdb.raw,format=raw --qmp {stage.folder}/qmp")
    assert state(stage) == "running"

    stage("snapshot web1 s1")

    stage.guest.writes_on()
    stage("snapshot web1 s2")
    stage.guest.writes_on()
    assert 0 < stage.holds("s1")[0] < stage.holds("s2")[0]
    stage.finish()
    assert stage.guest.process.wait(10) == 0
    assert "one that you start" in stage("start web1", status=6).err
    # Once it is known how, snaptree can as well.
    stage(f"set web1 --start '{EMPTY}'")
    stage("start web1")
    assert state(stage) == "running"
    stage("stop web1 --force")
    assert state(stage) == "off"


# ---- sockets that are not what they should be ----------------------------------------------------------------------


class Listener:
    """Somebody who listens on a socket and says something, once, to each that connects."""

    def __init__(self, path: Path, says: bytes) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(5)
        self._says = says
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connections = []
        while True:
            try:
                each, _ = self._socket.accept()
            except OSError:
                return
            connections.append(each)
            with contextlib.suppress(BrokenPipeError):
                each.sendall(self._says)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.mark.parametrize("says", [b"", b"SSH-2.0-OpenSSH\r\n", b'{"hello": 1}\r\n'], ids=["nothing", "ssh", "json"])
def test_a_socket_that_is_no_monitor(stage: Stage, says: bytes) -> None:
    stage.add("--qmp", str(stage.folder / "qmp"))
    there = Listener(stage.folder / "qmp", says)
    began = time.monotonic()
    said = stage("snapshot web1 s1", status=6)
    assert "does not answer on its monitor" in said.err
    assert state(stage) == "unknown" and time.monotonic() - began < 30
    there.close()
    stage("snapshot web1 s1")
    stage.sound()


def test_a_monitor_that_is_no_socket_or_gone(stage: Stage) -> None:
    stage.add("--qmp", str(stage.folder / "nowhere"))
    assert state(stage) == "off"
    stage("snapshot web1 s1")
    (stage.folder / "file").write_text("")
    stage(f"set web1 --qmp {stage.folder}/file")
    assert state(stage) == "off"
    with held(stage.path("main")):
        assert "is not a socket" in stage("snapshot web1 s2", status=6).err


def test_a_monitor_that_another_client_holds(stage: Stage) -> None:
    guest_ = stage.start()
    with stage.qmp():
        assert state(stage) == "running"
        said = stage("snapshot web1 s1", status=6)
        assert "is another client connected?" in said.err
    guest_.writes_on()
    stage("snapshot web1 s1")
    stage.finish()


def test_a_monitor_of_another_machine(stage: Stage) -> None:
    """The machine itself is off, or runs elsewhere."""
    stage.add("--qmp", str(stage.folder / "qmp"))
    other = images.create(stage.folder / "other.qcow2", DISK_BYTES)
    words = [*EMPTY.split(), "-drive", f"file={other},format=qcow2"]
    running = guest.launch([*words, "-qmp", f"unix:{stage.folder}/qmp,server=on,wait=off"], stage.folder)
    assert running.process is not None
    try:
        Qmp(stage.folder / "qmp").close()
        assert "another machine" in stage.show()["state_detail"] and state(stage) == "off"
        stage("snapshot web1 s1")
        with held(stage.path("main")):
            said = stage("snapshot web1 s2", status=6)
            assert "has not" in said.err and "vda" in said.err
    finally:
        guest.end(running.process)
    stage.sound()


def test_a_graph_that_is_not_the_tree(stage: Stage) -> None:
    """Somebody has taken a snapshot by hand, and snaptree has not heard of it."""
    guest_ = stage.start()
    stage("snapshot web1 s1")
    before = stage.files()
    overlay = images.create(stage.folder / "mine.qcow2", DISK_BYTES)
    with stage.qmp() as qmp:
        tip = next(
            each["inserted"]["node-name"]
            for each in qmp("query-block")
            if each["qdev"].startswith("/machine/peripheral/vda")
        )
        mine = {"driver": "qcow2", "node-name": "mine", "file": {"driver": "file", "filename": str(overlay)}}
        qmp("blockdev-add", **mine, backing=None)
        qmp("blockdev-snapshot", node=tip, overlay="mine")
    assert state(stage) == "unknown"
    said = stage("snapshot web1 s2 --json", status=6)
    assert json.loads(said.out)["error"]["code"] == "refused" and "vda" in said.err
    assert stage.files() == before
    guest_.writes_on()
