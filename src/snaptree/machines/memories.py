"""What a machine's memory needs of the room around the plan: asking for it, and telling how it went."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING

from msgspec.structs import replace

from snaptree.errors import SnaptreeError
from snaptree.machines.power import Power
from snaptree.machines.survey import planned
from snaptree.model.live import OFF
from snaptree.model.tree import Tree
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.plan import Plan
from snaptree.planning.remembering import Moves
from snaptree.planning.revert import RevertRequest, SwitchRequest, memory_moves
from snaptree.planning.sweep import follow
from snaptree.planning.verbs import Request

if TYPE_CHECKING:
    from snaptree.images.locks import MachineLock
    from snaptree.machines.standalone import Standalone
    from snaptree.qemu.running import RunningQemu
    from snaptree.running.executor import Outcome


async def with_memory(power: Power, qemu: RunningQemu | None, tree: Tree, request: Request | None) -> Power:
    """What the machine does, with what its monitor says of its memory, if the request is to save that."""
    if qemu is None or power.live is None:
        return power
    moves = memory_moves(tree, power.state, request)
    if not (isinstance(request, SnapshotRequest) and request.memory) and not (moves is not None and moves.saves):
        return power
    from snaptree.qemu.describing import saveable

    return replace(power, live=replace(power.live, memory=await saveable(qemu)))


def moving(machine: Standalone, request: Request, power: Power, tree: Tree) -> Moves | None:
    """What the request does with memory. That the machine can be started is seen to before anything is touched.

    :raise SnaptreeError: it could not be.
    """
    if isinstance(request, RevertRequest | SwitchRequest):
        power.require_known(machine.name)
    moves = memory_moves(tree, power.state, request)
    if moves is not None and moves.after != OFF:
        from snaptree.machines import switching

        try:
            switching.require_startable(machine, tree)
        except SnaptreeError as error:
            error.hint = f"{error.hint}; or leave the memory alone with --no-memory"
            raise
    return moves


async def arrive(name: str, merging: Awaitable[object]) -> list[str]:
    """Merge what is loose after the machine of that name has gone over; why something is not merged, if so."""
    try:
        await merging
    except SnaptreeError as error:
        return [f"what is loose is not merged yet: {error.message}; 'snaptree gc {name}' does it"]
    return []


async def merge_loose(
    machine: Standalone, before: Tree, qemu: RunningQemu | None, lock: MachineLock
) -> tuple[str, ...]:
    """Merge what an operation has made loose that could not be planned with it; what it leaves as it is, in sentences.

    :param before: the tree before that operation.
    """
    from snaptree.machines.asking import again
    from snaptree.running import executor
    from snaptree.running.holding import files_of

    tree = machine.tree()
    survey = machine.survey(tree, await again(qemu, tree) if qemu is not None else Power(OFF))
    nothing = Plan("merge", "merge what is loose", (), 0, tree)
    plan = planned(tree, survey, lambda measured: follow(nothing, before, measured, "auto"))
    lock.extend(files_of(plan))
    await executor.run(machine.database, machine.name, plan, lock=lock, qemu=qemu)
    return tuple(note for each in plan.every() for note in each.notes)


def as_it_went(plan: Plan, outcome: Outcome) -> Plan:
    """The plan with what was found out while it was carried out: how long the guest stood still, above all."""
    if outcome.paused is None:
        return replace(plan, notes=(*plan.notes, *outcome.said))
    still = f"the guest stood still for {outcome.paused * 1000:.0f} ms"
    return replace(plan, notes=(*plan.notes, *outcome.said, still), guest_pause=round(outcome.paused, 6))
