"""Which images an operation uses, and QEMU's own locks on them while it does."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from snaptree.errors import BusyError
from snaptree.images.locks import ImageLock, who_has_open
from snaptree.planning.plan import Plan
from snaptree.planning.steps import (
    ApplyInternal,
    BuildFromPoint,
    DeleteInternal,
    Grow,
    MakeInternal,
    MakeOverlay,
    Move,
    Repoint,
    Shrink,
    Step,
    TakeName,
    Unlink,
)


def written_by(step: Step) -> tuple[str, ...]:
    """The images that a step writes to or takes away; nobody else may have them open meanwhile."""
    match step:
        case MakeInternal() | ApplyInternal() | DeleteInternal() | Grow() | Shrink() | Repoint() | Unlink():
            return (step.path,)
        case TakeName():
            return (step.source, step.target)
        case Move():
            return tuple(
                path for job in step.jobs for path, _ in ((job.row[0],) if job.way == "commit" else (job.row[-1],))
            )
        case _:
            return ()


def read_by(step: Step) -> tuple[str, ...]:
    """The images that a step rests on; nobody else may write to them meanwhile."""
    match step:
        case MakeOverlay():
            return (step.backing,)
        case BuildFromPoint():
            return (step.source, *(path for path, _ in step.below))
        case ApplyInternal() | Grow() | Shrink():
            return tuple(path for path, _ in step.below)
        case Move():
            return tuple(path for job in step.jobs for path, _ in (*job.row, *job.below))
        case _:
            return ()


class Holding:
    """QEMU's image locks on the files of an operation.

    While snaptree works on images itself no QEMU can open them for writing. A file is given up while one of QEMU's own
    programs works on it, which then holds the same locks itself.
    """

    def __init__(self) -> None:
        self._locks: dict[str, ImageLock] = {}

    def take(self, plan: Plan) -> None:
        """Lock what the plan uses.

        :raise BusyError: another process has one of the files open; names the file and, where it can be known, whom.
        """
        self.take_steps(plan.steps)

    def take_steps(self, steps: Iterable[Step]) -> None:
        """Lock what the steps use."""
        written: set[str] = set()
        read: set[str] = set()
        for step in steps:
            written.update(written_by(step))
            read.update(read_by(step))
        try:
            for path in sorted(written | read):
                if path not in self._locks and os.path.exists(path):
                    self._lock(path, "exclusive" if path in written else "read")
        except BaseException:
            self.release()
            raise

    def _lock(self, path: str, mode: str) -> None:
        try:
            self._locks[path] = ImageLock(path, mode)
        except BusyError as error:
            who = who_has_open((path,)).get(path, ())
            by = f" by {', '.join(who)}" if who else " by another process"
            raise BusyError(
                f"{path} is open{by}", "stop the machine or the program that uses it, then try again"
            ) from error

    @contextmanager
    def handed_over(self, paths: Iterable[str]) -> Iterator[None]:
        """Give files up to one of QEMU's programs for the block, and take them again afterwards.

        :raise BusyError: somebody else was quicker afterwards.
        """
        given = {path: self._locks.pop(path) for path in dict.fromkeys(paths) if path in self._locks}
        for lock in given.values():
            lock.release()
        try:
            yield
        finally:
            for path, lock in given.items():
                if os.path.exists(path):
                    self._lock(path, lock.mode)

    def release(self) -> None:
        """Give everything up."""
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()
