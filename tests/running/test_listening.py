"""What a running operation hears: questions, nonsense and silence; and who may ask."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snaptree.errors import RefusedError, ToolError
from snaptree.running import calling, listening, sockets
from snaptree.running.control import Control


@pytest.fixture
def control() -> Control:
    return Control("web1", "delete")


@pytest.fixture
def name(tmp_path: Path, control: Control) -> Iterator[str]:
    """The socket of an operation that is under way in this process."""
    with listening.heard(str(tmp_path), control):
        (found,) = sockets.names(str(tmp_path))
        yield found


def connected(state: Path, name: str) -> socket.socket:
    found = sockets.connect(str(state), name, 5.0)
    assert found is not None
    found.settimeout(10.0)
    return found


def said(state: Path, name: str, words: bytes) -> bytes:
    """What is answered to these bytes, until the connection is closed."""
    with connected(state, name) as asker:
        asker.sendall(words)
        answer = b""
        while data := asker.recv(65536):
            answer += data
        return answer


def test_it_tells_and_obeys(tmp_path: Path, control: Control, name: str) -> None:
    heard = calling.call(str(tmp_path), name)
    assert heard is not None and heard.process == os.getpid()
    assert heard.told["machine"] == "web1" and heard.told["state"] == "waiting"
    limited = calling.call(str(tmp_path), name, "limit", 1000.0)
    assert limited is not None and limited.told["limit"] == 1000
    assert control.limiter.speed == 1000
    with pytest.raises(RefusedError, match="not begun"):
        calling.call(str(tmp_path), name, "pause")
    stopped = calling.call(str(tmp_path), name, "cancel")
    assert stopped is not None and stopped.told["state"] == "stopping"
    assert control.cancelled.is_set()
    with pytest.raises(ToolError, match="nobody knows"):
        calling.call(str(tmp_path), name, "explode")


NONSENSE = {
    "nothing before the end": b"\n",
    "no JSON": b"hello\n",
    "a number": b"1\n",
    "a list": b'["snaptree"]\n',
    "nested without end": b"[" * 4000 + b"\n",
    "not text": b"\xff\xfe\x00\n",
    "another version": b'{"snaptree": 2, "ask": "cancel"}\n',
    "a version that is a list": b'{"snaptree": [1], "ask": "cancel"}\n',
    "no question": b'{"snaptree": 1}\n',
    "a question that is a list": b'{"snaptree": 1, "ask": ["cancel"]}\n',
    "a limit below nothing": b'{"snaptree": 1, "ask": "limit", "limit": -1}\n',
    "a limit that is no number": b'{"snaptree": 1, "ask": "limit", "limit": NaN}\n',
    "a limit without bounds": b'{"snaptree": 1, "ask": "limit", "limit": Infinity}\n',
    "a limit that is true": b'{"snaptree": 1, "ask": "limit", "limit": true}\n',
    "a limit beyond all": b'{"snaptree": 1, "ask": "limit", "limit": 1' + b"0" * 3000 + b"}\n",
    "a line without end": b"x" * 100_000,
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_answered_with_an_error(tmp_path: Path, control: Control, name: str, what: str) -> None:
    words = NONSENSE[what]
    if what == "a line without end":
        # The rest is not read, and may find the connection closed.
        with contextlib.suppress(ConnectionError):
            said(tmp_path, name, words)
    else:
        answer: Any = json.loads(said(tmp_path, name, words))
        assert answer["snaptree"] == 1 and answer["error"]["code"] == "usage" and answer["error"]["hint"]
    assert not control.cancelled.is_set() and control.limiter.speed == 0
    assert calling.call(str(tmp_path), name) is not None


def test_whoever_says_nothing_is_not_waited_for(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "PATIENCE", 0.5)
    silent = [connected(tmp_path, name) for _ in range(3)]
    silent[1].sendall(b'{"snaptree": 1, ')
    silent[2].close()
    assert calling.call(str(tmp_path), name) is not None
    began = time.monotonic()
    assert silent[0].recv(1) == silent[1].recv(1) == b""
    assert time.monotonic() - began < 5


def test_many_ask_at_once_and_some_say_nothing(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are heard at once, and more than wait in the kernel's queue."""
    monkeypatch.setattr(listening, "PATIENCE", 1.0)
    silent = [connected(tmp_path, name) for _ in range(listening.AT_ONCE + 10)]
    answers: list[object] = []

    def ask() -> None:
        answers.append(calling.call(str(tmp_path), name))

    askers = [threading.Thread(target=ask) for _ in range(100)]
    for each in askers:
        each.start()
    for each in askers:
        each.join(30)
    assert len(answers) == 100
    assert sum(isinstance(each, calling.Heard) and bool(each.told) for each in answers) == 100
    for quiet in silent:
        quiet.close()


