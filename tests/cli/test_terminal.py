"""What a person at a terminal sees and can do: progress, Ctrl-C, questions, the picture."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.images import MiB
from tests.kit.scene import TOOL, Scene, command


@pytest.fixture
def large(scene: Scene) -> Scene:
    """A machine whose deletion of ``s1`` moves 400 MiB."""
    path = images.create(scene.disks / "web1.qcow2", 1024 * MiB)
    images.io(path, "qcow2", "write -P 1 0 16M")
    scene("add web1 --disk vda=web1.qcow2")
    scene("snapshot web1 s1")
    images.io(scene.path("main"), "qcow2", "write -P 2 64M 400M")
    return scene


def half_done(scene: Scene, process: subprocess.Popen[bytes]) -> None:
    """Wait until the merge has begun to write."""
    while "half-merged" not in scene("show web1").out:
        assert process.poll() is None, "it was over too soon"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_pauses_a_commit_and_gc_goes_on(large: Scene, number: int) -> None:
    place = {**os.environ, "SNAPTREE_STATE": str(large.state)}
    line = [*TOOL, "delete", "web1", "s1", "--merge", "commit"]
    process = subprocess.Popen(line, env=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    half_done(large, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 130, err
    assert b"stopping" in err and b"gc web1" in err
    assert "s1" not in large.names()
    assert [each["state"] for each in large("log web1 --json").json][-1] == "paused"
    assert "waits" in large("tree web1").out
    images.io(large.path("main"), "qcow2", "read -q -P 2 64M 400M", "read -q -P 1 0 16M")
    large("gc web1")
    assert large.chain() == ["web1.qcow2"]
    images.io(large.path("main"), "qcow2", "read -q -P 2 64M 400M", "read -q -P 1 0 16M")
    large.sound()


def test_progress_is_drawn_on_a_terminal(large: Scene) -> None:
    place = {**os.environ, "SNAPTREE_STATE": str(large.state), "TERM": "xterm", "COLUMNS": "100"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*TOOL, "delete", "web1", "s1", "--merge", "commit"], env=place, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:
            break
        if not data:
            break
        seen += data
    os.close(ours)

    assert process.wait(60) == 0
    assert b"400.0 MiB" in seen, "the cost is told beforehand"
    assert b"\x1b[" in seen and b"merge" in seen and b"/s" in seen, "a bar with its speed"
    assert b"done" in seen


def test_removing_files_is_asked_for_on_a_terminal_only(web1: Scene) -> None:
    place = {**os.environ, "SNAPTREE_STATE": str(web1.state), "TERM": "dumb"}
    ours, theirs = pty.openpty()
    line = [*TOOL, "remove", "web1", "--delete-files"]
    process = subprocess.Popen(line, env=place, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert b"Remove all files" in os.read(ours, 4096)
    os.write(ours, b"n\n")
    assert process.wait(60) == 130
    os.close(ours)
    assert web1.files() == {"web1.qcow2"}
    done = subprocess.run(line, env=place, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == 0
    assert web1.files() == set()


def test_an_error_is_json_too(web1: Scene) -> None:
    said = command("tree", "nothing", "--json", state=web1.state)
    assert said.status == 3
    assert json.loads(said.out)["error"]["code"] == "not-found"


def test_the_picture(web1: Scene, tmp_path: Path) -> None:
    web1("snapshot web1 '<one> & \"two\"'")
    web1.write(".x")
    web1("revert web1 '<one> & \"two\"'")
    target = tmp_path / "tree.svg"

    web1(f"tree web1 --svg {target}")

    from lxml import etree

    words = "".join(str(text) for text in etree.parse(str(target)).getroot().itertext())
    assert '<one> & "two"' in words and "main.1" in words and "you are here" in words


def test_the_log_tells_what_was_done(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.write(".x")
    web1("delete web1 s1")

    entries = web1("log web1 --json").json

    assert [each["operation"] for each in entries] == ["add", "snapshot", "delete", "merge"]
    assert {each["state"] for each in entries} == {"done"}
    assert entries[-1]["bytes"] == 65536
    assert "take snapshot 's1'" in web1("log web1").out


def test_output_to_a_reader_that_went_away_is_no_error(web1: Scene) -> None:
    place = {**os.environ, "SNAPTREE_STATE": str(web1.state)}
    line = [*TOOL, "show", "web1", "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(line, env=place, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
