"""Power cuts: every operation loses its disk at every moment where what is on it changes, and is recovered.

At a sync: the file system is shut down before every call that syncs, of snaptree's and of QEMU's programs; what was
synced is there afterwards, the rest is gone. By replay: every write and flush that the file system makes during the
whole operation is recorded, and disks are made of them as they can be after a power cut: all that came before a flush,
and some of what came after it.

Like ``tests/crash/matrix.py`` this runs in a process of its own and tells what it did as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import random
import sqlite3
import stat
import tempfile
from pathlib import Path

from tests.crash.cases import CASES
from tests.crash.matrix import LIMIT, WAYS, Matrix, NotHereError, Tally, Way, tell
from tests.kit import shim
from tests.kit.disks import SMALLEST, Disk
from tests.kit.write_log import LoggedDisk, Replay, states

from snaptree.images.inode import inode_of

AT_A_SYNC = {
    "power cut at a sync": Way(kinds=shim.SYNC),
    "power cut at a sync of the tools": Way("both", kinds=shim.SYNC),
    "power cut of the images' disk alone": Way(kinds=shim.SYNC, apart=True),
}
REPLAY = "power cut, replayed"
KINDS = ("ext4", "xfs")
ON = {f"{way} on {kind}": (way, kind) for way in (*AT_A_SYNC, REPLAY) for kind in KINDS}
WAYS.update(AT_A_SYNC)


class ShutDown(Matrix):
    """The matrix on a disk whose power fails at the moment of the kill."""

    def __init__(self, folder: Path, case: str, way: str, disk: Disk) -> None:
        self.disk = disk
        super().__init__(folder, case, way, disk.mount())
        self.cut = disk.place

    def restore(self) -> None:
        super().restore()
        self.disk.sync()

    def afterwards(self, *, interrupted: bool) -> None:
        """The power comes back. At the last point it fails after the operation has come to its end."""
        if not interrupted:
            self.disk.shut_down()
        gc.collect()
        self.disk.unmount()
        self.disk.mount()


class Recorded(Matrix):
    """One whole operation, and what is left of it when the power fails anywhere in it."""

    def __init__(self, folder: Path, case: str, disk: LoggedDisk) -> None:
        self.disk = disk
        super().__init__(folder, case, "kill", disk.mount())
        world = self.world
        self.request, self.before = self.case.request(world), world.tree
        disk.sync()
        self.start = len(disk.requests())
        assert not self.interrupted(LIMIT, self.request)
        self.end = len(disk.requests())
        gc.collect()
        disk.unmount()
        disk.stop()
        self.requests = disk.requests()

    def states(self, samples: int, stride: int, seed: int) -> None:
        """Go through what a power cut can leave. What has been looked at once is not looked at again.

        Many disks are the same byte for byte, and many more when their file system has put itself right: most of what
        is not flushed is its log, which says nothing without its end.
        """
        # What the operation has said to be done is on disk with the last flush before it said so.
        done = max(number for number, each in enumerate(self.requests[: self.end]) if each.flush)
        replay = Replay(self.disk, self.requests)
        disks, pictures = set[tuple[bool, int]](), set[tuple[bool, bytes]]()
        for number, state in enumerate(states(self.requests, self.start, random.Random(seed), samples)):
            if number % stride:
                continue
            interrupted = state.flushed < done
            self.tally.points += 1
            disk = (interrupted, replay.know(state))
            if disk in disks:
                continue
            disks.add(disk)
            replay.make(state)
            self.disk.mount()
            try:
                found = (interrupted, picture(self.world.folder))
                if found not in pictures:
                    pictures.add(found)
                    self.restore_truth()
                    self.judge(number, self.request, self.before, interrupted=interrupted)
            except BaseException as error:
                error.add_note(f"{self.tally.case}, seed {seed}, samples {samples}, state {number}: {state}")
                raise
            finally:
                gc.collect()
                self.disk.unmount()
        self.tally.looked = len(pictures)
        replay.close()


def picture(folder: Path) -> bytes:
    """All of the folder that snaptree can see: names, inodes, rights, times and bytes, and what the state file says."""
    found = hashlib.blake2b()
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        if not path.name.startswith("state.sqlite"):
            looks = (str(path), *inode_of(str(path)), status.st_mode, status.st_uid, status.st_gid)
            found.update(repr(looks).encode())
        if stat.S_ISREG(status.st_mode) and not path.name.startswith("state.sqlite"):
            found.update(repr((status.st_mtime_ns, status.st_size)).encode() + path.read_bytes())
    database = folder / "state" / "state.sqlite"
    if database.exists():
        connection = sqlite3.connect(database, isolation_level=None)
        try:
            for line in connection.iterdump():
                found.update(line.encode())
        finally:
            connection.close()
    return found.digest()


def replayed(case: str, kind: str, samples: int, stride: int, seed: int) -> Tally:
    """One case on one kind of file system, recorded and replayed."""
    with tempfile.TemporaryDirectory(prefix="snaptree-power-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        disk = LoggedDisk(folder, kind, SMALLEST[kind])
        try:
            recorded = Recorded(folder, case, disk)
            recorded.states(samples, stride, seed)
            return recorded.tally
        except NotHereError:
            return Tally(case, kind)
        finally:
            disk.stop()
            disk.remove()


def at_a_sync(case: str, way: str, kind: str, stride: int, seed: int) -> Tally:
    """One case on one kind of file system, which is shut down at every so manieth sync."""
    with tempfile.TemporaryDirectory(prefix="snaptree-power-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        disk = Disk(folder, kind, SMALLEST[kind])
        try:
            matrix = ShutDown(folder, case, way, disk)
            with contextlib.suppress(NotHereError):
                matrix.points(stride, random.Random(f"{case} {seed}").randint(1, stride))
            return matrix.tally
        finally:
            disk.remove()


def main() -> None:
    """Run what the arguments name and print a line of JSON for each case and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", default=[], help="cases that contain this; all without it")
    parser.add_argument("--exactly", action="append", default=[], help="this very case")
    parser.add_argument("--way", action="append", default=[], choices=list(ON))
    parser.add_argument("--stride", type=int, default=1, help="at every so manieth sync, or state")
    parser.add_argument("--samples", type=int, default=1, help="so many random choices after every flush")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    cases = [case for case in CASES if not options.case or any(word in case for word in options.case)]
    for case in options.exactly or cases:
        for name in options.way or ON:
            way, kind = ON[name]
            if way == REPLAY:
                tally = replayed(case, kind, options.samples, options.stride, options.seed)
            else:
                tally = at_a_sync(case, way, kind, options.stride, options.seed)
            tally.way = name
            tell(tally)


if __name__ == "__main__":
    main()
