"""The order in which things reach the disk: what a step has done is synced before the journal says more.

Every call with which snaptree and QEMU's programs change files is logged during a whole operation (``faults.c``). At
each word of the journal nothing of the images may be left that a power cut could take back: data, length, times and
names are synced, as POSIX has it, and not only as ext4 and XFS happen to do together with something else. ``fdatasync``
leaves the times out, by which a layer is known that nobody has written to since it was frozen.

Like ``tests/crash/matrix.py`` this runs in a process of its own and tells what it did as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.crash.cases import CASES
from tests.crash.matrix import Matrix
from tests.kit import shim
from tests.kit.disks import SMALLEST
from tests.kit.space import mounted

from snaptree.running.journal import Journal

WORDS = ("take", "record", "register", "forget", "end")
"""What the journal says when something has been done; claims and notes are said before."""

NAMES = (
    "create",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "symlink",
    "unlink",
    "unlinkat",
    "rmdir",
    "mkdir",
)


@contextlib.contextmanager
def marked(log: Path) -> Iterator[None]:
    """While in the block, the journal's words stand in the log, before they are written."""
    kept = {word: getattr(Journal, word) for word in WORDS}

    def saying(word: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def said(self: Journal, *words: Any, **named: Any) -> Any:
            with log.open("ab", buffering=0) as file:
                file.write(f"journal 0 {word} {' '.join(map(repr, words[:1]))}\n".encode())
            return method(self, *words, **named)

        return said

    for word, method in kept.items():
        setattr(Journal, word, saying(word, method))
    try:
        yield
    finally:
        for word, method in kept.items():
            setattr(Journal, word, method)


class Audit:
    """What is not on disk yet, call by call."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.dirty: dict[int, str] = {}
        """By inode: what was done to it. The folder of a name is dirty, too."""
        self.names = {str(path): path.lstat().st_ino for path in (folder, *folder.rglob("*"))}
        self.faults: list[str] = []
        self.words = 0

    def call(self, line: str) -> None:
        """One line of the log."""
        call, number, path = line.split(" ", 2)
        inode = int(number)
        if call == "journal":
            self.words += 1
            self.faults += [f"{what} is not synced when the journal says {path!r}" for what in self.dirty.values()]
            self.dirty.clear()
        elif not path.startswith(self.folder) or "/state.sqlite" in path or path.endswith(" (deleted)"):
            return  # What has no name is nobody's.
        elif call == "fsync":
            self.dirty.pop(inode, None)
        elif call != "fdatasync":
            self.change(call, inode, path)

    def change(self, call: str, inode: int, path: str) -> None:
        """A file or a name has changed. A file that has no name any more is nobody's."""
        before = self.names.pop(path, 0)
        if inode:
            self.names[path] = inode
        moved = call.startswith("rename") and not inode
        if before and before not in self.names.values() and not moved:
            self.dirty.pop(before, None)
        if call in NAMES:
            folder = os.path.dirname(path)
            self.dirty[self.names.get(folder) or os.stat(folder).st_ino] = f"{call} {path}"
        if call not in NAMES or call == "create":
            self.dirty[inode] = f"{call} on {path}"


def audit(case: str, killed_at: int = 0) -> tuple[int, list[str]]:
    """Run one operation and look at the order; how many words the journal said, and what was wrong.

    :param killed_at: kill the operation at this call, and look at its recovery instead.
    """
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="snaptree-audit-"))
        folder = Path(name)
        place = stack.enter_context(mounted(folder, "xfs", SMALLEST["xfs"])) if CASES[case].shares else None
        matrix = Matrix(folder, case, "kill", place)
        matrix.restore()
        request, log = matrix.case.request(matrix.world), folder / "log"
        if killed_at:
            matrix.interrupted(killed_at, request)
            matrix.afterwards(interrupted=True)
        found = Audit(matrix.world.folder)
        log.touch()
        with marked(log), shim.logged(log):
            if killed_at:
                matrix.put_right()
            else:
                matrix.world.machine.run(request)
        for line in log.read_text().splitlines():
            found.call(line)
        return found.words, found.faults


def main() -> None:
    """Run the cases that the arguments name and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", default=[], help="cases that contain this; all without it")
    parser.add_argument("--killed", action="store_true", help="look at the recovery from a kill somewhere in it")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    for case in CASES:
        if not options.case or any(word in case for word in options.case):
            words, faults = audit(case, chance.randint(5, 60) if options.killed else 0)
            print(json.dumps({"case": case, "words": words, "faults": faults}), flush=True)


if __name__ == "__main__":
    main()
