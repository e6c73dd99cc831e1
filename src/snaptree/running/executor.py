"""Carrying out a plan: each step is said to the journal, then taken."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from msgspec import Struct, field

from snaptree.errors import CancelledError, IoError, RefusedError, SnaptreeError
from snaptree.images import durable
from snaptree.images.locks import MachineLock
from snaptree.images.qemu_img import NO_KEYS, Keys
from snaptree.planning.live_steps import LiveMerge
from snaptree.planning.plan import Plan
from snaptree.planning.steps import BuildFromPoint, BuildMerged, MakeOverlay, Move, Record, Step, Unlink
from snaptree.running import carry
from snaptree.running.carry import firmware
from snaptree.running.carry.tree import refresh
from snaptree.running.context import Context
from snaptree.running.control import Control
from snaptree.running.holding import Holding, changed_by, written_by
from snaptree.running.journal import Journal
from snaptree.running.opening import require_keys
from snaptree.running.pace import kept
from snaptree.running.progress import Progress, Report, silent
from snaptree.store import operations, trees
from snaptree.store.database import Database

if TYPE_CHECKING:
    from snaptree.qemu.running import RunningQemu


class Outcome(Struct):
    """How it went: sentences for the user, and for how many seconds the guest stood still, where that was measured."""

    said: list[str] = field(default_factory=list)
    paused: float | None = None
    qemu: RunningQemu | None = None
    """The machine's QEMU afterwards: another one when that has taken over."""

    def add(self, context: Context) -> None:
        """Take over what the steps of one operation have told."""
        self.said += context.said
        self.paused = context.paused if context.paused is not None else self.paused
        self.qemu = context.qemu


async def run(
    database: Database,
    machine: str,
    plan: Plan,
    *,
    lock: MachineLock,
    still: Collection[str] = (),
    qemu: RunningQemu | None = None,
    spared: Callable[[], Collection[tuple[int, int]]] = tuple,
    report: Report = silent,
    control: Control | None = None,
) -> Outcome:
    """Carry out the plan and then the merges that follow it, each as an operation of its own.

    :param lock: the machine's lock; files that take the place of others are added to it.
    :param still: the active tips of a machine that is off: until the tree has changed no QEMU may start on them.
    :param qemu: the monitor of a machine that runs.
    :param spared: tells the files (device and inode) that a machine which runs has open, where it is not we who talk to
        it.
    :param control: how fast data may move, and whether to stop: before the point of no return the operation is undone,
        after it it is finished; merges that have not begun wait for ``gc``.
    :raise CancelledError: it was stopped; all that is kept is whole.
    :raise SnaptreeError: a step failed; what was before the point of no return has been undone.
    """
    control = control or Control(machine)
    stop = control.cancelled
    control.begin(plan)
    opened = await qemu.open_files() if qemu is not None else spared()
    keys = trees.keys(database, machine)
    require_free(plan, opened, keys=keys)
    outcome = Outcome(qemu=qemu)
    for number, each in enumerate(plan.every()):
        if not each.steps:
            continue
        if number and stop.is_set():
            raise CancelledError(
                f"stopped before the merge: {plan.summary} is done, and what is loose waits",
                f"'snaptree gc {machine}' merges it",
            )
        holding = Holding(spared=await qemu.open_files() if qemu is not None else spared())
        holding.take(each, () if number else still)
        try:
            journal = Journal.begin(database, machine, each)
            control.take(number, journal.operation)
            context = Context(journal, holding, lock, control.limiter, stop, qemu=qemu, keys=keys)
            with kept(control.pace):
                await _carry_out(machine, each, context, _both(report, control.report))
            outcome.add(context)
            qemu = context.qemu
        finally:
            holding.release()
    return outcome


def _both(one: Report, other: Report) -> Report:
    def report(progress: Progress) -> None:
        one(progress)
        other(progress)

    return report


