"""The tree: one machine's layers, snapshots, branches and memories, as an immutable value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

from msgspec import Struct, field
from msgspec.structs import replace

from snaptree.model.branch import Branch
from snaptree.model.layer import Layer, LayerId, Point
from snaptree.model.memory import Memory
from snaptree.model.snapshot import Snapshot

MAX_CHAIN = 200
"""Chains end here (DESIGN.md): deeper ones slow every read and run into QEMU's own limits."""


class Tree(Struct, frozen=True, dict=True):
    """One machine's layers, snapshots, branches and memories.

    ``roots`` remembers, per disk, the path and format that the owned root had when the disk came under snaptree's care:
    the name that every merge puts back. Verbs never change a tree; they make new ones with the ``with_*`` methods.
    """

    machine: str
    active: str
    layers: Mapping[LayerId, Layer] = field(default_factory=dict)
    snapshots: Mapping[str, Snapshot] = field(default_factory=dict)
    branches: Mapping[str, Branch] = field(default_factory=dict)
    memories: Mapping[int, Memory] = field(default_factory=dict)
    roots: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    # ---- looking around -------------------------------------------------------------------------------------------

    @property
    def active_branch(self) -> Branch:
        """The branch that the machine works on."""
        return self.branches[self.active]

    @property
    def disks(self) -> tuple[str, ...]:
        """The targets of the disks that the machine has now, sorted."""
        return tuple(sorted(self.active_branch.tips))

    @property
    def named(self) -> tuple[Snapshot | Branch, ...]:
        """All that has a name: the snapshots, then the branches."""
        return (*self.snapshots.values(), *self.branches.values())

    @cached_property
    def children(self) -> Mapping[LayerId, tuple[LayerId, ...]]:
        """The layers whose parent each layer is, in order of their ids."""
        found: dict[LayerId, list[LayerId]] = {}
        for layer in sorted(self.layers.values(), key=lambda each: each.id):
            if layer.parent is not None:
                found.setdefault(layer.parent, []).append(layer.id)
        return {key: tuple(ids) for key, ids in found.items()}

    @cached_property
    def names_on(self) -> Mapping[Point, tuple[str, ...]]:
        """The names (of snapshots and branches) that need each point."""
        found: dict[Point, list[str]] = {}
        for snapshot in self.snapshots.values():
            for point in snapshot.points.values():
                found.setdefault(point, []).append(snapshot.name)
        for branch in self.branches.values():
            for point in branch.tips.values():
                found.setdefault(point, []).append(branch.name)
        return {point: tuple(names) for point, names in found.items()}

    @cached_property
    def internals(self) -> Mapping[LayerId, tuple[str, ...]]:
        """The tags of the internal points that names need, per layer, sorted."""
        found: dict[LayerId, set[str]] = {}
        for point in self.names_on:
            if point.internal is not None:
                found.setdefault(point.layer, set()).add(point.internal)
        return {layer: tuple(sorted(tags)) for layer, tags in found.items()}

    @cached_property
    def child_snapshots(self) -> Mapping[str | None, tuple[str, ...]]:
        """Names of the snapshots that grew from each snapshot (``None``: the roots), oldest first."""
        found: dict[str | None, list[Snapshot]] = {}
        for snapshot in self.snapshots.values():
            found.setdefault(snapshot.parent, []).append(snapshot)
        return {
            key: tuple(each.name for each in sorted(group, key=lambda one: (one.created, one.name)))
            for key, group in found.items()
        }

    def needed(self, layer: LayerId) -> bool:
        """Whether a name needs the layer as a whole."""
        return bool(self.names_on.get(Point(layer)))

    def stands_on(self, layer: LayerId) -> int:
        """How many things of this tree stand on the layer: each child once, and once for every internal point in it."""
        return sum(1 + len(self.internals.get(child, ())) for child in self.children.get(layer, ()))

    def snapshots_on(self, layer: LayerId) -> tuple[str, ...]:
        """The snapshots whose point is the layer as a whole."""
        return tuple(name for name in self.names_on.get(Point(layer), ()) if name in self.snapshots)

    def chain(self, layer: LayerId) -> Iterator[Layer]:
        """The layer, its parent, and so on down to the lowest; a loop ends where it would repeat."""
        seen: set[LayerId] = set()
        at: LayerId | None = layer
        while at is not None and at in self.layers and at not in seen:
            seen.add(at)
            yield self.layers[at]
            at = self.layers[at].parent

    def deepest_first(self, layers: Iterable[Layer]) -> list[Layer]:
        """The layers, each before those that it stands on."""
        depths: dict[LayerId, int] = {}
        found = list(layers)
        for layer in found:
            above: list[LayerId] = []
            below = 0
            for each in self.chain(layer.id):
                if each.id in depths:
                    below = depths[each.id]
                    break
                above.append(each.id)
            depths.update((each, below + number) for number, each in enumerate(reversed(above), 1))
        return sorted(found, key=lambda each: -depths[each.id])

    def owned_root(self, layer: LayerId) -> Layer | None:
        """The lowest owned layer beneath (or at) the given one."""
        owned = [each for each in self.chain(layer) if each.owned]
        return owned[-1] if owned else None

    def descendants(self, name: str) -> tuple[str, ...]:
        """The snapshots that grew from the named one, in all generations, parents first."""
        found: list[str] = []
        queue = list(self.child_snapshots.get(name, ()))
        while queue:
            each = queue.pop(0)
            found.append(each)
            queue.extend(self.child_snapshots.get(each, ()))
        return tuple(found)

    def has_name(self, name: str) -> bool:
        """Whether a snapshot or a branch has the name."""
        return name in self.snapshots or name in self.branches

    def layer_at(self, path: str) -> tuple[Layer, ...]:
        """The layers whose file is at the path (a golden image may be a layer of several disks)."""
        return tuple(layer for layer in self.layers.values() if layer.path == path)

    def next_layer_id(self) -> LayerId:
        """An id that no layer has."""
        return max(self.layers, default=0) + 1

    # ---- making new trees -----------------------------------------------------------------------------------------

    def with_layers(self, *layers: Layer) -> Tree:
        """The tree with these layers added or replaced."""
        made = replace(self, layers={**self.layers, **{layer.id: layer for layer in layers}})
        return self._alike(made, [layer.id for layer in layers])

    def without_layers(self, ids: set[LayerId] | frozenset[LayerId]) -> Tree:
        """The tree without these layers."""
        made = replace(self, layers={key: value for key, value in self.layers.items() if key not in ids})
        return self._alike(made, ids)

    def with_snapshots(self, *snapshots: Snapshot) -> Tree:
        """The tree with these snapshots added or replaced."""
        return self._alike(replace(self, snapshots={**self.snapshots, **{each.name: each for each in snapshots}}))

    def without_snapshots(self, *names: str) -> Tree:
        """The tree without these snapshots; nothing else is changed."""
        gone = frozenset(names)
        kept = {key: value for key, value in self.snapshots.items() if key not in gone}
        return self._alike(replace(self, snapshots=kept))

    def with_branches(self, *branches: Branch) -> Tree:
        """The tree with these branches added or replaced."""
        return self._alike(replace(self, branches={**self.branches, **{each.name: each for each in branches}}))

    def without_branches(self, *names: str) -> Tree:
        """The tree without these branches; nothing else is changed."""
        gone = frozenset(names)
        kept = {key: value for key, value in self.branches.items() if key not in gone}
        return self._alike(replace(self, branches=kept))

    def _alike(self, made: Tree, changed: Iterable[LayerId] = ()) -> Tree:
        """The new tree, with what was worked out here of the layers that have not changed in it.

        Merges that follow one another make tree after tree: with ten thousand layers it is this that takes the time.
        """
        if "children" not in vars(self):
            return made
        left: dict[LayerId, set[LayerId]] = {}
        come: dict[LayerId, set[LayerId]] = {}
        for layer in changed:
            for tree, moved in ((self, left), (made, come)):
                parent = tree.layers[layer].parent if layer in tree.layers else None
                if parent is not None:
                    moved.setdefault(parent, set()).add(layer)
        children = dict(self.children)
        for parent in left.keys() | come.keys():
            group = set(children.get(parent, ())) - left.get(parent, set()) | come.get(parent, set())
            if group:
                children[parent] = tuple(sorted(group))
            else:
                children.pop(parent, None)
        vars(made)["children"] = children
        return made
