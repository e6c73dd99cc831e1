"""What a tree no longer needs, and which layers are loose or shared."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from msgspec.structs import replace

from snaptree.model.layer import LayerId, Point
from snaptree.model.tree import Tree


def settle(tree: Tree, outsiders: Collection[LayerId] = ()) -> Tree:
    """The tree without the layers, memories and roots of disks that nothing needs any more.

    A layer goes when no name needs it or a point in it, nothing of the tree stands on it, and nothing from outside does
    (``outsiders``); its parent may then be the next. Tips lose the identity that they had as frozen layers, but for
    those of branches that wait with their memory: it goes on from just what they show. A half-merged layer is whole
    again as soon as it can be told (see :func:`has_merged`).
    """
    standing = {layer: len(children) for layer, children in tree.children.items()}
    wanted = {point.layer for point in tree.names_on} | set(outsiders)
    queue = [layer for layer in tree.layers if layer not in wanted and not standing.get(layer)]
    gone: set[LayerId] = set()
    while queue:
        layer = tree.layers[queue.pop()]
        gone.add(layer.id)
        parent = layer.parent
        if parent is not None and parent in tree.layers:
            standing[parent] -= 1
            if not standing[parent] and parent not in wanted:
                queue.append(parent)
    settled = tree.without_layers(gone) if gone else tree
    referred = {each.memory for each in tree.named}
    if any(memory not in referred for memory in tree.memories):
        settled = replace(settled, memories={key: value for key, value in tree.memories.items() if key in referred})
    disks = {layer.disk for layer in settled.layers.values()} if gone else set(settled.roots)
    if any(disk not in disks for disk in settled.roots):
        settled = replace(settled, roots={disk: root for disk, root in settled.roots.items() if disk in disks})
    tips = [
        replace(layer, identity=None)
        for layer in settled.layers.values()
        if layer.identity is not None and not is_frozen(settled, layer.id)
    ]
    settled = settled.with_layers(*tips) if tips else settled
    merged = [layer for layer in settled.layers.values() if layer.half_merged and has_merged(settled, layer.id)]
    return settled.with_layers(*(replace(layer, half_merged=False) for layer in merged)) if merged else settled


def has_merged(tree: Tree, layer: LayerId) -> bool:
    """Whether nothing is left that could be committed into the layer: more than one thing stands on it, or none.

    QEMU has something stand on a layer beside what is being committed only when the commit is over. libvirt,
    interrupted after that, leaves the upper layer where it was. A snapshot on the lower one shows then what the upper
    one did, and has to go first.
    """
    return len(tree.children.get(layer, ())) != 1 and not tree.snapshots_on(layer)


def with_moved_roots(before: Tree, after: Tree) -> Tree:
    """The tree in which a disk that somebody else has put on another file has that for its root, once no name needs the
    one that it came with: its name is not for that file."""
    needed = {layer.path for point in after.names_on for layer in after.chain(point.layer)}
    roots = dict(after.roots)
    for disk, (path, _) in after.roots.items():
        tip = after.active_branch.tips.get(disk)
        root = after.owned_root(tip.layer) if tip is not None else None
        if root is None or root.made or path in needed or not before.layer_at(path) or root.id not in before.layers:
            continue
        if before.owned_root(root.id) == before.layers[root.id]:
            roots[disk] = (root.path, root.format)
    return after if roots == after.roots else replace(after, roots=roots)


def is_frozen(tree: Tree, layer: LayerId) -> bool:
    """Whether the layer is to stay as it is: no branch has it as its tip, or one that waits with its memory."""
    names = (name for name in tree.names_on.get(Point(layer), ()) if name in tree.branches)
    tips = [each for each in map(tree.branches.__getitem__, names) if Point(layer) in each.tips.values()]
    return all(each.memory is not None and each.name != tree.active for each in tips)


def is_loose(tree: Tree, layer: LayerId, outsiders: Collection[LayerId] = ()) -> bool:
    """Whether no name needs the owned layer by itself and exactly one thing, of this tree, stands on it."""
    return tree.layers[layer].owned and not tree.needed(layer) and layer not in outsiders and tree.stands_on(layer) == 1


def is_shared(tree: Tree, layer: LayerId, outsiders: Collection[LayerId] = ()) -> bool:
    """Whether no name needs the owned layer by itself and two or more things stand on it."""
    standing = tree.stands_on(layer) + (1 if layer in outsiders else 0)
    return tree.layers[layer].owned and not tree.needed(layer) and standing >= 2


def loose_layers(tree: Tree, outsiders: Collection[LayerId] = ()) -> frozenset[LayerId]:
    """All loose layers."""
    return frozenset(layer for layer in tree.layers if is_loose(tree, layer, outsiders))


def shared_layers(tree: Tree, outsiders: Collection[LayerId] = ()) -> frozenset[LayerId]:
    """All shared layers."""
    return frozenset(layer for layer in tree.layers if is_shared(tree, layer, outsiders))


def role(tree: Tree, layer: LayerId, outsiders: Collection[LayerId] = ()) -> str:
    """What the layer is for: ``snapshot``, ``tip``, ``shared``, ``loose`` or ``foreign``."""
    if not tree.layers[layer].owned:
        return "foreign"
    names = tree.names_on.get(Point(layer), ())
    if any(name in tree.branches and Point(layer) in tree.branches[name].tips.values() for name in names):
        return "tip"
    if names or (tree.internals.get(layer) and not tree.children.get(layer)):
        return "snapshot"
    if is_loose(tree, layer, outsiders):
        return "loose"
    return "shared"


def surviving(tree: Tree, gone: Collection[str], name: str | None) -> str | None:
    """The nearest ancestor of the named snapshot (or it itself) that is not among those that go."""
    while name is not None and name in gone:
        name = tree.snapshots[name].parent
    return name


def without_names(tree: Tree, snapshots: Collection[str], branches: Collection[str] = ()) -> Tree:
    """The tree without these names; what grew from them moves to the nearest surviving ancestor."""
    gone = frozenset(snapshots)
    kept: Mapping[str, object] = {name: one for name, one in tree.snapshots.items() if name not in gone}
    moved = [
        replace(tree.snapshots[name], parent=surviving(tree, gone, tree.snapshots[name].parent))
        for name in kept
        if tree.snapshots[name].parent in gone
    ]
    lines = [
        replace(branch, parent=surviving(tree, gone, branch.parent))
        for branch in tree.branches.values()
        if branch.parent in gone and branch.name not in branches
    ]
    return tree.without_snapshots(*gone).with_snapshots(*moved).without_branches(*branches).with_branches(*lines)
