"""What a domain's memory needs of the room around the plan: asking libvirt for it."""

from __future__ import annotations

from dataclasses import replace

from snaptree.model.live import Live
from snaptree.model.tree import Tree
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.domain_memory_steps import DomainGoOver
from snaptree.planning.plan import Plan
from snaptree.planning.revert import memory_moves
from snaptree.planning.verbs import Request
from snaptree.store.libvirt.calls import DomainHandle
from snaptree.store.libvirt.memory import DomainMemory


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
