"""A machine whose QEMU stands still: no guest runs, and the test writes to its disks by the monitor.

It starts in a moment, and is a real QEMU with real devices; what matters while a guest writes is in ``tests/live``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.kit import images
from tests.kit.programs import killed
from tests.kit.qmp import Qmp
from tests.kit.scene import SLOT, Scene, point_in, points_of, standing_on, word_of
from tests.kit.space import mounted
from tests.kit.stage import kill_all, kill_and_wait, processes_of

from snaptree.images.facts import read_facts
from snaptree.machines.power import own_monitor
from snaptree.store.database import Database

COMMAND = "qemu-system-x86_64 -nodefaults -no-user-config -machine q35 -accel tcg -m 16 -display none -S"


class Still(Scene):
    """The machine ``web1`` with so many disks, ``vda``, ``vdb`` …, that runs, paused.

    :param raw: the last of them is raw.
    :param options: of the images, as QEMU's (``extended_l2`` …).
    """

    def __init__(self, folder: Path, disks: int = 1, *, raw: bool = False, **options: Any) -> None:
        super().__init__(folder)
        targets = [f"vd{'abc'[number]}" for number in range(disks)]
        words = []
        for disk in targets:
            if raw and disk == targets[-1]:
                self.image(f"{disk}.raw", "raw", word="b")
                words.append(f"{disk}={disk}.raw,format=raw")
                continue
            self.image(f"{disk}.qcow2", word="b", **options)
            words.append(f"{disk}={disk}.qcow2")
        self.look_after(words)

    def look_after(self, disks: Sequence[str], *words: str) -> None:
        """Add the machine with these disks, and start it."""
        self.monitor = Path(own_monitor(Database(str(self.state)), "web1"))
        self.targets = [disk.partition("=")[0] for disk in disks]
        said = [*(f"--disk {disk}" for disk in disks), *words, self.options()]
        self(f"add web1 {' '.join(said)} --start {shlex.quote(self.start_command())}")
        self("start web1")

    def start_command(self) -> str:
        """What starts its QEMU."""
        return COMMAND

    def options(self) -> str:
        """What else ``snaptree add`` is told."""
        return ""

    def by_hand(self, words: str) -> None:
        """Start QEMU as a user does, without snaptree, on the tips as they are: ``{vda}`` stands for one."""
        paths = {disk: self.path("main", disk) for disk in self.targets}
        self.monitor = self.folder / "qmp"
        more = [*words.format(**paths).split(), "-qmp", f"unix:{self.monitor},server=on,wait=off"]
        subprocess.Popen([*COMMAND.split(), *more], cwd=self.disks)
        with self.qmp():
            pass
        self(f"set web1 --qmp {self.monitor}")

    def qmp(self) -> Qmp:
        """The machine's monitor, while snaptree does not have it."""
        return Qmp(self.monitor)

    def write(self, word: str, disk: str = "vda", machine: str = "web1") -> None:
        """Write as the guest would, and flush: by the device, wherever it has its disk now."""
        with self.qmp() as qmp:
            for line in writing(word, disk):
                said = qmp("human-monitor-command", command_line=line)
                assert said == "", said

    def shows(self, name: str = "main", disk: str = "vda", machine: str = "web1") -> str:
        """What the name shows on the disk, as far as it has been flushed."""
        shown = self.show(machine)
        point = point_in(shown, name, disk)
        chain = standing_on(point["path"], shown)
        return word_of(images.read_unlocked(chain, point["internal"]))

    def written(self, machine: str) -> set[str]:
        shown = self.show(machine)
        return {each["path"] for each in shown["disks"]} if shown["state"] != "off" else set()

    def disk(self, disk: str = "vda") -> str:
        """The name of the file that the device writes to."""
        with self.qmp() as qmp:
            found = {each["qdev"].split("/")[-2]: each["inserted"]["file"] for each in qmp("query-block")}
        return name_in(str(found[disk]))

    def jobs(self) -> dict[str, str]:
        """QEMU's jobs, and how each stands."""
        with self.qmp() as qmp:
            return {each["id"]: each["status"] for each in qmp("query-jobs")}

    def kill_qemu(self) -> None:
        """Kill QEMU, and wait until it has gone."""
        (_,) = processes_of(self.folder)
        self.kill_every_qemu()

    def kill_every_qemu(self) -> None:
        """Kill QEMU, and one that was to take over."""
        kill_and_wait(self.folder)
        self.forgiven.add("leaks")

    def opened(self) -> dict[str, str]:
        """The qcow2 images that QEMU has open, by their names, and whether for ``writing`` or for ``reading``."""
        with self.qmp() as qmp:
            nodes = qmp("query-named-block-nodes", flat=True)
        return {
            name_in(each["file"]): "reading" if each["ro"] else "writing" for each in nodes if each["drv"] == "qcow2"
        }

    def tags(self) -> dict[str, set[str]]:
        """The internal snapshots that the machine's files have, by their names."""
        paths = [each["path"] for each in self.show()["layers"] if each["format"] == "qcow2"]
        found = {path: {each.name for each in read_facts(path, "qcow2").internals} for path in paths}
        return {os.path.basename(path): tags for path, tags in found.items() if tags}

    def known_tags(self) -> dict[str, set[str]]:
        """Those that names need."""
        found: dict[str, set[str]] = {}
        for named in self.names().values():
            for point in points_of(named).values():
                if point["internal"] is not None:
                    found.setdefault(os.path.basename(point["path"]), set()).add(point["internal"])
        return found

    def killed(self, line: str, arrange: Callable[[Callable[[], None]], None]) -> None:
        """Run the command in a process of its own that is killed where ``arrange`` has put the call that does it."""
        killed(lambda: self(line), arrange)


def writing(word: str, disk: str = "vda") -> list[str]:
    """What QEMU's human monitor is told so that it writes, and flushes."""
    places = [(at, letter) for at, letter in enumerate(word) if letter != "."]
    commands = [f"write -P {ord(letter)} {at * SLOT} {SLOT}" for at, letter in places]
    return [f'qemu-io -d /machine/peripheral/{disk}/virtio-backend "{each}"' for each in (*commands, "flush")]


def name_in(text: str) -> str:
    """The name of the file that QEMU tells of: once a header and its graph differ it says how it was opened."""
    if text.startswith("json:"):
        text = json.loads(text.removeprefix("json:"))["file"]["filename"]
    return os.path.basename(text)


@contextlib.contextmanager
def standing(disks: int = 1, *, raw: bool = False, on: str = "", **options: Any) -> Iterator[Still]:
    """The machine for the block.

    :param on: the kind of a file system of its own (``xfs``) that it is on.
    """
    with placed(on) as folder:
        yield Still(folder, disks, raw=raw, **options)


@contextlib.contextmanager
def placed(on: str = "") -> Iterator[Path]:
    """A folder for the block for such a machine, with a short name, as sockets need it."""
    folder = Path(tempfile.mkdtemp(prefix="still"))
    try:
        with mounted(folder, on, 400 << 20) if on else contextlib.nullcontext(folder) as place:
            try:
                yield place
            finally:
                kill_all(place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
