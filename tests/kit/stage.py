"""A machine that runs: a scene whose guest writes records to its disks all the while."""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.kit import images, shim
from tests.kit.guest import DISKS, Boot, Guest, device, launch, loaded_from
from tests.kit.qmp import Qmp
from tests.kit.records import DISK_BYTES, in_memory, read_records
from tests.kit.scene import Scene, names_in, points_of, standing_on

from snaptree.machines.power import own_monitor
from snaptree.store.database import Database


class Stage(Scene):
    """The machine ``web1`` with the disks ``vda`` (qcow2) and ``vdb`` (raw), and the guest that runs on it."""

    def __init__(self, folder: Path, boot: Boot) -> None:
        super().__init__(folder)
        self.boot = boot
        self.guest = Guest(folder)
        self.monitor = Path(own_monitor(Database(str(self.state)), "web1"))

    def make(self, *, raw: bool = True) -> None:
        """Make the disks."""
        images.create(self.disks / "vda.qcow2", DISK_BYTES)
        images.create(self.disks / ("vdb.raw" if raw else "vdb.qcow2"), DISK_BYTES, "raw" if raw else "qcow2")

    def add(self, *options: str, raw: bool = True) -> None:
        """Make the disks, and look after the machine."""
        self.make(raw=raw)
        vdb = "vdb.raw,format=raw" if raw else "vdb.qcow2"
        self(shlex.join(["add", "web1", "--disk", "vda=vda.qcow2", "--disk", f"vdb={vdb}", *options]))

    def start(self, *, raw: bool = True) -> Guest:
        """Add the machine, start it, and let the guest write."""
        self.add("--start", self.boot.command(self.folder), raw=raw)
        self("start web1")
        self.guest.go()
        return self.guest

    def qmp(self) -> Qmp:
        """The machine's monitor, while snaptree does not have it."""
        return Qmp(self.monitor)

    def holds(self, name: str, *, killed: bool = False) -> tuple[int, ...]:
        """How many records the name holds on each of its disks: a prefix of what was written, on all at one instant.

        The guest writes to ``vda`` and ``vdb``, and to no other. A branch that the guest writes to cannot be read.

        :param killed: QEMU was killed: what had not been flushed may be lost on one disk and there on the other.
        """
        shown = self.show()
        points = points_of(names_in(shown)[name])
        found = []
        for disk, point in sorted((disk, point) for disk, point in points.items() if disk in DISKS):
            chain = standing_on(point["path"], shown)
            content = images.read_unlocked(chain, point["internal"])
            found.append(read_records(content, DISKS.index(disk)).prefix)
        if len(found) == 2 and not killed:
            # Record n goes to vda first.
            assert 0 <= found[0] - found[1] <= 1, f"{name} is of two instants: {found}"
        return tuple(found)

    def written(self, machine: str) -> set[str]:
        shown = self.show(machine)
        return {each["path"] for each in shown["disks"]} if shown["state"] != "off" else set()

    def sound(self, *machines: str) -> None:
        """As a scene's; and what QEMU has open is what the tree says, without any job of snaptree's left."""
        shown = self.show()
        assert shown["state"] != "unknown", shown["state_detail"]
        if shown["state"] != "off" and self.monitor.exists():
            with self.qmp() as qmp:
                assert not [each for each in qmp("query-jobs") if each["id"].startswith("snaptree-")]
        super().sound(*machines)

    def loaded(self, name: str) -> tuple[Guest, Path]:
        """A QEMU without snaptree, on overlays of a snapshot's points, that has loaded its memory and waits; the guest
        in it, and its monitor."""
        folder = self.folder / f"loaded-{name}"
        folder.mkdir()
        named = self.names()[name]
        words = self.boot.words(folder, saved=False)
        for disk in DISKS:
            point = named["points"][disk]["path"]
            form = self.format_of(point)
            path = images.create(folder / f"{disk}.qcow2", DISK_BYTES, "qcow2", backing=(Path(point), form))
            words += ["-blockdev", f"driver=qcow2,node-name=n-{disk},file.driver=file,file.filename={path}"]
            words += ["-device", device(disk, f"n-{disk}")]
        words += ["-incoming", loaded_from(named["memory"]), "-S", "-qmp", f"unix:{folder}/qmp,server=on,wait=off"]
        return launch(words, folder), folder / "qmp"

    def agree(self, name: str, monitor: Path) -> None:
        """What a paused guest has in memory and what the name's disks hold is of the same record."""
        self.agree_with(self.holds(name), monitor)

    def agree_with(self, held: Sequence[int], monitor: Path) -> None:
        """What a paused guest has in memory is of the same record as disks that hold so much."""
        with Qmp(monitor) as qmp:
            until = time.monotonic() + 60
            while (status := qmp("query-status")["status"]) == "inmigrate":
                assert time.monotonic() < until
                time.sleep(0.01)
            assert status == "paused", status
            number, disk = in_memory(qmp, self.folder)
        for at, last in enumerate(held):
            # It is filled in memory, then written to one disk after the other.
            may = {number} if at < disk else {number - 1} if at > disk else {number - 1, number}
            assert last in may, f"memory has record {number} for disk {disk}, the disks have {held}"

    def finish(self) -> int:
        """Shut the guest down, and see that all is there that it had flushed; the last record."""
        self("stop web1")
        assert self.guest.errors() == []
        flushed = self.guest.flushed()
        assert any(line == f"D {flushed}" for line in self.guest.lines())
        assert self.holds(self.show()["active_branch"]) == (flushed, flushed)
        self.sound()
        return flushed

    def kill_qemu(self) -> None:
        """Kill the machine's QEMU, and wait until it has gone."""
        (_,) = processes_of(self.folder)
        self.kill_every_qemu()

    def kill_every_qemu(self) -> None:
        """Kill the machine's QEMU, and one that was to take over."""
        kill_and_wait(self.folder)
        (self.folder / "console").unlink(missing_ok=True)
        self.forgiven.add("leaks")