def require_free(
    plan: Plan,
    spared: Collection[tuple[int, int]] = (),
    closing: Collection[tuple[int, int]] = (),
    keys: Keys = NO_KEYS,
) -> None:
    """See that what the plan and the merges that follow it use is there, and open nowhere, before anything is touched.

    :param closing: the files (device and inode) that a machine has open which is turned off first.
    :param keys: the files with the keys of encrypted layers.
    :raise NotFoundError: a piece of firmware state is not there.
    :raise RefusedError: a folder or an image may not be changed, or a piece of firmware state is a symbolic link.
    :raise BusyError: somebody has one of the images open.
    :raise NoKeyError: the key of a layer that QEMU's programs are to open does not open it.
    """
    steps = tuple(step for each in plan.every() for step in each.steps)
    firmware.require_there(steps)
    paths = [step.path for step in steps if isinstance(step, Unlink | MakeOverlay | BuildFromPoint | BuildMerged)]
    for folder in {os.path.dirname(path) for path in paths}:
        if os.path.isdir(folder) and not os.access(folder, os.W_OK | os.X_OK):
            hint = "check its owner and mode, or use sudo"
            raise RefusedError(f"not allowed to make or remove files in {folder}", hint)
    for path in dict.fromkeys(path for step in steps for path in changed_by(step)):
        if os.path.exists(path) and not os.access(path, os.W_OK):
            raise RefusedError(f"not allowed to write to {path}", "check its owner and mode, or use sudo")
    # Every file that is worked on is held open; a machine may have more than a process usually may.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    holding = Holding(spared=spared, closing=closing)
    holding.take_steps(steps)
    try:
        require_keys(steps, keys, spared, holding)
    finally:
        holding.release()


async def _carry_out(machine: str, plan: Plan, context: Context, report: Report) -> None:
    journal = context.journal
    try:
        for number, step in enumerate(plan.steps):
            if context.cancelled.is_set() and number < plan.point_of_no_return:
                raise CancelledError(f"stopped: {plan.summary}")
            journal.take(number)
            progress = Progress(plan.operation, number + 1, len(plan.steps), step.summary, 0, plan.bytes_to_copy)
            report(progress)
            context.moved = _reporter(report, progress)
            await take(step, context)
        close(context)
    except BaseException as error:
        if context.left:
            _add_hint(error, f"the guest goes on when QEMU does; 'snaptree recover {machine}' does the rest then")
        elif journal.step < plan.point_of_no_return and not await _happened(plan, context) and _turned_back(journal):
            try:
                await undo_all(plan.steps[: journal.step + 1], context, str(error))
            except BaseException as another:
                # Of a quota that is used up, btrfs gives nothing to write over what is there, either.
                _add_hint(another, f"everything kept is whole; 'snaptree recover {machine}' undoes what was begun")
                raise
            for each in context.said:
                _add_hint(error, each)
            if plan.way is not None:
                _add_hint(error, f"everything kept is whole; 'snaptree gc {machine}' goes on with the merge")
        else:
            _add_hint(error, f"'snaptree recover {machine}' finishes what was begun")
        raise
    if context.failed is not None:
        raise context.failed


def close(context: Context, why: str = "") -> None:
    """Close an operation that has come to its end, or was brought to one without what failed."""
    failed = context.failed
    context.journal.end(operations.UNDONE if failed else operations.DONE, failed.message if failed else why)


async def _happened(plan: Plan, context: Context) -> bool:
    """Whether the step that failed has happened all the same, or may have: recovery finds out."""
    try:
        return await carry.happened(plan.steps, context)
    except SnaptreeError:
        return True


def _turned_back(journal: Journal) -> bool:
    """Whether the journal says that the operation is undone; otherwise recovery finds out what it says."""
    try:
        journal.turn_back()
    except SnaptreeError:
        return False
    return True


def _add_hint(error: BaseException, hint: str) -> None:
    if isinstance(error, SnaptreeError):
        error.hint = f"{error.hint}; {hint}" if error.hint else hint


def _reporter(report: Report, progress: Progress) -> Callable[[int, int], None]:
    def moved(done: int, total: int) -> None:
        report(
            Progress(progress.operation, progress.step, progress.steps, progress.summary, done, total or progress.total)
        )

    return moved


async def take(step: Step, context: Context) -> None:
    """Take one step, and keep what frozen layers look like that it has written to."""
    try:
        await carry.do(step, context)
        refresh(written_by(step), context)
    except OSError as error:
        raise durable.explain(error, str(error.filename or "one of its files"), "work on") from error
    except MemoryError as error:
        raise IoError(f"not enough memory to {step.summary}", "free some memory, or raise the limit on it") from error


async def undo_all(steps: tuple[Step, ...], context: Context, why: str) -> str:
    """Take back, last first, the steps that were begun, and close the operation.

    :return: ``undone``, or ``paused`` when data that went down stays there.
    """
    for step in reversed(steps):
        await carry.undo(step, context)
        for path in filter(os.path.exists, written_by(step)):
            # What it has written stays, mended or not, be it by a process that was killed before it had synced it.
            durable.sync_file(path)
        refresh(written_by(step), context)
    moved = any(isinstance(step, Move | LiveMerge) for step in steps)
    state = operations.PAUSED if moved and any(isinstance(step, Record) for step in steps) else operations.UNDONE
    context.journal.end(state, why)
    return state
