"""The moment in which the guest goes over from its tip to the layer that this was committed into.

Before it both files are the same, after it one of them is stale, and the files cannot tell which.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from tests.kit import guest as guests
from tests.kit.stage import Stage

KILLED = """
import os, signal, sys
from snaptree.cli.main import run
from snaptree.running.guard import PIVOT
from snaptree.running.journal import Journal

real = Journal.note

def note(self, path, value):
    if value == PIVOT and {before}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, path, value)
    if value == PIVOT:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.note = note
sys.exit(run(sys.argv[1:]))
"""
"""snaptree, killed just before or just after the journal says that the guest goes over."""


@pytest.mark.parametrize(
    ("before", "also"),
    [
        pytest.param(True, "", id="before"),
        pytest.param(False, "qemu", id="after, both"),
        pytest.param(False, "", id="after", marks=pytest.mark.slow),
        pytest.param(True, "qemu", id="before, both", marks=pytest.mark.slow),
    ],
)
def test_killed_while_the_guests_requests_wait(stage: Stage, before: bool, also: str) -> None:
    guest = stage.start(raw=False)
    stage("snapshot web1 s1")
    guest.writes_on()
    since = guest.flushed()
    process = subprocess.run(
        [sys.executable, "-c", KILLED.format(before=before), "delete", "web1", "s1", "--merge", "commit"],
        env={**os.environ, "SNAPTREE_STATE": str(stage.state)},
        cwd=stage.disks,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    # The guard has let the guest go on, and QEMU says where.
    guest.writes_on()
    assert guest.stall(since) < 1.0
    with stage.qmp() as qmp:
        disks = {each["qdev"].split("/")[-2]: each["inserted"]["file"] for each in qmp("query-block")}
    over = [disk for disk, path in sorted(disks.items()) if path == str(stage.disks / f"{disk}.qcow2")]
    assert over == ([] if before else ["vda"])
    flushed = guest.flushed()
    if also:
        stage.kill_qemu()
    stage("recover web1")
    if also:
        last = stage.holds("main", killed=True)
        assert min(last) >= flushed
        stage("start web1")
        guest.go(at=min(last))
    stage("gc web1")
    guest.writes_on()
    stage.sound()
    assert stage.show()["pending"] == []
    assert stage("path web1 vda").out.strip() == str(stage.disks / "vda.qcow2")
    stage.finish()


@pytest.mark.slow
def test_a_machine_that_somebody_started_on_the_stale_file_is_told(stage: Stage) -> None:
    """snaptree cannot know which of the two to believe, and says so before it touches either."""
    guest = stage.start(raw=False)
    stage("snapshot web1 s1")
    guest.writes_on()
    stale = stage.path("main", "vda")
    subprocess.run(
        [sys.executable, "-c", KILLED.format(before=False), "delete", "web1", "s1", "--merge", "commit"],
        env={**os.environ, "SNAPTREE_STATE": str(stage.state)},
        cwd=stage.disks,
        capture_output=True,
        check=False,
    )
    guest.writes_on()
    stage.kill_qemu()
    assert "interrupted" in stage("path web1 vda").err
    words = stage.boot.words(stage.folder, saved=False)
    words += ["-drive", f"file={stale},format=qcow2,if=virtio", "-qmp", f"unix:{stage.folder}/qmp,server=on,wait=off"]
    by_hand = guests.launch(words, stage.folder)
    assert by_hand.process is not None
    by_hand.wait_for("R", lambda lines: "R 1" in lines)
    # It has both files open, and either may be said.
    assert "is open by qemu-system" in stage(f"set web1 --qmp {stage.folder}/qmp", status=5).err
    guests.end(by_hand.process)
    stage("recover web1")
    assert stage.path("main", "vda") == stage.disks / "vda.qcow2"
    assert stage.show()["pending"] == [] and len(stage.show()["layers"]) == 2
    stage.forgiven.add("leaks")
    stage.sound()
