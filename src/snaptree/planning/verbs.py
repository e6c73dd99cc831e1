"""All verbs behind one door: ``plan(tree, survey, request)``."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from snaptree.model.machine import MachineConfig
from snaptree.model.sizes import readable
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning import accept, adopt, create, delete, naming, revert, sweep
from snaptree.planning.draft import paths_of
from snaptree.planning.plan import Plan
from snaptree.planning.steps import Register, Step, Unlink


class DeleteBranchRequest(Struct, frozen=True):
    """``snaptree delete NAME --branch BRANCH``."""

    name: str
    merge: str = "auto"


class RenameRequest(Struct, frozen=True):
    """``snaptree rename NAME OLD NEW``."""

    old: str
    new: str


class GcRequest(Struct, frozen=True):
    """``snaptree gc NAME``: merges that wait; with ``delete`` also files that snaptree made and nothing needs."""

    delete: bool = False


class PutBackRequest(Struct, frozen=True):
    """What a stop leaves to be done: roots get their names back."""


class SetRequest(Struct, frozen=True):
    """``snaptree set NAME …``: what is remembered of the machine besides its tree."""

    config: MachineConfig


class RepairRequest(Struct, frozen=True):
    """``snaptree verify NAME --repair``: libvirt's records say again what the tree says."""


class RemoveRequest(Struct, frozen=True):
    """``snaptree remove NAME``."""

    delete_files: bool = False


Request: TypeAlias = (
    accept.AcceptRequest
    | accept.OwnRequest
    | adopt.AttachRequest
    | adopt.DetachRequest
    | create.BranchRequest
    | create.SnapshotRequest
    | delete.DeleteRequest
    | revert.RevertRequest
    | revert.SwitchRequest
    | sweep.SquashRequest
    | DeleteBranchRequest
    | GcRequest
    | PutBackRequest
    | RemoveRequest
    | RenameRequest
    | RepairRequest
    | SetRequest
)


def as_found(tree: Tree, survey: Survey) -> Tree:
    """The tree with the sizes that the images have now: a tip may have been resized since it was made."""
    resized = [
        replace(layer, virtual_size=facts.virtual_size)
        for layer in tree.layers.values()
        if (facts := survey.layers.get(layer.id)) is not None
        and not facts.problem
        and facts.virtual_size not in (0, layer.virtual_size)
    ]
    return tree.with_layers(*resized) if resized else tree


def plan(tree: Tree, survey: Survey, request: Request) -> Plan:
    """The plan for a request, made without touching anything.

    :raise Unmeasured: figures are needed that the survey lacks: read them and ask again.
    :raise SnaptreeError: the request cannot or must not be carried out.
    """
    tree = as_found(tree, survey)
    match request:
        case create.SnapshotRequest():
            return create.snapshot(tree, survey, request)
        case create.BranchRequest():
            return create.branch(tree, survey, request)
        case delete.DeleteRequest():
            return delete.delete(tree, survey, request)
        case DeleteBranchRequest():
            return delete.delete_branch(tree, survey, request.name, request.merge)
        case revert.RevertRequest():
            return revert.revert(tree, survey, request)
        case revert.SwitchRequest():
            return revert.switch(tree, survey, request)
        case RenameRequest():
            return create.rename(tree, survey, request.old, request.new)
        case sweep.SquashRequest():
            return sweep.squash(tree, survey, request)
        case GcRequest():
            return _gc(tree, survey, request)
        case PutBackRequest():
            return naming.put_back(tree, survey) or Plan("name", "nothing to rename", (), 0, tree)
        case adopt.AttachRequest():
            return adopt.attach(tree, survey, request)
        case adopt.DetachRequest():
            return adopt.detach(tree, survey, request)
        case RemoveRequest():
            return adopt.remove(tree, survey, delete_files=request.delete_files)
        case accept.AcceptRequest():
            return accept.accept(tree, survey, request)
        case accept.OwnRequest():
            return accept.own(tree, survey)
        case SetRequest():
            return _set(tree, request)
        case RepairRequest():
            return Plan("repair", f"repair the records of machine {tree.machine!r}", (), 0, tree)


def _gc(tree: Tree, survey: Survey, request: GcRequest) -> Plan:
    steps: list[Step] = []
    notes: list[str] = []
    for stray in survey.strays:
        if request.delete and stray.made:
            steps.append(Unlink(stray.path, stray.generation, stray.inode, stray.allocated))
        elif stray.made:
            notes.append(f"nothing needs {stray.path} ({readable(stray.allocated)}); --delete removes it")
        else:
            notes.append(f"{stray.path} is not snaptree's and stands on nothing that it knows: it is left alone")
    for outsider in survey.outsiders:
        below = tree.layers[outsider.layer].path
        notes.append(f"{outsider.what} stands on {below} and is not in the tree: both are left alone")
    named = naming.put_back(tree, survey) if survey.live is None else None
    merges = sweep.gc(named.after if named is not None else tree, survey)
    return Plan(
        operation="gc",
        summary="finish merges that wait" + (" and remove what nothing needs" if steps else ""),
        steps=tuple(steps),
        point_of_no_return=0,
        after=tree,
        frees_bytes=sum(stray.allocated for stray in survey.strays if stray.made and request.delete),
        paths_after=paths_of(tree),
        notes=tuple(notes),
        then=(*([named] if named is not None else []), *merges),
    )


def _set(tree: Tree, request: SetRequest) -> Plan:
    return replace(
        Plan("set", f"remember machine {tree.machine!r}", (Register(request.config),), 0, tree),
        paths_after=paths_of(tree),
    )
