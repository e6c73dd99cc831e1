"""The difference between two trees, as data: what a step of a plan records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from msgspec import Struct, field

from snaptree.model.branch import Branch
from snaptree.model.layer import Layer
from snaptree.model.memory import Memory
from snaptree.model.snapshot import Snapshot
from snaptree.model.tree import Tree

K = TypeVar("K", int, str)
V = TypeVar("V")


class Delta(Struct, frozen=True):
    """What changes from one tree to another; ``None`` says that an entry goes."""

    layers: Mapping[int, Layer | None] = field(default_factory=dict)
    snapshots: Mapping[str, Snapshot | None] = field(default_factory=dict)
    branches: Mapping[str, Branch | None] = field(default_factory=dict)
    memories: Mapping[int, Memory | None] = field(default_factory=dict)
    roots: Mapping[str, tuple[str, str] | None] = field(default_factory=dict)
    active: str | None = None

    def __bool__(self) -> bool:
        return bool(
            self.layers or self.snapshots or self.branches or self.memories or self.roots or self.active is not None
        )


def _changes(before: Mapping[K, V], after: Mapping[K, V]) -> dict[K, V | None]:
    found: dict[K, V | None] = {key: None for key in before if key not in after}
    for key, value in after.items():
        if key not in before or (before[key] is not value and before[key] != value):
            found[key] = value
    return found


def _changed(base: Mapping[K, V], changes: Mapping[K, V | None]) -> dict[K, V]:
    merged: dict[K, V] = {key: value for key, value in base.items() if key not in changes}
    merged.update({key: value for key, value in changes.items() if value is not None})
    return merged


def diff(before: Tree, after: Tree) -> Delta:
    """What turns ``before`` into ``after``."""
    return Delta(
        layers=_changes(before.layers, after.layers),
        snapshots=_changes(before.snapshots, after.snapshots),
        branches=_changes(before.branches, after.branches),
        memories=_changes(before.memories, after.memories),
        roots=_changes(before.roots, after.roots),
        active=after.active if after.active != before.active else None,
    )


def apply(tree: Tree, delta: Delta) -> Tree:
    """The tree with the delta applied; applying it twice gives the same tree."""
    return Tree(
        machine=tree.machine,
        active=delta.active if delta.active is not None else tree.active,
        layers=_changed(tree.layers, delta.layers),
        snapshots=_changed(tree.snapshots, delta.snapshots),
        branches=_changed(tree.branches, delta.branches),
        memories=_changed(tree.memories, delta.memories),
        roots=_changed(tree.roots, delta.roots),
    )
