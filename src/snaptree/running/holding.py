"""Which images an operation uses, and QEMU's own locks on them while it does."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from snaptree.errors import BusyError
from snaptree.images.locks import ImageLock, who_has_open
from snaptree.planning.domain_steps import DomainForget
from snaptree.planning.live_steps import LiveMerge, LiveOpen, LiveSnapshot
from snaptree.planning.memory_steps import SaveMemory
from snaptree.planning.plan import Plan
from snaptree.planning.steps import (
    ApplyInternal,
    BuildFromPoint,
    BuildMerged,
    Cover,
    DeleteInternal,
    MakeInternal,
    MakeOverlay,
    Move,
    PutInPlace,
    Repoint,
    Shrink,
    Step,
    TakeName,
    Unlink,
)

WRITTEN_BY_QEMU = (LiveSnapshot, SaveMemory, LiveOpen, LiveMerge, DeleteInternal, DomainForget)
"""The steps in which the machine's QEMU itself writes to what it has open."""


def written_by(step: Step) -> tuple[str, ...]:
    """The images that a step writes to or takes away; nobody else may have them open meanwhile."""
    match step:
        case MakeInternal() | ApplyInternal() | DeleteInternal() | Shrink() | Repoint() | Unlink() | PutInPlace():
            return (step.path,)
        case Cover():
            return (step.row[-1][0],)
        case LiveMerge():
            return tuple(
                path for job in step.jobs for path, _ in (job.target, *([job.child] if job.child is not None else []))
            )
        case LiveSnapshot() | SaveMemory():
            return tuple(mark.path for mark in step.marks)
        case LiveOpen() | DomainForget():
            return step.paths
        case TakeName():
            return (step.source, step.target)
        case Move():
            return tuple(
                path for job in step.jobs for path, _ in ((job.row[0],) if job.way == "commit" else (job.row[-1],))
            )
        case _:
            return ()


def changed_by(step: Step) -> tuple[str, ...]:
    """The images whose contents a step changes; to take one away or to rename it, the folder's rights are enough."""
    return () if isinstance(step, Unlink | PutInPlace | TakeName) else written_by(step)


def read_by(step: Step) -> tuple[str, ...]:
    """The images that a step rests on; nobody else may write to them meanwhile."""
    match step:
        case MakeOverlay():
            return (step.backing,)
        case BuildFromPoint():
            return (step.source, *(path for path, _ in step.below))
        case Cover() | BuildMerged():
            return tuple(path for path, _ in (*step.row, *step.below))
        case ApplyInternal() | Shrink():
            return tuple(path for path, _ in step.below)
        case Move() | LiveMerge():
            return tuple(path for job in step.jobs for path, _ in (*job.row, *job.below))
        case _:
            return ()


def files_of(plan: Plan) -> tuple[str, ...]:
    """The images that the plan and those that follow it rest on or write to; whoever carries it out locks them."""
    written = {path for each in plan.every() for step in each.steps for path in written_by(step)}
    found = written.union(*(each.touches for each in plan.every()))
    return tuple(sorted(path for path in found if os.path.exists(path)))


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class Holding:
    """QEMU's image locks on the files of an operation.

    While snaptree works on images no other QEMU can open them for writing.

    :param spared: the files (device and inode) that the machine's own QEMU has open. They are not locked; what is
        written there it writes itself.
    :param closing: the files that a machine has open which is turned off before anything is done: nothing can be known
        of them yet.
    :param patience: for how many seconds to wait for somebody else to give a file up: one who only looks, or one of
        QEMU's programs that is just being killed because its snaptree was.
    """

    def __init__(
        self,
        patience: float = 0.2,
        spared: Collection[tuple[int, int]] = (),
        closing: Collection[tuple[int, int]] = (),
    ) -> None:
        self._patience = patience
        self._spared = frozenset(spared)
        self._closing = frozenset(closing)
        self._locks: dict[tuple[int, int], ImageLock] = {}

    def take(self, plan: Plan, still: Iterable[str] = ()) -> None:
        """Lock what the plan uses.

        :param still: images that the plan does not use, and that nobody may begin to write to meanwhile.
        :raise BusyError: another process has one of the files open; names the file and, where it can be known, whom.
        """
        self.take_steps(plan.steps, still)

    def take_steps(self, steps: Iterable[Step], still: Iterable[str] = ()) -> None:
        """Lock what the steps use."""
        written: dict[str, None] = {}
        read: dict[str, None] = {}
        for step in steps:
            for path in written_by(step):
                # What nothing needs any more may still be open there: it is let go before it is removed.
                by_qemu = isinstance(step, WRITTEN_BY_QEMU) or (isinstance(step, PutInPlace) and step.live)
                if not (isinstance(step, Unlink) or by_qemu) and _inode(path) in self._spared:
                    raise self._busy(path)
            written.update(dict.fromkeys(written_by(step)))
            read.update(dict.fromkeys(read_by(step)))
        read.update(dict.fromkeys(still))
        try:
            for path in (*written, *read):
                self._lock(path, "exclusive" if path in written else "read")
        except BaseException:
            self.release()
            raise

    def _lock(self, path: str, mode: str) -> None:
        # A file may have two names for a while (TakeName), and is locked once.
        inode = _inode(path)
        if inode is None or inode in self._locks or inode in self._spared | self._closing:
            return
        deadline = time.monotonic() + self._patience
        while True:
            try:
                self._locks[inode] = ImageLock(path, mode)
                return
            except BusyError as error:
                if time.monotonic() >= deadline:
                    raise self._busy(path) from error
            time.sleep(0.01)

    @staticmethod
    def _busy(path: str) -> BusyError:
        who = who_has_open((path,)).get(path, ())
        by = f" by {', '.join(who)}" if who else " by another process"
        return BusyError(f"{path} is open{by}", "stop the machine or the program that uses it, then try again")

    def take_over(self, path: str) -> None:
        """Lock a file that the machine's QEMU had open when the operation began, and has closed since.

        :raise BusyError: somebody else has it open.
        """
        self._spared -= {inode for inode in [_inode(path)] if inode is not None}
        self._lock(path, "exclusive")

    def take_new(self, path: str) -> None:
        """Lock a new file, before it has the name by which others find it."""
        self._lock(path, "exclusive")

    @contextmanager
    def lent(self, paths: Iterable[str]) -> Iterator[None]:
        """Let QEMU's programs that are started in the block work on files: they inherit the locks.

        They take none themselves. A file is locked without a gap, and as long as either they or we live: whoever comes
        after a kill waits until they are gone.
        """
        inodes = {_inode(path) for path in paths}
        locks = [lock for inode, lock in self._locks.items() if inode in inodes]
        for lock in locks:
            lock.let_inherit(inherit=True)
        try:
            yield
        finally:
            for lock in locks:
                lock.let_inherit(inherit=False)

    def require_closed(self, paths: Iterable[str]) -> None:
        """See that nobody writes to these files.

        :raise BusyError: somebody does.
        """
        looking = Holding(self._patience)
        try:
            for path in paths:
                looking._lock(path, "read")
        finally:
            looking.release()

    def release(self) -> None:
        """Give everything up."""
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()
