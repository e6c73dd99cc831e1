"""What a domain's memory needs of the room around the plan: asking libvirt for it, and doing what is left after."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from snaptree.errors import SnaptreeError
from snaptree.machines.survey import planned
from snaptree.model.live import OFF, Live
from snaptree.model.tree import Tree
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.domain_memory_steps import DomainGoOver
from snaptree.planning.domain_steps import with_records
from snaptree.planning.plan import Plan
from snaptree.planning.remembering import Moves
from snaptree.planning.revert import memory_moves
from snaptree.planning.sweep import follow
from snaptree.planning.verbs import Request
from snaptree.store.libvirt.calls import DomainHandle
from snaptree.store.libvirt.memory import DomainMemory

if TYPE_CHECKING:
    from snaptree.images.locks import MachineLock
    from snaptree.machines.libvirt import LibvirtMachine


def with_memory(handle: DomainHandle, live: Live | None, tree: Tree, request: Request) -> Live | None:
    """What the domain does, with what libvirt says of its memory, if the request is to save that."""
    if live is None:
        return None
    moves = memory_moves(tree, live.state, request)
    saves = isinstance(request, SnapshotRequest) and (request.memory or request.internal)
    if not saves and not (moves is not None and moves.saves):
        return live
    return replace(live, memory=DomainMemory(handle).saveable())


def require_loadable(handle: DomainHandle, plan: Plan) -> None:
    """See that the memory which is to be loaded is one, of this domain, with these disks, before anything is touched.

    :raise SnaptreeError: it is not.
    """
    for step in plan.steps:
        if isinstance(step, DomainGoOver) and step.memory is not None:
            DomainMemory(handle).definition(step.memory, step.disks)


async def arrive(machine: LibvirtMachine, moves: Moves, before: Tree, lock: MachineLock) -> str:
    """What is left to be done after the domain has gone over: merging what is loose, and starting it where no memory
    was loaded. Why something is not merged, if so."""
    why = ""
    try:
        await merge_loose(machine, before, lock)
    except SnaptreeError as error:
        why = f"what is loose is not merged yet: {error.message}; 'snaptree gc {machine.name}' does it"
    if moves.loads is None and moves.after != OFF:
        machine.start(moves.after)
    return why


async def merge_loose(machine: LibvirtMachine, before: Tree, lock: MachineLock) -> None:
    """Merge what an operation has made loose that could not be planned with it.

    :param before: the tree before that operation.
    """
    from snaptree.running import executor
    from snaptree.running.holding import files_of

    looked = machine.look()
    survey = machine.survey(looked, looked.tree)
    nothing = Plan("merge", "merge what is loose", (), 0, looked.tree)
    plan = planned(looked.tree, survey, lambda measured: follow(nothing, before, measured, "auto"))
    tell = machine.tell(looked)
    plan = with_records(machine.by_libvirt(plan, looked.tree, survey, tell), tell)
    lock.extend(files_of(plan))
    await executor.run(machine.database, machine.name, plan, lock=lock, spared=machine.opened())
