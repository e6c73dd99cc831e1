"""A machine for a scenario: driven by the command line, its disks read slot by slot."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kit import images
from tests.kit.images import KiB
from tests.kit.world import hidden_files

from snaptree.cli.main import run
from snaptree.machines.connection import Connection
from snaptree.model.invariants import violations

TOOL = [sys.executable, "-c", "import sys; from snaptree.cli.main import run; sys.exit(run(sys.argv[1:]))"]
SLOT = 64 * KiB
SLOTS = 8


@dataclass(frozen=True)
class Said:
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@contextlib.contextmanager
def within(state: Path | str, folder: Path | None = None) -> Iterator[None]:
    """Use this state folder, and work in the folder."""
    before, place = os.environ.get("SNAPTREE_STATE"), Path.cwd()
    os.environ["SNAPTREE_STATE"] = str(state)
    if folder is not None:
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(place)
        if before is None:
            del os.environ["SNAPTREE_STATE"]
        else:
            os.environ["SNAPTREE_STATE"] = before


def command(*words: str, state: Path | str, folder: Path | None = None) -> Said:
    """Run the command line within this process."""
    out, err = io.StringIO(), io.StringIO()
    with within(state, folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(list(words))
    return Said(status, out.getvalue(), err.getvalue())


class Scene:
    """A folder with images of eight slots of 64 KiB each, and the machine ``web1`` on them.

    What a disk shows is told as a word: one letter for each slot, ``.`` for zeroes, ``?`` for a mixture.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.disks = folder / "disks"
        self.disks.mkdir()
        self.left: set[Path] = set()
        """Files that are there by right although no tree knows them."""
        self.forgiven: set[str] = set()
        """What ``qemu-img check`` may find: ``leaks``, where QEMU was killed."""

    def __call__(self, line: str, *, status: int | None = 0) -> Said:
        """Run ``snaptree LINE``; it must end with the status, if one is given."""
        said = command(*shlex.split(line), state=self.state, folder=self.disks)
        assert status in (None, said.status), f"snaptree {line} gave {said.status}:\n{said.out}{said.err}"
        return said

    def any(self, line: str) -> int:
        """Run ``snaptree LINE``, however it ends; its exit status."""
        return self(line, status=None).status

    def findings(self, machine: str = "web1") -> list[dict[str, Any]]:
        """What ``verify`` finds; its exit status says how bad that is."""
        said = self(f"verify {machine} --json", status=None)
        found: list[dict[str, Any]] = json.JSONDecoder().raw_decode(said.out)[0]["findings"]
        severities = {each["severity"] for each in found}
        assert said.status == (10 if "error" in severities else 13 if "warning" in severities else 0), said
        return found

    def command(self, line: str, **environment: str) -> subprocess.Popen[str]:
        """Run ``snaptree LINE`` in a process of its own."""
        return subprocess.Popen(
            [*TOOL, *shlex.split(line)],
            env={**os.environ, "SNAPTREE_STATE": str(self.state), **environment},
            cwd=self.disks,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def image(self, name: str, image_format: str = "qcow2", word: str = "", backing: str = "", **options: Any) -> Path:
        """Make an image in which the slots show the word; backing ``NAME`` or ``NAME:FORMAT``."""
        base, _, form = backing.partition(":")
        below = (self.disks / base, form or "qcow2") if base else None
        path = images.create(self.disks / name, SLOTS * SLOT, image_format, backing=below, **options)
        self.fill(path, image_format, word)
        return path

    def fill(self, path: Path, image_format: str, word: str) -> None:
        """Write letters into the slots of an image; a dot leaves the slot as it is, a zero makes it zero."""
        commands = [
            f"write -z {at * SLOT} {SLOT}" if letter == "0" else f"write -P {ord(letter)} {at * SLOT} {SLOT}"
            for at, letter in enumerate(word)
            if letter != "."
        ]
        if commands:
            images.io(path, image_format, *commands)

    def write(self, word: str, disk: str = "vda", machine: str = "web1") -> None:
        """The guest writes to the active tip of the disk."""
        path = Path(self(f"path {machine} {disk}").out.strip())
        self.fill(path, self.format_of(path, machine), word)

    def show(self, machine: str = "web1") -> Any:
        """``show --json``."""
        return self(f"show {machine} --json").json

    def format_of(self, path: Path | str, machine: str = "web1") -> str:
        found: str = next(each["format"] for each in self.show(machine)["layers"] if each["path"] == str(path))
        return found

    def names(self, machine: str = "web1") -> dict[str, Any]:
        """Snapshots and branches by name."""
        return names_in(self.show(machine))

    def shows(self, name: str = "main", disk: str = "vda", machine: str = "web1") -> str:
        """What the name shows on the disk, read by QEMU."""
        shown = self.show(machine)
        point = point_in(shown, name, disk)
        return word_of(images.read(*standing_on(point["path"], shown)[0], point["internal"]))

    def path(self, name: str, disk: str = "vda", machine: str = "web1") -> Path:
        """The file that the name's point is in."""
        return Path(point_in(self.show(machine), name, disk)["path"])

    def files(self) -> set[str]:
        """The names of all files beside the disks."""
        return {str(path.relative_to(self.disks)) for path in self.disks.rglob("*") if path.is_file()}

    def chain(self, name: str = "main", disk: str = "vda", machine: str = "web1") -> list[str]:
        """The names of the files from the name's point down, as the headers say."""
        found: list[str] = []
        at: str | None = str(self.path(name, disk, machine))
        while at is not None:
            found.append(os.path.basename(at))
            at = images.info(at, self.format_of(at, machine)).get("full-backing-filename")
            at = os.path.realpath(at) if at is not None else None
        return found

    def written(self, machine: str) -> set[str]:
        """The images that a guest writes to just now, which cannot be checked."""
        return set()

    def sound(self, *machines: str) -> None:
        """Nothing is over, nothing missing, every image and every tree is whole."""
        known = set(self.left)
        for machine in machines or ("web1",):
            tree = Connection(str(self.state)).machine(machine).tree()
            assert violations(tree) == ()
            known |= {Path(layer.path) for layer in tree.layers.values()}
            known |= {Path(memory.path) for memory in tree.memories.values()}
            written = self.written(machine)
            for layer in tree.layers.values():
                if layer.format == "qcow2" and layer.path not in written:
                    wrong = images.problems(layer.path)
                    assert not {key for key in wrong if key not in self.forgiven}, (layer.path, wrong)
            found = self.findings(machine)
            assert [each for each in found if each["severity"] == "error"] == []
            assert Connection(str(self.state)).machine(machine).unfinished() == ()
        there = {path for path in self.disks.rglob("*") if path.is_file()}
        wanted = {path for path in known if not path.is_block_device()} | {path for path in self.left if path.exists()}
        assert there == wanted, f"over: {there - wanted}, missing: {wanted - there}"
        assert hidden_files(self.folder) == []


def names_in(shown: Any) -> dict[str, Any]:
    """Snapshots and branches by name, as ``show`` tells them."""
    return {each["name"]: each for each in (*shown["snapshots"], *shown["branches"])}


def points_of(named: Any) -> dict[str, Any]:
    """The points of a snapshot, or the tips of a branch, by disk, as ``show`` tells them."""
    found: dict[str, Any] = named.get("points") or named["tips"]
    return found


def point_in(shown: Any, name: str, disk: str) -> Any:
    """The point of a snapshot or branch on a disk, as ``show`` tells it: ``path`` and ``internal``."""
    return points_of(names_in(shown)[name])[disk]


def standing_on(path: str, shown: Any) -> list[tuple[str, str]]:
    """A layer's file and those beneath it, with their formats, as ``show`` tells them."""
    layers = {each["path"]: each for each in shown["layers"]}
    found: list[tuple[str, str]] = []
    at: str | None = path
    while at is not None:
        found.append((at, layers[at]["format"]))
        at = layers[at]["parent"]
    return found


def word_of(content: bytes) -> str:
    """The contents of a disk, slot by slot."""
    letters = ""
    for at in range(0, len(content), SLOT):
        slot = content[at : at + SLOT]
        first = slot[0]
        letters += "?" if slot.count(first) < len(slot) else chr(first) if first else "."
    return letters
