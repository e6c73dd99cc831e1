"""Deleting: the names go at once, in one transaction; merging follows as separate work."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from snaptree.errors import NotFoundError, RefusedError, UsageError
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning.draft import Draft
from snaptree.planning.plan import Plan
from snaptree.planning.settle import without_names
from snaptree.planning.sweep import follow
from snaptree.planning.ways import WAYS


class DeleteRequest(Struct, frozen=True):
    """``snaptree delete NAME SNAP…``."""

    names: tuple[str, ...]
    merge: str = "auto"
    children: bool = False
    children_only: bool = False
    with_branches: bool = False
    memory_only: bool = False


def require_way(way: str) -> None:
    """Refuse a way to merge that there is not.

    :raise UsageError: names those that there are.
    """
    if way not in WAYS:
        raise UsageError(f"{way!r} is not a way to merge", f"use one of {', '.join(WAYS)}")


def delete(tree: Tree, survey: Survey, request: DeleteRequest) -> Plan:
    """Plan to delete snapshots.

    Their child snapshots and branches move to the nearest surviving ancestor; then what has become loose is merged.

    :raise NotFoundError: there is no such snapshot.
    """
    require_way(request.merge)
    if request.children and request.children_only:
        raise UsageError("--children and --children-only exclude each other", "give one of them")
    gone: dict[str, None] = {}
    for name in request.names:
        if name not in tree.snapshots:
            hint = f"see 'snaptree tree {tree.machine}'"
            if name in tree.branches:
                hint = f"{name!r} is a branch: use --branch {name}"
            raise NotFoundError(f"machine {tree.machine} has no snapshot {name!r}", hint)
        if not request.children_only:
            gone[name] = None
        if request.children or request.children_only:
            gone.update(dict.fromkeys(tree.descendants(name)))
    if request.memory_only:
        return _memory_only(tree, survey, request)
    branches = [
        branch.name
        for branch in tree.branches.values()
        if request.with_branches and branch.parent in gone and branch.name != tree.active
    ]
    draft = Draft(tree, survey)
    draft.tree = without_names(tree, tuple(gone), tuple(branches))
    what = ", ".join(repr(each) for each in [*gone, *branches]) or "nothing"
    plan = draft.conclude("delete", f"delete {what}", f"the names go: {what}")
    return follow(plan, tree, survey, request.merge)


def _memory_only(tree: Tree, survey: Survey, request: DeleteRequest) -> Plan:
    for name in request.names:
        if tree.snapshots[name].memory is None:
            raise RefusedError(f"snapshot {name!r} has no memory", "delete it without --memory-only")
    draft = Draft(tree, survey)
    draft.tree = tree.with_snapshots(*(replace(tree.snapshots[name], memory=None) for name in request.names))
    what = ", ".join(map(repr, request.names))
    return draft.conclude("delete", f"delete the memory of {what}", f"the memory of {what} goes")


def delete_branch(tree: Tree, survey: Survey, name: str, merge: str) -> Plan:
    """Plan to delete a parked branch and its tips; then what is loose merges.

    :raise NotFoundError: there is no such branch.
    :raise RefusedError: the machine works on it.
    """
    require_way(merge)
    if name not in tree.branches:
        hint = f"{name!r} is a snapshot: leave out --branch" if name in tree.snapshots else ""
        raise NotFoundError(
            f"machine {tree.machine} has no branch {name!r}", hint or f"see 'snaptree branches {tree.machine}'"
        )
    if name == tree.active:
        raise RefusedError(
            f"the machine works on branch {name!r}", "switch to another branch first, or use 'revert --discard'"
        )
    draft = Draft(tree, survey)
    draft.tree = tree.without_branches(name)
    plan = draft.conclude("delete", f"delete branch {name!r}", f"branch {name!r} goes")
    return follow(plan, tree, survey, merge)
