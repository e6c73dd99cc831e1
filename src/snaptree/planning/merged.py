"""The tree when a row of layers has become one, whoever has moved the data."""

from __future__ import annotations

from dataclasses import replace

from snaptree.model.layer import LayerId, Point
from snaptree.model.tree import Tree
from snaptree.planning.draft import is_tip
from snaptree.planning.ways import Row


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


def to_be_known(tree: Tree) -> tuple[LayerId, ...]:
    """The frozen layers whose looks are not kept yet; a half-merged one is still being written."""
    return tuple(
        layer.id
        for layer in tree.layers.values()
        if layer.owned and layer.identity is None and not layer.half_merged and not is_tip(tree, layer.id)
    )