def test_whoever_does_not_take_the_answer_is_not_waited_for(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "PATIENCE", 0.5)
    monkeypatch.setattr(listening, "answer", lambda *_: {"much": "x" * (8 << 20)})
    asker = connected(tmp_path, name)
    asker.sendall(b'{"snaptree": 1, "ask": "show"}\n')
    time.sleep(1.0)
    got = 0
    with contextlib.suppress(ConnectionError):
        while data := asker.recv(1 << 20):
            got += len(data)
    assert 0 < got < 8 << 20


# ---- the folder and its sockets -----------------------------------------------------------------------------------


def test_only_we_may_ask(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "operations"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert stat.S_ISSOCK((folder / name).stat().st_mode)


@pytest.mark.root
def test_another_user_is_not_heard_even_where_the_doors_are_open(tmp_path: Path, control: Control, name: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    path = tmp_path / "operations" / name
    for each in (path, *path.parents):
        if each != Path("/") and each.stat().st_uid == 0 and not each.stat().st_mode & 0o001:
            each.chmod(0o777)
    path.chmod(0o777)
    script = "\n".join(
        (
            "import os, socket, sys",
            "os.setgid(65534), os.setuid(65534), os.chdir(sys.argv[1])",
            "asker = socket.socket(socket.AF_UNIX)",
            "asker.settimeout(10)",
            "asker.connect(sys.argv[2])",
            'asker.sendall(b\'{"snaptree": 1, "ask": "cancel"}\\n\')',
            "print(asker.recv(100))",
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path.parent), name], capture_output=True, text=True, check=False
    )
    assert "b''" in done.stdout or "Reset" in done.stderr or "Broken" in done.stderr, done
    assert not control.cancelled.is_set()
    path.parent.chmod(0o700)


def test_a_long_path_is_no_hindrance(tmp_path: Path, control: Control) -> None:
    state = tmp_path / ("x" * 200) / ("y" * 200)
    state.mkdir(parents=True)
    with listening.heard(str(state), control):
        (found,) = calling.everyone(str(state))
        assert found.told["machine"] == "web1"


def test_what_a_killed_process_left_is_removed(tmp_path: Path, control: Control) -> None:
    script = (
        "import sys, time; from snaptree.running.sockets import Listening; Listening(sys.argv[1]); print(flush=True);"
        "time.sleep(60)"
    )
    for how in ("found by whoever asks", "found by the next operation"):
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        assert len(sockets.names(str(tmp_path))) == 1
        process.kill()
        process.communicate()
        assert len(sockets.names(str(tmp_path))) == 1
        if how == "found by whoever asks":
            assert calling.everyone(str(tmp_path)) == ()
        else:
            with listening.heard(str(tmp_path), control):
                assert len(calling.everyone(str(tmp_path))) == 1
        assert list((tmp_path / "operations").iterdir()) == []


def test_links_are_not_followed(tmp_path: Path, control: Control) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "operations").symlink_to(elsewhere)
    with listening.heard(str(tmp_path), control):
        assert list(elsewhere.iterdir()) == []
        assert calling.everyone(str(tmp_path)) == ()
    (tmp_path / "operations").unlink()
    other = Control("web2")
    with listening.heard(str(elsewhere), other):
        (name,) = sockets.names(str(elsewhere))
        with listening.heard(str(tmp_path), control):
            (tmp_path / "operations" / "link.sock").symlink_to(elsewhere / "operations" / name)
            assert {each.told["machine"] for each in calling.everyone(str(tmp_path))} == {"web1"}
        assert (tmp_path / "operations" / "link.sock").is_symlink()


def test_what_is_not_ours_is_left_alone(tmp_path: Path, control: Control) -> None:
    (tmp_path / "operations").mkdir()
    (tmp_path / "operations" / "notes.sock").write_text("mine")
    with listening.heard(str(tmp_path), control):
        assert len(calling.everyone(str(tmp_path))) == 1
    assert (tmp_path / "operations" / "notes.sock").read_text() == "mine"


def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path: Path, control: Control) -> None:
    (tmp_path / "operations").mkdir(mode=0o777)
    (tmp_path / "operations").chmod(0o777)
    with pytest.raises(RefusedError, match="others may write"):
        sockets.names(str(tmp_path))
    with listening.heard(str(tmp_path), control):
        assert len(calling.everyone(str(tmp_path))) == 1
    assert stat.S_IMODE((tmp_path / "operations").stat().st_mode) == 0o700


def test_a_file_in_the_way_keeps_nobody_from_work(tmp_path: Path, control: Control) -> None:
    (tmp_path / "operations").write_text("")
    with listening.heard(str(tmp_path), control):
        assert calling.everyone(str(tmp_path)) == ()


def test_it_listens_before_it_has_the_name(tmp_path: Path, control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """What refuses a connection counts as dead, and is removed."""
    real, refused = os.rename, list[str]()

    def rename(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        with socket.socket(socket.AF_UNIX) as asker:
            if asker.connect_ex(f"/proc/self/fd/{src_dir_fd}/{source}"):
                refused.append(source)
        real(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "rename", rename)
    with listening.heard(str(tmp_path), control):
        assert len(sockets.names(str(tmp_path))) == 1 and not refused
