"""The order in which things reach the disk, and the locks that are held meanwhile.

Every call with which snaptree and QEMU's programs change files is logged during a whole operation (``faults.c``). At
each word of the journal nothing of the images may be left that a power cut could take back: data, length, times and
names are synced, as POSIX has it, and not only as ext4 and XFS happen to do together with something else. ``fdatasync``
leaves the times out, by which a layer is known that nobody has written to since it was frozen. When a word has been
said, the state file has nothing left to sync either. What a killed process has left unsynced counts on: recovery, which
finds it done, has to sync it before it says more.

At each word the images that the step works on are locked, for QEMU and for another snaptree; a program of QEMU's that
opens an image without locking it has been lent the lock.

Like ``tests/crash/matrix.py`` this runs in a process of its own and tells what it did as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import re
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.crash.cases import CASES
from tests.crash.matrix import LIMIT, Matrix, staged, tell
from tests.kit import shim

from snaptree.images.holes import punch_free
from snaptree.images.locks import OWN_BYTE, probe
from snaptree.images.qemu_img import NO_KEYS, Keys
from snaptree.planning.steps import Step
from snaptree.planning.verbs import Request
from snaptree.qemu.daemon import StorageDaemon
from snaptree.running.carry import internals, moving
from snaptree.running.holding import read_by, written_by
from snaptree.running.journal import Journal
from snaptree.store import operations

AUDITED = ("kill", "kill both")
DONE_WORDS = ("take", "record", "register", "forget", "end")
"""What the journal says when something has been done; claims and notes are said before."""
WORDS = (*DONE_WORDS, "claim", "unclaim", "note")
_GET, _FLOCK = 36, struct.Struct("hhqqi4x")
"""``F_OFD_GETLK``, and what it is given."""
_UNLOCKED = re.compile(r'"filename": "([^"]*)"[^{}]*"locking": "off"')

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
    """While in the block, the journal's words stand in the log, before and after they are written, and what is not
    locked as it should be."""
    kept = {word: getattr(Journal, word) for word in WORDS}
    add, popen = StorageDaemon.add, subprocess.Popen
    lent: set[tuple[int, int]] = set()

    def tell(*lines: str) -> None:
        with log.open("ab", buffering=0) as file:
            file.writelines(f"{line}\n".encode() for line in lines)

    def saying(word: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def said(self: Journal, *words: Any, **named: Any) -> Any:
            if word in DONE_WORDS:
                tell(f"journal 0 {word} {' '.join(map(repr, words[:1]))}")
            number = words[0] if word == "take" else self.step
            steps = operations.steps_of(self.database, self.operation)
            tell(*(f"fault 0 at {word!r} {each}" for each in not_locked(steps[number : number + 1])))
            try:
                return method(self, *words, **named)
            finally:
                tell(f"said 0 {word}")

        return said

    class Watched(popen):  # type: ignore[valid-type,misc]
        def __init__(self, words: Any, *rest: Any, **named: Any) -> None:
            lent.clear()
            lent.update(inherited())
            tell(*(f"fault 0 {path} is not lent to {words[0]}" for path in not_lent(" ".join(map(str, words)), lent)))
            super().__init__(words, *rest, **named)

    async def adding(self: StorageDaemon, blockdev: dict[str, Any], keys: Keys = NO_KEYS) -> None:
        tell(*(f"fault 0 {path} is not lent to the daemon" for path in not_lent(json.dumps(blockdev), lent)))
        await add(self, blockdev, keys)

    def punching(path: str) -> int:
        tell(f"punch {os.stat(path).st_ino} {path}")
        return punch_free(path)

    for word, method in kept.items():
        setattr(Journal, word, saying(word, method))
    for module in (internals, moving):
        setattr(module, "punch_free", punching)  # noqa: B010
    setattr(StorageDaemon, "add", adding)  # noqa: B010
    setattr(subprocess, "Popen", Watched)  # noqa: B010
    try:
        yield
    finally:
        setattr(subprocess, "Popen", popen)  # noqa: B010
        setattr(StorageDaemon, "add", add)  # noqa: B010
        for module in (internals, moving):
            setattr(module, "punch_free", punch_free)  # noqa: B010
        for word, method in kept.items():
            setattr(Journal, word, method)


def inherited() -> Iterator[tuple[int, int]]:
    """The files that a program inherits which is started now."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.get_inheritable(int(name)):
                status = os.fstat(int(name))
                yield status.st_dev, status.st_ino


def not_lent(words: str, lent: set[tuple[int, int]]) -> Iterator[str]:
    """The images that are to be opened without a lock, and whose lock is not inherited; nobody knows hidden ones."""
    for path in _UNLOCKED.findall(words.replace("\\\\", "\\")):
        status = os.stat(path)
        if (status.st_dev, status.st_ino) not in lent and not os.path.basename(path).startswith(".snaptree-"):
            yield path


