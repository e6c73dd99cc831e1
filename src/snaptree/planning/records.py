"""What libvirt's records of a domain's snapshots must say, so that virsh sees the tree and does it no harm.

- Each snapshot and each parked branch has a record: what virsh cannot see it would destroy.
- With external records one is always current: libvirt 11.3 crashes when it goes back while none is. Where the active
  branch grew from no snapshot, a placeholder stands for where it did.
- What the current record names as its overlays, going back with virsh unlinks. So they are the active tips: as
  ``revertDisks`` when other records grew from it, as ``disks`` otherwise.
- Any other record becomes current when virsh has deleted what grew from it, and going back unlinks then what it names
  as its overlay. So that is the one layer that stands on the point, in the active line, and no file at all where others
  stand there as well.
- Deleting a record from which nothing grew virsh unlinks its point; deleting another one it merges into the point what
  stands on it in the active line, whatever the record says; and with either it unlinks the memory. Where others need
  these files, internal snapshots are in them, or libvirt 11.3 would crash, the record is guarded: virsh takes it for
  one whose deletion was interrupted, and refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct, field

from snaptree.model.branch import Branch
from snaptree.model.domain import BRANCH, PLACEHOLDER, SNAPSHOT
from snaptree.model.layer import LayerId, Point
from snaptree.model.snapshot import FirmwareFile, Snapshot
from snaptree.model.tree import Tree

PLACEHOLDER_NAME = "snaptree-placeholder"
WHY_PLACEHOLDER = "Kept by snaptree so that virsh goes on working. It goes when it is no longer needed."
WHY_BRANCH = "A branch that snaptree has parked."


class Place(Struct, frozen=True):
    """Where a disk is at a point in time: the layer's file, and the internal snapshot in it, if it is one."""

    path: str
    format: str
    tag: str | None = None


class Wanted(Struct, frozen=True):
    """One record as it must be. ``overlays`` and ``reverts`` are files with their formats, by disk."""

    name: str
    kind: str
    parent: str | None
    created: float
    description: str
    points: Mapping[str, Place]
    overlays: Mapping[str, tuple[str, str]]
    reverts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    current: bool = False
    consistency: str = "off"
    memory: str | None = None
    firmware: tuple[FirmwareFile, ...] = ()
    guarded: frozenset[str] = frozenset()
    """The disks that virsh is kept from deleting."""
    active: str | None = None
    """Of the current one, the active branch's name."""

    @property
    def external(self) -> bool:
        """Whether libvirt takes it for an external snapshot."""
        return self.memory is not None or any(each.tag is None for each in self.points.values())


class _Family:
    """Which record grew from which: ``parents`` by the records' names, and the one that is ``current``."""

    def __init__(self, tree: Tree, parents: Mapping[str, str | None], current: str | None) -> None:
        self.parents = parents
        self.current = current
        self._active = (tree.active, tree.active_branch.parent)
        self._children: dict[str | None, list[str]] = {}
        for each, parent in parents.items():
            self._children.setdefault(parent, []).append(each)
        self.line: set[str] = set()
        """The current record and those that it grew from."""
        while current is not None and current not in self.line:
            self.line.add(current)
            current = parents.get(current)

    def children(self, name: str) -> int:
        """How many records grew from the named one, in one generation."""
        return len(self._children.get(name, ()))

    def grown(self, name: str) -> frozenset[str]:
        """All that grew from the named record, in all generations; with the active branch, if it did."""
        found = {name}
        waiting = [name]
        while waiting:
            waiting = [each for parent in waiting for each in self._children.get(parent, ()) if each not in found]
            found.update(waiting)
        active, parent = self._active
        return frozenset(found - {name} | ({active} if parent in found else set()))


def wanted_records(tree: Tree) -> tuple[Wanted, ...]:
    """The records that the tree needs, parents first."""
    parked = [each for each in tree.branches.values() if each.name != tree.active]
    named: list[Snapshot | Branch] = [*tree.snapshots.values(), *parked]
    here = tree.active_branch.parent
    stands = here if here is not None else _placeholder(tree) if any(map(_external, named)) else None
    parents: dict[str, str | None] = {each.name: each.parent for each in named}
    if here is None and stands is not None:
        parents = {name: parent if parent is not None else stands for name, parent in parents.items()}
        parents[stands] = None
    family = _Family(tree, parents, stands)
    made = {each.name: _wanted(tree, each, family) for each in named}
    if here is None and stands is not None:
        made[stands] = _standing(tree, stands, family)
    found: dict[str, Wanted] = {}

    def put(name: str) -> None:
        above: list[str] = []
        at: str | None = name
        while at is not None and at in made and at not in found and at not in above:
            above.append(at)
            at = made[at].parent
        for each in reversed(above):
            found[each] = made[each]

    for name in sorted(made, key=lambda each: (made[each].created, each)):
        put(name)
    return tuple(found.values())


def _points(named: Snapshot | Branch) -> Mapping[str, Point]:
    return named.points if isinstance(named, Snapshot) else named.tips


def _external(named: Snapshot | Branch) -> bool:
    return named.memory is not None or any(point.internal is None for point in _points(named).values())


def _placeholder(tree: Tree) -> str:
    name, number = PLACEHOLDER_NAME, 2
    while tree.has_name(name):
        name, number = f"{PLACEHOLDER_NAME}-{number}", number + 1
    return name


