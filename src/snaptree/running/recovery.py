"""Finishing or undoing what a kill left between."""

from __future__ import annotations

from snaptree.running.context import Context
from snaptree.running.executor import take, undo_all
from snaptree.running.holding import Holding
from snaptree.running.journal import Journal
from snaptree.store import operations
from snaptree.store.database import Database

DYING_SECONDS = 10.0
"""So long QEMU's programs may take to go after the snaptree that started them was killed."""


async def recover(database: Database, machine: str) -> tuple[str, ...]:
    """Bring every operation of the machine that was killed to an end, under the machine's lock.

    Before its point of no return an operation is undone, after it it is finished. A merge that merely waits is left to
    ``gc``.

    :return: a sentence for each operation.
    :raise SnaptreeError: a step failed again; the operation stays in the journal and can be tried again.
    """
    return tuple([await _settle(database, each) for each in operations.unfinished(database, machine)])


async def _settle(database: Database, operation: operations.Operation) -> str:
    steps = operations.steps_of(database, operation.id)
    journal = Journal.resume(database, operation)
    holding = Holding(patience=DYING_SECONDS)
    context = Context(journal=journal, holding=holding, recovering=True)
    try:
        if operation.step < operation.no_return or operation.step < 0:
            begun = steps[: operation.step + 1]
            holding.take_steps(begun)
            state = await undo_all(begun, context, "it was killed and has been recovered")
            how = "waits to go on" if state == operations.PAUSED else "was undone"
            return f"{operation.summary}: it had been killed, and {how}"
        holding.take_steps(steps[operation.step :])
        for number in range(operation.step, len(steps)):
            if number > operation.step:
                journal.take(number)
                context.recovering = False
            await take(steps[number], context)
        journal.end(operations.DONE, "it was killed and has been recovered")
        return f"{operation.summary}: it had been killed, and was finished"
    finally:
        holding.release()