def not_locked(steps: Iterable[Step]) -> Iterator[str]:
    """What the steps use and somebody else could take now."""
    for step in steps:
        for path in filter(os.path.exists, (*written_by(step), *read_by(step))):
            with open(path, "rb") as file:
                lock = fcntl.fcntl(file, _GET, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, OWN_BYTE, 1, 0))
            if path in written_by(step) and _FLOCK.unpack(lock)[0] == fcntl.F_UNLCK:
                yield f"{path} has no lock of snaptree's: {step.summary}"
            used = probe(path)
            if used is None or (path in written_by(step) and not used.writing):
                yield f"{path} has no lock of QEMU's: {step.summary}"


class Audit:
    """What is not on disk yet, call by call."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.dirty: dict[int, str] = {}
        """By inode: what was done to it. The folder of a name is dirty, too."""
        # SQLite's own files come and go.
        paths = [path for path in (folder, *folder.rglob("*")) if "state.sqlite-" not in path.name]
        self.names = {str(path): path.lstat().st_ino for path in paths}
        self.faults: list[str] = []
        self.state: set[str] = set()
        """Parts of the state file that have been written to since they were synced."""
        self.words = 0

    def call(self, line: str) -> None:
        """One line of the log."""
        call, number, path = line.split(" ", 2)
        inode = int(number)
        if call == "journal":
            self.words += 1
            dirty = {number: what for number, what in self.dirty.items() if not self.is_empty(what)}
            self.faults += [f"{what} is not synced when the journal says {path!r}" for what in dirty.values()]
            self.dirty = {number: what for number, what in self.dirty.items() if number not in dirty}
        elif call == "fault":
            self.faults.append(path)
        elif call == "said":
            self.faults += [f"{what} is not synced when the journal has said {path!r}" for what in self.state]
            self.state.clear()
        elif "/state.sqlite-wal" in path:
            # SQLite removes it when all of it has gone into the state file.
            (self.state.discard if "sync" in call or call in NAMES else self.state.add)(path)
        elif "/state/operations" in path:
            # The sockets of what runs live no longer than it.
            pass
        elif not path.startswith(self.folder) or "/state.sqlite" in path or path.endswith(" (deleted)"):
            return  # What has no name is nobody's.
        elif call == "punch":
            # What is punched is free only when it is so on disk.
            self.faults += [f"{self.dirty[inode]} is not synced when holes are punched"] if inode in self.dirty else []
        elif call == "fsync":
            self.dirty.pop(inode, None)
        elif call != "fdatasync":
            self.change(call, inode, path)

    def is_empty(self, what: str) -> bool:
        """Whether it is a new folder in which nothing is yet: it may go."""
        call, _, path = what.partition(" ")
        return call == "mkdir" and not any(name.startswith(f"{path}/") for name in self.names)

    def change(self, call: str, inode: int, path: str) -> None:
        """A file or a name has changed. A file that has no name any more is nobody's."""
        if call.startswith("rename"):
            inside = [what for what in self.dirty.values() if f" {path}/" in what]
            dirty = [*([self.dirty[inode]] if inode in self.dirty else []), *inside]
            self.faults += [f"{what} is not synced when {path} is renamed" for what in dirty]
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


class Audited(Matrix):
    """The matrix, with the calls looked at: those of the killed process, and of the recovery that comes after it."""

    def __init__(self, folder: Path, case: str, way: str = "kill", place: Path | None = None) -> None:
        super().__init__(folder, case, way, place)
        self.log = folder / "log"
        self.words = 0
        self.found = Audit(self.world.folder)

    def interrupted(self, number: int, request: Request) -> bool:
        self.found = Audit(self.world.folder)
        self.log.write_bytes(b"")
        return super().interrupted(number, request)

    def attempt(self, number: int, request: Request) -> int:
        with marked(self.log), shim.logged(self.log):
            return super().attempt(number, request)

    def put_right(self) -> None:
        with marked(self.log), shim.logged(self.log):
            super().put_right()

    def recover(self, number: int) -> None:
        super().recover(number)
        for line in self.log.read_text().splitlines():
            self.found.call(line)
        self.words += self.found.words
        assert not self.found.faults, "\n".join(self.found.faults)

    def whole(self) -> None:
        """The operation by itself, to its end."""
        self.restore()
        request, before = self.case.request(self.world), self.world.tree
        assert not self.interrupted(LIMIT, request)
        self.recover(0)
        self.look(request, before, interrupted=False)


def audits(case: str, way: str, stride: int, start: int) -> Audited:
    """One case: by itself, and killed at so many of its calls; 0 for none."""
    with staged(case) as (folder, place):
        matrix = Audited(folder, case, way, place)
        matrix.whole()
        if stride:
            matrix.points(stride, start)
        return matrix


def main() -> None:
    """Run the cases that the arguments name and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", default=[], help="cases that contain this; all without it")
    parser.add_argument("--exactly", action="append", default=[], help="this very case")
    parser.add_argument("--way", action="append", default=[], choices=AUDITED)
    parser.add_argument("--stride", type=int, default=0, help="also kill it at every so manieth call")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    cases = [case for case in CASES if not options.case or any(word in case for word in options.case)]
    for case in options.exactly or cases:
        for way in options.way or ["kill"]:
            matrix = audits(case, way, options.stride, chance.randint(1, max(1, options.stride)))
            tell(matrix.tally, words=matrix.words)


if __name__ == "__main__":
    main()
