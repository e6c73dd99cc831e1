"""Finishing or undoing what a kill left between."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from msgspec.structs import replace

from snaptree.images.locks import MachineLock
from snaptree.planning.domain_steps import WriteRecords
from snaptree.planning.live_steps import LiveSettle
from snaptree.planning.steps import BuildMerged, Move, PutInPlace, Record, Step, Unlink
from snaptree.running import carry
from snaptree.running.carry import moving, sharing
from snaptree.running.context import Context
from snaptree.running.control import Control
from snaptree.running.executor import close, take, undo_all
from snaptree.running.holding import Holding, written_by
from snaptree.running.journal import Journal
from snaptree.running.progress import Progress
from snaptree.store import operations, trees
from snaptree.store.database import Database

if TYPE_CHECKING:
    from snaptree.qemu.running import RunningQemu

DYING_SECONDS = 10.0
"""So long QEMU's programs may take to go after the snaptree that started them was killed."""


async def recover(
    database: Database,
    machine: str,
    lock: MachineLock,
    qemu: RunningQemu | None = None,
    control: Control | None = None,
    spared: Collection[tuple[int, int]] = (),
) -> tuple[str, ...]:
    """Bring every operation of the machine that was killed to an end, under the machine's lock.

    Before its point of no return an operation is undone, after it it is finished. A merge that merely waits is left to
    ``gc``.

    :param qemu: the monitor of the machine, if it runs.
    :param control: how fast data may move; it is told how far it is.
    :param spared: the files (device and inode) that the machine has open, where it is not we who talk to it.
    :return: a sentence for each operation.
    :raise SnaptreeError: a step failed again; the operation stays in the journal and can be tried again.
    """
    waiting = operations.unfinished(database, machine)
    if waiting:
        # Its last word may have been written, but not synced: a power cut must not leave what is done now without it.
        database.sync()
    control = control or Control(machine)
    return tuple([await _settle(database, each, lock, qemu, control, spared) for each in waiting])


async def _settle(
    database: Database,
    operation: operations.Operation,
    lock: MachineLock,
    qemu: RunningQemu | None,
    control: Control,
    spared: Collection[tuple[int, int]],
) -> str:
    steps = operations.steps_of(database, operation.id)
    journal = Journal.resume(database, operation)
    holding = Holding(patience=DYING_SECONDS, spared=await qemu.open_files() if qemu is not None else spared)
    control.take(0, operation.id)
    keys = trees.keys(database, operation.machine)
    context = Context(journal, holding, lock, control.limiter, recovering=True, qemu=qemu, keys=keys)
    try:
        if operation.step < operation.no_return and not await carry.happened(steps, context):
            begun = steps[: operation.step + 1]
            holding.take_steps(begun)
            state = await undo_all(begun, context, "it was killed and has been recovered")
            how = "waits to go on" if state == operations.PAUSED else "was undone"
            return f"{operation.summary}: it had been killed, and {how}"
        first, kept = _restart(database, operation, steps, journal)
        holding.take_steps(steps[first:])
        for number in range(first, len(steps)):
            step = steps[number]
            if number > first:
                journal.take(number)
                context.recovering = number <= operation.step
            context.moved = _reporter(control, Progress("recover", number + 1, len(steps), step.summary))
            if not (isinstance(step, Unlink) and step.path in kept):
                await take(step, context)
        close(context, "it was killed and has been recovered")
        how = f"was undone: {context.failed.message}" if context.failed is not None else "was finished"
        return f"{operation.summary}: it had been killed, and {how}"
    finally:
        holding.release()
        if context.qemu is not None and context.qemu is not qemu:
            await context.qemu.close()


def _reporter(control: Control, progress: Progress) -> Callable[[int, int], None]:
    control.report(progress)

    def moved(done: int, total: int) -> None:
        control.report(replace(progress, done=done, total=total))

    return moved


def _restart(
    database: Database, operation: operations.Operation, steps: tuple[Step, ...], journal: Journal
) -> tuple[int, frozenset[str]]:
    """From which step to go on, and which files stay: those whose data went down, and that were written to since.

    What was built aside and has been removed by somebody is built again: its sources are unlinked last. Until the tree
    says otherwise a machine starts from the file whose data has gone down. Where it did so after the kill, the data
    moves once more; where the tree said otherwise already, the file is kept.
    """
    waiting = [step for step in steps[operation.step :] if isinstance(step, PutInPlace)]
    if not all(sharing.is_ready(step, journal) for step in waiting):
        return next(number for number, step in enumerate(steps) if isinstance(step, BuildMerged)), frozenset()
    if (
        operation.step
        and isinstance(steps[operation.step - 1], LiveSettle)
        and isinstance(steps[operation.step], Record)
    ):
        # The tree of before is what QEMU may have been started on since.
        return operation.step - 1, frozenset()
    moves = [number for number, step in enumerate(steps[: operation.step]) if isinstance(step, Move | BuildMerged)]
    if not moves:
        return operation.step, frozenset()
    move = moves[0]
    changed = {
        path
        for number in moves
        for path, looks in moving.sources(steps[number])
        if looks and operations.note_of(database, operation.id, number, path) not in (None, looks)
    }
    # A domain starts from what libvirt was told last.
    said = WriteRecords if any(isinstance(step, WriteRecords) for step in steps) else Record
    recorded = any(isinstance(step, said) for step in steps[move : operation.step])
    if not changed or recorded:
        return operation.step, frozenset(changed)
    return move, frozenset()


def files_of(database: Database, machine: str) -> tuple[str, ...]:
    """The files that the machine's unfinished operations write to, take away or bring in; who recovers locks them."""
    found: dict[str, None] = {}
    for operation in operations.unfinished(database, machine):
        for step in operations.steps_of(database, operation.id):
            found.update(dict.fromkeys(written_by(step)))
            if isinstance(step, Record):
                layers = (layer for layer in step.delta.layers.values() if layer is not None and layer.owned)
                found.update(dict.fromkeys(layer.path for layer in layers))
    return tuple(path for path in found if os.path.exists(path))
