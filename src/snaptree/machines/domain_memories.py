"""What a domain's memory needs of the room around the plan: asking libvirt for it."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from snaptree.errors import SnaptreeError
from snaptree.machines.domain_reading import Reading
from snaptree.model.domain import Record
from snaptree.model.layer import Point
from snaptree.model.live import Live
from snaptree.model.tree import Tree
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.domain_memory_steps import DomainGoOver
from snaptree.planning.plan import Plan
from snaptree.planning.revert import RevertRequest, memory_moves
from snaptree.planning.verbs import Request
from snaptree.store.libvirt import applying
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


def within(tree: Tree, reading: Reading, request: Request) -> Record | None:
    """The record of the snapshot that is gone back to, if libvirt has the memory of that within the images that the
    domain is on."""
    if not isinstance(request, RevertRequest) or request.memory is False or request.delete:
        return None
    record = next((each for each in reading.records if each.name == request.name and each.inside), None)
    here = {disk: Point(tip.layer, request.name) for disk, tip in tree.active_branch.tips.items()}
    snapshot = tree.snapshots.get(request.name)
    return record if snapshot is not None and dict(snapshot.points) == here else None


def load_within(handle: DomainHandle, name: str, state: str) -> list[str]:
    """Have a domain that is off go on from the memory that libvirt has within its images; what there is to say of it.

    The images' active state is that of then already, so that the domain may as well be started anew: where libvirt
    cannot load the memory that is left to be done. It puts the definition of then in the place of that of now
    (:func:`define_again`).
    """
    try:
        DomainMemory(handle).load_within(name, state)
    except SnaptreeError as error:
        return [f"the memory of {name!r} is not loaded: {error.message}"]
    return [f"the machine goes on from the memory of {name!r}"]


def define_again(handle: DomainHandle, definition: str | None, tree: Callable[[], Tree]) -> None:
    """Let a domain have the definition that it had before libvirt loaded memory within its images.

    :param definition: without it nothing was to be loaded.
    :param tree: reads it.
    """
    if definition is not None:
        handle.define(definition)
        applying.apply(handle, tree())
