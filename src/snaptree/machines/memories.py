"""What a machine's memory needs of the room around the plan: asking for it, and telling how it went."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from snaptree.machines.power import Power
from snaptree.machines.survey import measure
from snaptree.model.tree import Tree
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.plan import Plan
from snaptree.planning.sweep import follow
from snaptree.planning.unmeasured import Unmeasured
from snaptree.planning.verbs import Request

if TYPE_CHECKING:
    from snaptree.images.locks import MachineLock
    from snaptree.machines.standalone import Standalone
    from snaptree.qemu.running import RunningQemu
    from snaptree.running.executor import Outcome


def _wants_memory(request: Request | None) -> bool:
    """Whether the request may save the memory of the running machine."""
    return isinstance(request, SnapshotRequest) and request.memory


async def with_memory(power: Power, qemu: RunningQemu | None, request: Request | None) -> Power:
    """What the machine does, with what its monitor says of its memory, if the request may save that."""
    if qemu is None or power.live is None or not _wants_memory(request):
        return power
    from snaptree.qemu.describing import saveable

    return replace(power, live=replace(power.live, memory=await saveable(qemu)))


async def merge_loose(machine: Standalone, before: Tree, qemu: RunningQemu, lock: MachineLock) -> tuple[str, ...]:
    """Merge what an operation has made loose that could not be planned with it; what it leaves as it is, in sentences.

    :param before: the tree before that operation.
    """
    from snaptree.machines.asking import again
    from snaptree.running import executor
    from snaptree.running.holding import files_of

    tree = machine.tree()
    survey = machine.survey(tree, await again(qemu, tree))
    while True:
        try:
            plan = follow(Plan("merge", "merge what is loose", (), 0, tree), before, survey, "auto")
            break
        except Unmeasured as wanted:
            survey = measure(tree, survey, wanted)
    lock.extend(files_of(plan))
    await executor.run(machine.database, machine.name, plan, lock=lock, qemu=qemu)
    return tuple(note for each in plan.every() for note in each.notes)


def as_it_went(plan: Plan, outcome: Outcome) -> Plan:
    """The plan with what was found out while it was carried out: how long the guest stood still, above all."""
    if outcome.paused is None:
        return replace(plan, notes=(*plan.notes, *outcome.said))
    still = f"the guest stood still for {outcome.paused * 1000:.0f} ms"
    return replace(plan, notes=(*plan.notes, *outcome.said, still), guest_pause=round(outcome.paused, 6))