def _standing(tree: Tree, name: str, family: _Family) -> Wanted:
    """The placeholder: its points are what the active tips stand on.

    Of what is not ours it names nothing: virsh would merge a tip into it, or unlink it. libvirt wants a point of each
    disk all the same.
    """
    points: dict[str, Place] = {}
    tips: dict[str, tuple[str, str]] = {}
    for disk, tip in tree.active_branch.tips.items():
        layer = tree.layers[tip.layer]
        below = tree.layers[layer.parent] if layer.parent is not None else None
        if below is not None and below.owned:
            points[disk], tips[disk] = Place(below.path, below.format), _tips(tree, [disk])[disk]
        else:
            points[disk], tips[disk] = Place(*_nothing(layer.path)), _nothing(layer.path)
    grown = family.children(name)
    overlays = {disk: _nothing(place.path) for disk, place in points.items()} if grown else tips
    created = min((each.created for each in tree.named if each.created), default=1.0)
    return Wanted(
        name,
        PLACEHOLDER,
        None,
        created,
        WHY_PLACEHOLDER,
        points,
        overlays,
        tips if grown else {},
        current=True,
        guarded=frozenset(points),
        active=tree.active,
    )


def _wanted(tree: Tree, named: Snapshot | Branch, family: _Family) -> Wanted:
    points = {
        disk: Place(tree.layers[point.layer].path, tree.layers[point.layer].format, point.internal)
        for disk, point in _points(named).items()
    }
    external = {disk: _points(named)[disk] for disk, place in points.items() if place.tag is None}
    current, children, grown = named.name == family.current, family.children(named.name), family.grown(named.name)
    alone = grown if children == 1 and not current else frozenset()
    overlays = {disk: _overlay(tree, point.layer, alone) for disk, point in external.items()}
    reverts: dict[str, tuple[str, str]] = {}
    if current:
        tips = _tips(tree, external)
        if children:
            reverts = tips
        else:
            overlays = tips
    is_snapshot = isinstance(named, Snapshot)
    # With a record goes the file with its memory.
    lent = named.memory is not None and any(each is not named and each.memory == named.memory for each in tree.named)
    return Wanted(
        name=named.name,
        kind=SNAPSHOT if is_snapshot else BRANCH,
        parent=family.parents[named.name],
        created=named.created,
        description=named.description if isinstance(named, Snapshot) else WHY_BRANCH,
        points=points,
        overlays=overlays,
        reverts=reverts,
        current=current,
        active=tree.active if current else None,
        consistency=named.consistency if isinstance(named, Snapshot) else "off",
        memory=tree.memories[named.memory].path if named.memory is not None else None,
        firmware=named.firmware,
        guarded=frozenset(
            disk
            for disk, point in external.items()
            if lent or not _may_go(tree, named.name, point.layer, family, grown)
        ),
    )


def _may_go(tree: Tree, name: str, layer: LayerId, family: _Family, grown: frozenset[str]) -> bool:
    """Whether virsh may delete a record: with the file at its point, or by merging into that what stands on it.

    :param grown: all that grew from the record.
    """
    above = tree.children.get(layer, ())
    if not grown and name != family.current:
        return _is_alone(tree, layer, name)
    if len(above) > 1 or not set(tree.names_on.get(Point(layer), ())) <= {name}:
        return False
    if not grown <= {*family.line, tree.active}:
        # libvirt 11.3 looks at the chain of what grew from it beside the active line, and crashes unless that is short.
        return False
    return not above or (not tree.internals.get(above[0]) and _needed_by(tree, above[0]) <= grown | {tree.active})


def _is_alone(tree: Tree, layer: LayerId, name: str) -> bool:
    """Whether nothing but the name needs the file: no layer stands on it, and no internal snapshot is in it."""
    names = {each for point, found in tree.names_on.items() if point.layer == layer for each in found}
    return names <= {name} and not tree.children.get(layer)


def _tips(tree: Tree, disks: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The active tips of these disks; of one that the machine has no more, or that others need, no file."""
    found: dict[str, tuple[str, str]] = {}
    for disk in disks:
        tip = tree.active_branch.tips.get(disk)
        if tip is not None and not _is_alone(tree, tip.layer, tree.active):
            found[disk] = _nothing(tree.layers[tip.layer].path)
        elif tip is not None:
            layer = tree.layers[tip.layer]
            found[disk] = (layer.path, layer.format)
        else:
            found[disk] = _nothing(f"{tree.roots[disk][0]}" if disk in tree.roots else f"/{disk}")
    return found


def _overlay(tree: Tree, layer: LayerId, grown: frozenset[str]) -> tuple[str, str]:
    """The layer that virsh may merge into the point, and that it may unlink once that is the tip.

    :param grown: what grew from the record, in one line at first; nothing else may need that layer.
    """
    above = tree.children.get(layer, ())
    active = {each.id for tip in tree.active_branch.tips.values() for each in tree.chain(tip.layer)}
    if len(above) != 1 or above[0] not in active or tree.internals.get(above[0]):
        return _nothing(tree.layers[layer].path)
    if not _needed_by(tree, above[0]) <= grown:
        return _nothing(tree.layers[layer].path)
    return tree.layers[above[0]].path, tree.layers[above[0]].format


def _needed_by(tree: Tree, layer: LayerId) -> set[str]:
    """The names that need the layer, or what stands on it."""
    found: set[str] = set()
    waiting = [layer]
    while waiting:
        number = waiting.pop()
        waiting += tree.children.get(number, ())
        found.update(tree.names_on.get(Point(number), ()))
        for tag in tree.internals.get(number, ()):
            found.update(tree.names_on.get(Point(number, tag), ()))
    return found


def _nothing(path: str) -> tuple[str, str]:
    """The name of a file that there is not."""
    return f"{path}.gone", "qcow2"