def processes_of(folder: Path) -> list[int]:
    """The QEMUs that run with something of the folder."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        program = os.path.basename(words.partition(b"\0")[0])
        if program.startswith(b"qemu-system") and os.fsencode(folder) in words:
            found.append(int(process.name))
    return found


def kill_and_wait(folder: Path) -> None:
    """Kill every QEMU that has something of the folder, and wait until they have gone."""
    for process in processes_of(folder):
        descriptor = os.pidfd_open(process)
        os.kill(process, signal.SIGKILL)
        assert select.select([descriptor], [], [], 30)[0]
        os.close(descriptor)


def kill_all(folder: Path) -> None:
    """End every QEMU that has something of the folder: tests that fail leave some."""
    for process in processes_of(folder):
        os.kill(process, signal.SIGKILL)


def killed_at(stage: Scene, when: int, line: str) -> bool:
    """Run the command and kill it at its n-th call that changes a file; whether it came so far."""
    tell = stage.folder / "tell"
    tell.unlink(missing_ok=True)
    process = stage.command(line, **shim.place(memory=False), **shim.environment(when, tell))
    said = process.communicate(timeout=120)[0]
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode != 0


_AROUND = """
import os, signal, sys
from snaptree.cli.main import run
from snaptree.qemu.session import QmpSession

real = QmpSession.execute

async def execute(self, command, **arguments):
    if command == {command!r} and {before}:
        os.kill(os.getpid(), signal.SIGKILL)
    answer = await real(self, command, **arguments)
    if command == {command!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

QmpSession.execute = execute
sys.exit(run(sys.argv[1:]))
"""
"""snaptree, killed just before or just after it says a command to QEMU."""


def killed_around(stage: Stage, command: str, *, before: bool, line: str) -> None:
    """Run the command line, and kill it just before or just after it has said a command to QEMU."""
    done = subprocess.run(
        [sys.executable, "-c", _AROUND.format(command=command, before=before), *shlex.split(line)],
        env={**os.environ, "SNAPTREE_STATE": str(stage.state)},
        cwd=stage.disks,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
