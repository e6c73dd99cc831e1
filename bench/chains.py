"""Chains of images: made once for a row, copied afresh for each run."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from bench.rows import MIB, Row
from bench.systems import run

ABOVE = 8 * MIB
"""What each of the two layers above those that are merged holds, at most."""
TARGETS = ("vda", "vdb")


@dataclass
class Chain:
    """The chains of a row, one for each disk: ``base <- s1 <- s2 …``; those up to ``s<merged - 1>`` become one.

    The lowest layer holds a quarter more than those that go down into it, and an eighth of them (half of them, where
    they are many) lies over what is below: moving the delta down is the cheapest merge for everybody.
    """

    row: Row
    place: Path
    moved: int = 0
    """How many bytes of each disk have to be moved: what the merged layers above the lowest show."""
    _fresh: dict[Path, tuple[int, int, int] | None] = field(default_factory=dict)

    @property
    def pristine(self) -> Path:
        """The chains as they were made."""
        return self.place / "pristine"

    @property
    def work(self) -> Path:
        """The chains of this run."""
        return self.place / "work"

    @property
    def targets(self) -> tuple[str, ...]:
        """The disks."""
        return TARGETS[: self.row.disks]

    @property
    def overlays(self) -> list[str]:
        """All layers above the lowest, without their suffix."""
        return [f"s{number}" for number in range(1, self.row.merged + 2)]

    @property
    def merged(self) -> list[str]:
        """Those of them that are merged down."""
        return self.overlays[: self.row.merged - 1]

    @property
    def kept(self) -> str:
        """The lowest of the others."""
        return self.overlays[self.row.merged - 1]

    def make(self) -> None:
        """Make the chains."""
        for number, target in enumerate(self.targets):
            self._make(self.pristine / target, random.Random(7 + number))

    def _make(self, folder: Path, chance: random.Random) -> None:
        folder.mkdir(parents=True)
        row = self.row
        size = 5 * row.delta + 128 * MIB
        count = row.delta // row.extent
        spacing = 2 * row.extent if row.scattered else row.extent
        unused = list(range(0, size - spacing, spacing))
        if row.scattered:
            chance.shuffle(unused)
        unused.reverse()
        below: list[int] = []
        shown: set[int] = set()
        backing: list[str] = []
        for name in ("base", *self.overlays):
            extent = row.extent
            wanted = max(1, count // (row.merged - 1))
            if name == "base":
                wanted = count + count // 4
            elif name not in self.merged:
                extent = min(row.extent, MIB)
                wanted = min(ABOVE, row.delta // 8) // extent
            over = 0 if name == "base" else wanted // (8 if row.merged == 2 else 2)
            if row.scattered:
                places = chance.sample(below, over) + [unused.pop() for _ in range(wanted - over)]
                chance.shuffle(places)
            else:
                places = below[-over:] if over else []
                places += [unused.pop() for _ in range(wanted - over)]
            if name in self.merged:
                shown.update(places)
            path = folder / f"{name}.qcow2"
            run("qemu-img", "create", "-q", "-f", "qcow2", *backing, path, str(size))
            lines = "".join(f"write -q -P {chance.randint(1, 255)} {place} {extent}\n" for place in places)
            subprocess.run(
                ["qemu-io", "-f", "qcow2", path], input=lines, text=True, stdout=subprocess.DEVNULL, check=True
            )
            below = [*below, *places]
            backing = ["-b", path.name, "-F", "qcow2"]
        self.moved = len(shown) * row.extent

    def restore(self) -> None:
        """Make the work's files what they were, after :meth:`drop`."""
        for target in self.targets:
            source, folder = self.pristine / target, self.work / target
            folder.mkdir(parents=True, exist_ok=True)
            names = sorted(os.listdir(source))
            for name in names:
                if not self._is_fresh(folder / name):
                    _copy(source / name, folder / name)
                    self._fresh[folder / name] = _stamp(folder / name)

    def drop(self) -> None:
        """Remove what is not as it was made; files that nobody has written to stay."""
        for target in self.targets:
            folder = self.work / target
            for path in folder.iterdir() if folder.exists() else ():
                if not self._is_fresh(path):
                    path.unlink()

    def _is_fresh(self, path: Path) -> bool:
        return path in self._fresh and self._fresh[path] == _stamp(path)

    def require_merged(self) -> None:
        """See that the layers are gone that should be.

        :raise RuntimeError: one is there.
        """
        for target in self.targets:
            for name in self.merged:
                if (self.work / target / f"{name}.qcow2").exists():
                    raise RuntimeError(f"{target}'s {name} is still there")

    def compare(self, *, kept_point: bool) -> None:
        """See that the merged chains show what the pristine ones do.

        :param kept_point: the lowest file must show what the last of the merged layers showed.
        :raise RuntimeError: they don't.
        """
        for target in self.targets:
            source, folder = self.pristine / target, self.work / target
            pairs = [(self.overlays[-1], self.overlays[-1]), (self.kept, self.kept)]
            if kept_point:
                pairs.append((self.merged[-1], "base"))
            for was, now in pairs:
                words = ("-f", "qcow2", "-F", "qcow2", source / f"{was}.qcow2", folder / f"{now}.qcow2")
                run("qemu-img", "compare", *words)
            for path in sorted(folder.glob("*.qcow2")):
                run("qemu-img", "check", "-q", "-f", "qcow2", path)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    if not path.exists():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _copy(source: Path, target: Path) -> None:
    """A real copy: shared blocks would change what is measured."""
    with source.open("rb") as file, target.open("xb") as copy:
        while data := file.read(4 * MIB):
            copy.write(data)
    # QEMU may run as another user.
    target.chmod(0o666)


def remove(folder: Path) -> None:
    """Remove a folder, if there is one."""
    shutil.rmtree(folder, ignore_errors=True)
