"""How the steps are carried out that the QEMU of a running machine takes: ``do``, ``undo`` and ``happened`` of its own.

All that waits for QEMU is loaded from here, and only where it is needed.
"""

from __future__ import annotations

from snaptree.planning.live_steps import LiveMerge, LiveOpen, LiveSettle, LiveSnapshot, LiveSwap
from snaptree.planning.memory_steps import GoOver, SaveMemory
from snaptree.planning.steps import DeleteInternal, LiveStep
from snaptree.running.carry import going_over, live, live_internals, live_merge, live_swap, memory
from snaptree.running.context import Context


async def do(step: LiveStep, context: Context) -> None:
    """Take the step."""
    match step:
        case LiveSnapshot():
            await live.snapshot(step, context)
        case LiveOpen():
            await live_internals.open_to_write(step, context)
        case LiveMerge():
            await live_merge.merge(step, context)
        case LiveSwap():
            await live_swap.swap(step, context)
        case LiveSettle():
            await live_swap.settle(step, context)
        case SaveMemory():
            await memory.save(step, context)
        case GoOver():
            await going_over.go_over(step, context)


async def delete_internal(step: DeleteInternal, context: Context) -> None:
    """Delete an internal snapshot where a machine runs, be its layer open there or not."""
    await live_internals.delete(step, context)


async def undo(step: LiveStep, context: Context) -> None:
    """Take the step back; one that comes after the point of no return has no way back."""
    match step:
        case LiveSnapshot():
            await live.unsnapshot(step, context)
        case LiveOpen():
            await live_internals.open_to_read(step.paths, context)
        case LiveMerge():
            await live_merge.unmerge(step, context)
        case LiveSwap():
            await live_swap.unswap(step, context)
        case SaveMemory():
            await memory.unsave(step, context)
        case GoOver():
            await going_over.ungo(step, context)
        case LiveSettle():
            pass


async def happened(step: LiveStep, context: Context) -> bool:
    """Whether it has happened at an instant that we may not have lived to see."""
    match step:
        case LiveSnapshot() | SaveMemory():
            return await live.was_frozen(step, context)
        case LiveMerge():
            return await live_merge.went_on(step, context)
        case GoOver():
            return await going_over.went_over(step, context)
        case _:
            return False
