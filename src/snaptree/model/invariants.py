"""The invariants of a tree (DESIGN.md, "The model"), checked in one place."""

from __future__ import annotations

from collections.abc import Iterator

from snaptree.model.layer import LayerId, Point
from snaptree.model.tree import Tree


def violations(tree: Tree, outsiders: frozenset[LayerId] = frozenset()) -> tuple[str, ...]:
    """Every way in which the tree is not what a tree must be, as sentences; empty when it is sound.

    A tree that was found (made by hand, by virsh) may have some; a tree that a plan leaves has none that the tree
    before it did not have.

    :param outsiders: layers that something outside the tree stands on, which makes them needed.
    """
    return tuple(_found(tree, outsiders))


def _found(tree: Tree, outsiders: frozenset[LayerId]) -> Iterator[str]:
    yield from _references(tree)
    yield from _layers(tree)
    yield from _tips(tree)
    yield from _half_merged(tree)
    yield from _needs(tree, outsiders)
    yield from _names(tree)


def _references(tree: Tree) -> Iterator[str]:
    if tree.active not in tree.branches:
        yield f"the active branch {tree.active!r} does not exist"
    for owner, points in [
        *((f"snapshot {each.name!r}", each.points) for each in tree.snapshots.values()),
        *((f"branch {each.name!r}", each.tips) for each in tree.branches.values()),
    ]:
        for disk, point in points.items():
            if point.layer not in tree.layers:
                yield f"{owner} needs layer {point.layer}, which does not exist"
            elif tree.layers[point.layer].disk != disk:
                yield f"{owner} has a layer of {tree.layers[point.layer].disk} for {disk}"
    for snapshot in tree.snapshots.values():
        if snapshot.parent is not None and snapshot.parent not in tree.snapshots:
            yield f"snapshot {snapshot.name!r} has parent {snapshot.parent!r}, which does not exist"
    reached: set[str] = set()
    queue = list(tree.child_snapshots.get(None, ()))
    while queue:
        name = queue.pop()
        reached.add(name)
        queue.extend(tree.child_snapshots.get(name, ()))
    for name in tree.snapshots:
        if name not in reached and tree.snapshots[name].parent in tree.snapshots:
            yield f"snapshot {name!r} is in a loop of parents"
    for branch in tree.branches.values():
        if branch.parent is not None and branch.parent not in tree.snapshots:
            yield f"branch {branch.name!r} grew from {branch.parent!r}, which does not exist"
    for wanted in tree.named:
        if wanted.memory is not None and wanted.memory not in tree.memories:
            yield f"{wanted.name!r} refers to memory {wanted.memory}, which does not exist"


def _layers(tree: Tree) -> Iterator[str]:
    sound: set[LayerId] = set()
    for layer in tree.layers.values():
        if layer.parent is None:
            continue
        if layer.parent not in tree.layers:
            yield f"layer {layer.path} stands on layer {layer.parent}, which does not exist"
            continue
        parent = tree.layers[layer.parent]
        if parent.disk != layer.disk:
            yield f"layer {layer.path} of {layer.disk} stands on {parent.path} of {parent.disk}"
        if parent.owned and not layer.owned:
            yield f"foreign layer {layer.path} stands on {parent.path}, which is owned"
        walked: list[LayerId] = []
        at: LayerId | None = layer.id
        while at is not None and at not in sound:
            if at in walked:
                yield f"layer {layer.path} is in a loop of backing files"
                break
            walked.append(at)
            at = tree.layers[at].parent if at in tree.layers else None
        sound.update(walked)


def _tips(tree: Tree) -> Iterator[str]:
    holders: dict[Point, list[str]] = {}
    for branch in tree.branches.values():
        for disk, point in branch.tips.items():
            holders.setdefault(point, []).append(branch.name)
            if point.internal is not None and branch.name == tree.active:
                yield f"the active branch's {disk} is an internal point"
            if point.internal is None and point.layer in tree.layers:
                layer = tree.layers[point.layer]
                if tree.children.get(layer.id):
                    yield f"something stands on {layer.path}, the tip of branch {branch.name!r}"
                if not layer.owned:
                    yield f"{layer.path}, the tip of branch {branch.name!r}, is foreign"
    for point, names in holders.items():
        if len(names) > 1:
            yield f"branches {', '.join(sorted(names))} have one tip together (layer {point.layer})"
    for snapshot in tree.snapshots.values():
        for disk, point in snapshot.points.items():
            if point in holders:
                yield f"snapshot {snapshot.name!r} has the tip of branch {holders[point][0]!r} as its point of {disk}"


def _half_merged(tree: Tree) -> Iterator[str]:
    for point, names in tree.names_on.items():
        if point.internal is None and point.layer in tree.layers and tree.layers[point.layer].half_merged:
            yield f"{', '.join(names)} needs {tree.layers[point.layer].path} as it is, and it is half-merged"


def _needs(tree: Tree, outsiders: frozenset[LayerId]) -> Iterator[str]:
    for layer in tree.layers.values():
        wanted = tree.needed(layer.id) or tree.internals.get(layer.id) or tree.children.get(layer.id)
        if not wanted and layer.id not in outsiders:
            yield f"nothing needs layer {layer.path}"
    referred = {each.memory for each in tree.named}
    for memory in tree.memories.values():
        if memory.id not in referred:
            yield f"nothing refers to memory {memory.path}"


def _names(tree: Tree) -> Iterator[str]:
    for name in tree.snapshots:
        if name in tree.branches:
            yield f"a snapshot and a branch are both named {name!r}"
    for kind in (tree.snapshots, tree.branches):
        for key, value in kind.items():
            if value.name != key:
                yield f"{value.name!r} is kept under the name {key!r}"
