"""What a merge leads to, whoever moves the data: the tree when layers have become one, and the end of the plan."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from snaptree.model.delta import diff
from snaptree.model.layer import Layer, LayerId, Point
from snaptree.model.tree import Tree
from snaptree.planning.clearing import cleared
from snaptree.planning.draft import Draft, paths_of
from snaptree.planning.plan import Plan
from snaptree.planning.settle import is_frozen, settle
from snaptree.planning.steps import Record, Repoint, Step, TakeName
from snaptree.planning.ways import Choice, Row, is_owned_root

SHARING_SECONDS = 50e-6
"""What sharing one run of clusters takes, for an estimate."""


def merged_down(tree: Tree, row: Row) -> Tree:
    """The tree when the lowest layer has it all: what stood on the highest stands on it, and has its name."""
    lowest, top = tree.layers[row[0]], tree.layers[row[-1]]
    # Where the top itself waits for a commit to go on, so does what it is merged into.
    merged = replace(lowest, virtual_size=top.virtual_size, half_merged=top.half_merged, identity=None)
    was, now = Point(top.id), Point(lowest.id)
    snapshots = [
        replace(each, points={disk: now if point == was else point for disk, point in each.points.items()})
        for each in tree.snapshots.values()
        if was in each.points.values()
    ]
    branches = [
        replace(each, tips={disk: now if point == was else point for disk, point in each.tips.items()})
        for each in tree.branches.values()
        if was in each.tips.values()
    ]
    children = [replace(tree.layers[each], parent=lowest.id, identity=None) for each in tree.children.get(top.id, ())]
    left = tree.without_layers(frozenset(row[1:])).with_layers(merged, *children)
    return left.with_snapshots(*snapshots).with_branches(*branches)


def merged_up(draft: Draft, row: Row) -> tuple[Tree, bool]:
    """The tree when the highest layer has it all: it stands on what the lowest stood on, and keeps its path.

    :return: also whether the disk's root has gone by it.
    """
    tree = draft.tree
    lowest, top = tree.layers[row[0]], tree.layers[row[-1]]
    pulled = tree.with_layers(replace(top, parent=lowest.parent, identity=None))
    return pulled, is_owned_root(tree, lowest.id) and lowest.id not in settle(pulled, draft.outsiders).layers


def renamed(tree: Tree, layer: Layer, path: str) -> tuple[Tree, list[Step]]:
    """The tree in which the layer has another name, and the steps that give it that; the old one is cleaned up."""
    children = [tree.layers[each] for each in tree.children.get(layer.id, ())]
    steps: list[Step] = [TakeName(layer.path, path)]
    steps += [Repoint(child.path, path, layer.format) for child in children]
    changed = (replace(child, identity=None) for child in children)
    return tree.with_layers(replace(layer, path=path, identity=None), *changed), steps


def merging(
    draft: Draft,
    choices: Sequence[Choice],
    steps: Sequence[Step],
    no_return: int,
    *,
    before: Tree,
    recorded: Tree,
    seconds: float,
    live: bool = False,
    pause: float = 0.0,
) -> Plan:
    """The plan of a merge: its steps, then the tree that the draft has, then the files go that nothing needs.

    :param before: the tree that it begins with, ``recorded`` the one that its first steps have left.
    :param seconds: how long it will take.
    :param live: QEMU has the layers open; the figures are estimates then.
    :param pause: for how many seconds the guest's disk waits.
    """
    after = settle(draft.tree, draft.outsiders)
    cleanup, freed = cleared(draft, after)
    record = Record(diff(recorded, after), to_be_known(after), "the merged layers are one")
    # What is shared with a file that stays takes no room.
    added = sum(choice.adds if choice.down or choice.row[0] not in after.layers else choice.grows for choice in choices)
    ways = sorted({choice.way for choice in choices})
    lowest = ", ".join(before.layers[choice.row[0]].path for choice in choices)
    return Plan(
        operation="merge",
        summary=f"merge {lowest}" + (" in the running machine" if live else ""),
        steps=(*steps, record, *cleanup),
        point_of_no_return=no_return,
        after=after,
        bytes_to_copy=sum(choice.bytes for choice in choices),
        peak_extra_bytes=sum(choice.grows for choice in choices),
        frees_bytes=freed - added,
        seconds=seconds,
        guest_pause=pause,
        way="+".join(ways),
        cancel="pauses" if "commit" in ways else "undoes",
        paths_after=paths_of(after),
        notes=tuple(draft.notes),
        touches=tuple(sorted({before.layers[each].path for choice in choices for each in choice.row})),
        estimate=live,
    )


def to_be_known(tree: Tree) -> tuple[LayerId, ...]:
    """The frozen layers whose looks are not kept yet; a half-merged one is still being written."""
    return tuple(
        layer.id
        for layer in tree.layers.values()
        if layer.owned and layer.identity is None and not layer.half_merged and is_frozen(tree, layer.id)
    )
