"""How each kind of step is carried out: ``do`` takes it, ``undo`` takes it back.

``do`` can be repeated: what was done already is found out from the files and not done again.
"""

from __future__ import annotations

from snaptree.planning.domain_steps import LibvirtStep
from snaptree.planning.steps import (
    MAY_HAVE_HAPPENED,
    ApplyInternal,
    BuildFromPoint,
    BuildMerged,
    CopyFirmware,
    Cover,
    DeleteInternal,
    Forget,
    LiveStep,
    MakeInternal,
    MakeOverlay,
    Move,
    PutInPlace,
    Record,
    Register,
    RemoveFirmware,
    Repoint,
    Shrink,
    Step,
    TakeName,
    Unlink,
)
from snaptree.running.carry import firmware, headers, internals, making, sharing, tree
from snaptree.running.carry import moving as moving
from snaptree.running.context import Context


async def do(step: Step, context: Context) -> None:
    """Take the step."""
    if isinstance(step, LibvirtStep):
        from snaptree.running.carry import by_libvirt

        await by_libvirt.do(step, context)
        return
    if isinstance(step, LiveStep):
        from snaptree.running.carry import by_running

        await by_running.do(step, context)
        return
    match step:
        case MakeOverlay():
            making.make_overlay(step, context)
        case BuildFromPoint():
            making.build_from_point(step, context)
        case CopyFirmware():
            firmware.copy(step, context)
        case RemoveFirmware():
            firmware.remove(step)
        case MakeInternal():
            internals.make(step, context)
        case ApplyInternal():
            internals.apply(step, context)
        case DeleteInternal() if context.qemu is not None:
            from snaptree.running.carry import by_running

            await by_running.delete_internal(step, context)
        case DeleteInternal():
            internals.delete(step, context)
        case Cover():
            moving.cover(step, context)
        case Shrink():
            moving.shrink(step, context)
        case Move():
            await moving.move(step, context)
        case BuildMerged():
            sharing.build(step, context)
        case PutInPlace():
            sharing.put_in_place(step, context)
        case Repoint():
            headers.repoint(step, context)
        case TakeName():
            making.take_name(step)
        case Unlink():
            making.unlink(step, context)
        case Record():
            tree.record(step, context)
        case Register():
            tree.register(step, context)
        case Forget():
            context.journal.forget(step)


async def undo(step: Step, context: Context) -> None:
    """Take the step back; before the point of no return only.

    What has no way back there needs none: zeroes in the top show the same to everything, and a mark that a layer is
    being written to stays true.
    """
    if isinstance(step, LibvirtStep):
        from snaptree.running.carry import by_libvirt

        await by_libvirt.undo(step, context)
        return
    if isinstance(step, LiveStep):
        from snaptree.running.carry import by_running

        await by_running.undo(step, context)
        return
    match step:
        case MakeOverlay() | BuildFromPoint():
            making.unmake(step.path, context)
        case CopyFirmware():
            firmware.uncopy(step, context)
        case MakeInternal():
            internals.unmake(step, context)
        case Move():
            moving.unmove(step, context)
        case BuildMerged():
            sharing.unbuild(step, context)
        case _:
            pass


async def happened(steps: tuple[Step, ...], context: Context) -> bool:
    """Whether the step that was being taken, just before the point of no return, has happened all the same.

    What QEMU does is done at one instant that we may not have lived to see. Then the operation goes forward from there:
    the step is taken once more, and finds that it is done.
    """
    step = steps[context.journal.step]
    if not isinstance(step, MAY_HAVE_HAPPENED):
        return False
    if isinstance(step, LibvirtStep):
        from snaptree.running.carry import by_libvirt

        return await by_libvirt.happened(step, context)
    if not isinstance(step, LiveStep):
        return False
    from snaptree.running.carry import by_running

    return await by_running.happened(step, context)
