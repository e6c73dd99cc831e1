"""The guard of a guest that goes over: what it tells QEMU is on disk before it does, and what it runs is ours."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
from tests.kit import shim
from tests.kit.still import Still

from snaptree.running.guard import PIVOT, STAY, Guard, Orders
from snaptree.running.journal import Journal
from snaptree.store import operations
from snaptree.store.database import Database


@pytest.mark.parametrize(("noted", "command"), [(None, "job-cancel"), (STAY, "job-cancel"), (PIVOT, "job-finalize")])
def test_the_journal_is_on_disk_before_qemu_is_told(
    noted: str | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snaptree that was killed may have written its note and not synced it: a power cut must not take it back."""
    log = tmp_path / "log"
    database = Database(str(tmp_path / "state"))
    with database.transaction() as connection:
        if noted is not None:
            operations.put_note(connection, 1, 0, "the file", noted)
    ours, theirs = socket.socketpair()
    with monkeypatch.context() as patched:
        patched.setenv("LD_PRELOAD", str(shim.build()))
        patched.setenv("FAULTS_LOG", str(log))
        child = os.fork()
        if child == 0:
            go, stay = (Orders(theirs.fileno(), [(word, {"id": "the job"})]) for word in ("job-finalize", "job-cancel"))
            with Guard(Journal(database, "web1", 1, "t"), "the file", go=go, stay=stay):
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    theirs.close()
    with ours:
        ours.settimeout(20)
        assert f'"execute": "{command}"'.encode() in ours.recv(4096)
        done = log.read_text()
        ours.sendall(b'{"return": {}, "id": "snaptree-guard-1"}\n')
        assert ours.recv(4096) == b"", "it ends when QEMU has answered"
    assert re.search(r"^f(?:data)?sync \d+ .*state\.sqlite-wal$", done, re.MULTILINE), done
    assert operations.note_of(database, 1, 0, "the file") == (noted or STAY)


@pytest.mark.parametrize("line", ["snapshot web1 m1 --memory", "delete web1 s1 --merge commit"])
def test_nothing_in_the_folder_that_we_are_in_is_run(still: Still, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    still("snapshot web1 s1")
    still.write(".x")
    (still.folder / "json.py").write_text(f"open({str(still.folder / 'ran')!r}, 'w')")
    monkeypatch.chdir(still.folder)
    still(line)
    assert not (still.folder / "ran").exists()
