"""Giving roots their names back that a merge in a running machine could not: nothing is renamed while it runs."""

from __future__ import annotations

import posixpath

from msgspec.structs import replace

from snaptree.model.delta import diff
from snaptree.model.layer import Layer
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning.clearing import cleared
from snaptree.planning.draft import Draft, paths_of
from snaptree.planning.merged import renamed, to_be_known
from snaptree.planning.plan import Plan
from snaptree.planning.steps import Record, Step


def renamed_roots(tree: Tree) -> dict[str, Layer]:
    """The roots of disks that have another name than their disk came with, by disk.

    Where a layer of the tree has that, the root is one of several: it was made of an internal snapshot, say.
    """
    found: dict[str, Layer] = {}
    for disk, (path, _) in tree.roots.items():
        tip = tree.active_branch.tips.get(disk)
        root = tree.owned_root(tip.layer) if tip is not None else None
        if root is not None and root.path != path and not tree.layer_at(path):
            found[disk] = root
    return found


def put_back(tree: Tree, survey: Survey) -> Plan | None:
    """The plan that gives the roots their names back; ``None`` where all have theirs.

    A name that cannot be had any more is given up.
    """
    draft = Draft(tree, survey)
    steps: list[Step] = []
    for disk, root in sorted(renamed_roots(tree).items()):
        path, _ = tree.roots[disk]
        reason = _obstacle(draft, root, path)
        if reason:
            draft.notes.append(f"the root of {disk} is now {root.path}: {reason}")
            draft.tree = replace(draft.tree, roots={**draft.tree.roots, disk: (root.path, root.format)})
            continue
        draft.tree, named = renamed(draft.tree, root, path)
        steps += named
    if draft.tree is tree:
        return None
    after = draft.tree
    cleanup, _ = cleared(draft, after)
    return Plan(
        operation="name",
        summary="give " + ", ".join(sorted(path for path, _ in after.roots.values())) + " back its name",
        steps=(*steps, Record(diff(tree, after), to_be_known(after), "the root has its name again"), *cleanup),
        point_of_no_return=0,
        after=after,
        paths_after=paths_of(after),
        notes=tuple(draft.notes),
        touches=tuple(sorted({root.path for root in renamed_roots(tree).values()})),
    )


def _obstacle(draft: Draft, root: Layer, path: str) -> str:
    """Why the root cannot have the name."""
    folder, name = posixpath.split(path)
    if folder != posixpath.dirname(root.path) or root.format != draft.tree.roots[root.disk][1]:
        return f"{path} is in another folder, or of another format"
    if name in draft.survey.names.get(folder, frozenset()):
        return f"there is another file at {path} by now"
    if root.id in draft.outsiders:
        return "something that is not in the tree stands on it"
    facts = draft.facts(root.id)
    if facts.links > 1 or facts.block_device or not facts.removable:
        return "it cannot be renamed"
    for number in draft.tree.children.get(root.id, ()):
        if not draft.facts(number).writable:
            return f"{draft.tree.layers[number].path} stands on it and cannot be pointed elsewhere"
    return ""
