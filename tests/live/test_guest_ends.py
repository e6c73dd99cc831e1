"""A guest that powers off, or reboots, in the middle of what is done to its machine: a real one, of its own accord.

Powered off, QEMU has gone, in order; what the guest had flushed is there, and what was begun is finished or undone.
Rebooted, nothing is known of it but by the guest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.kit.guest import Boot
from tests.kit.points import tried
from tests.kit.space import mounted
from tests.kit.stage import Stage, kill_all, processes_of
from tests.kit.steps import at_command
from tests.live.test_delete import snapshots
from tests.live.test_rows_running import begun

LONG = pytest.mark.slow
POINTS = {
    # what is done, with the command before or after which the guest ends
    "external snapshot": ("snapshot web1 new", "transaction", False),
    "internal snapshot taken": ("snapshot web1 new --internal", "transaction", False),
    "memory to be saved": ("snapshot web1 new --memory", "query-yank", True),
    "memory saved in the background": ("snapshot web1 new --memory", "cont", True),
    "commit": ("delete web1 s2 --merge commit", "block-commit", True),
    "pull": ("delete web1 s3 --merge pull", "block-stream", True),
    "active commit": ("delete web1 m --merge commit", "block-commit", True),
    "reflink": ("delete web1 s2 --merge reflink", "blockdev-add", True),
    "internal snapshot deleted": ("delete web1 in", "snapshot-delete", False),
    "memory loaded": ("revert web1 m", "migrate-incoming", True),
}


def powers_off(stage: Stage, console: socket.socket) -> None:
    """Have the guest power off, and wait until QEMU has gone."""
    console.sendall(b"end\n")
    until = time.monotonic() + 60
    while not all(map(loads, processes_of(stage.folder))):
        assert time.monotonic() < until
        time.sleep(0.01)


def loads(process: int) -> bool:
    """Whether the QEMU is one that is to take over."""
    with contextlib.suppress(OSError):
        return b"defer" in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    return True


def reboots(stage: Stage, console: socket.socket) -> None:
    """Have the guest reboot, and wait until it is about to."""
    before = ended(stage)
    console.sendall(b"again\n")
    stage.guest.wait_for("D", lambda _: ended(stage) > before)
    time.sleep(0.2)


def ended(stage: Stage) -> int:
    """How often the guest has come to its end."""
    return sum(line.startswith("D ") for line in stage.guest.lines())


def ready(stage: Stage) -> int:
    """How often the guest has been ready to begin, since its QEMU was started."""
    return sum(line == "R 2" for line in stage.guest.lines())


@pytest.fixture
def scene(boot: Boot, place: Path, job: str) -> Iterator[Stage]:
    """The stage, on a file system that shares blocks for what needs one; its guest may reboot."""
    with mounted(place, "xfs", 400 << 20) if job == "reflink" else contextlib.nullcontext(place) as folder:
        yield Stage(folder, dataclasses.replace(boot, append=True, reboots=True))
        kill_all(folder)


@pytest.mark.root
@pytest.mark.parametrize("what", ["powers off", "reboots"])
@pytest.mark.parametrize("job", [pytest.param(job, marks=LONG) for job in POINTS])
def test_its_guest_ends_in_the_middle(scene: Stage, job: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, (line, command, after) = scene, POINTS[job]
    guest = stage.start(raw=False)
    snapshots(stage, 3, 20)
    if job == "internal snapshot deleted":
        stage("snapshot web1 in --internal")
    stage("snapshot web1 m --memory")
    guest.writes_on(20)
    wanted = {name: stage.holds(name) for name in stage.names() if name != "main"}
    with monkeypatch.context() as patched, socket.socket(socket.AF_UNIX) as console:
        # One that is to take over has its console where this one's was.
        console.connect(f"{stage.folder}/console")
        work = powers_off if what == "powers off" else reboots
        came = at_command(patched, command, partial(work, stage, console), after=after)
        status = stage.any(line)
    assert came()
    if what == "powers off":
        assert status in (0, 12), status
        off(stage, wanted)
    else:
        assert status == 0
        on(stage, wanted, job)
    tried("memory saved in the background" if job == "memory to be saved" else job, f"its guest {what}")


def kept(stage: Stage, wanted: dict[str, tuple[int, ...]]) -> None:
    """What is kept holds what it held."""
    names = stage.names()
    for name in wanted.keys() & names.keys():
        assert stage.holds(name) == wanted[name], name
    assert len(wanted.keys() - names.keys()) <= 1


def off(stage: Stage, wanted: dict[str, tuple[int, ...]]) -> None:
    """The machine is off; all is there, and nothing is left to be done."""
    flushed = stage.guest.flushed()
    for line in ("recover web1", "gc web1"):
        stage(line)
        kept(stage, wanted)
    assert stage.show()["state"] == "off" and stage.holds("main") == (flushed, flushed)
    assert stage.show()["pending"] == []
    stage.sound()


def on(stage: Stage, wanted: dict[str, tuple[int, ...]], job: str) -> None:
    """The guest is there again, or another instant of it is; it writes on, to where its disks are."""
    if job == "memory loaded":
        stage.guest.went_over()
    else:
        stage.guest.wait_for("R", lambda _: ready(stage) > 0)
        stage.guest.go(at=stage.guest.flushed())
    kept(stage, wanted)
    stage("gc web1")
    kept(stage, wanted)
    stage.guest.writes_on()
    assert stage.show()["pending"] == []
    stage.sound()
    stage.finish()


@LONG
@pytest.mark.parametrize("way", ["pull", "commit"])
def test_the_guest_powers_off_while_much_is_moved(stage: Stage, way: str) -> None:
    """It is told; what had been flushed is there, and the merge is finished or waits."""
    stage.start(raw=False)
    wanted = snapshots(stage, 3, 30)
    process = stage.command(f"delete web1 s2 --merge {way} --limit 64K")
    begun(stage, process, "s2")
    stage.guest.tell("end")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 12 and "recover" in said, said
    flushed = stage.guest.flushed()
    stage("recover web1")
    assert stage.show()["state"] == "off" and stage.holds("main") == (flushed, flushed)
    stage("gc web1")
    for name in ("s1", "s3"):
        assert stage.holds(name) == wanted[name]
    assert "s2" not in stage.names() and stage.show()["pending"] == []
    stage.forgiven.add("leaks")
    stage.sound()
    tried(way, "its guest powers off")
