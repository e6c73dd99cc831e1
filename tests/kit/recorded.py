"""What libvirt has of a domain when snaptree has written its records, as values; and what virsh does by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from snaptree.model.domain import EXTERNAL, INTERNAL, Domain, DomainDisk, Hints, Mark, Record, RecordDisk
from snaptree.model.layer import LayerId, Point
from snaptree.model.survey import LayerFacts
from snaptree.model.tree import Tree
from snaptree.planning.naming import renamed_roots
from snaptree.planning.records import Wanted, wanted_records


@dataclass(frozen=True)
class Recorded:
    """A domain, its records, and the headers of its images."""

    domain: Domain
    records: tuple[Record, ...]
    current: str | None
    facts: dict[str, LayerFacts]


def recorded(tree: Tree) -> Recorded:
    """What there is when the tree has been written."""
    owned = [layer for layer in tree.layers.values() if layer.owned]
    hints = Hints(
        tree.active,
        tree.active_branch.parent,
        tree.active_branch.created,
        dict(tree.roots),
        {disk: root.path for disk, root in renamed_roots(tree).items()},
        frozenset(layer.path for layer in owned),
        frozenset(layer.path for layer in owned if layer.made),
    )
    disks = tuple(
        DomainDisk(disk, tree.layers[tip.layer].path, tree.layers[tip.layer].format)
        for disk, tip in sorted(tree.active_branch.tips.items())
    )
    wanted = wanted_records(tree)
    facts = {
        layer.path: LayerFacts(
            path=layer.path,
            format=layer.format,
            virtual_size=layer.virtual_size,
            backing=tree.layers[layer.parent].path if layer.parent is not None else None,
        )
        for layer in tree.layers.values()
    }
    return Recorded(
        Domain(tree.machine, "uuid", "uri", "off", disks=disks, hints=hints),
        tuple(map(_record, wanted)),
        next((each.name for each in wanted if each.current), None),
        facts,
    )


def _record(wanted: Wanted) -> Record:
    disks = {
        disk: RecordDisk(INTERNAL)
        if place.tag is not None
        else RecordDisk(EXTERNAL, *wanted.overlays[disk], deleting=disk in wanted.guarded)
        for disk, place in wanted.points.items()
    }
    tags = {disk: place.tag for disk, place in wanted.points.items() if place.tag and place.tag != wanted.name}
    return Record(
        name=wanted.name,
        parent=wanted.parent,
        created=float(int(wanted.created)),
        description=wanted.description,
        state="shutoff",
        disks=disks,
        points={disk: (place.path, place.format) for disk, place in wanted.points.items()},
        reverts={disk: RecordDisk(EXTERNAL, *file) for disk, file in wanted.reverts.items()},
        mark=Mark(
            wanted.kind, wanted.created, wanted.consistency, wanted.firmware, tags, wanted.guarded, wanted.active
        ),
    )


# ---- virsh, by libvirt's source (11.3, qemu_snapshot.c) -------------------------------------------------------------


def unlinked_by_going_back(records: Sequence[Wanted]) -> Iterator[str]:
    """The files that going back to any other snapshot unlinks: the overlays of the current one."""
    for each in records:
        if each.current:
            yield from (path for path, _ in (each.reverts or each.overlays).values())


@dataclass(frozen=True)
class Deletion:
    """What virsh does to files when it deletes a record that it does not refuse to delete."""

    name: str
    unlinked: tuple[str, ...] = ()
    committed: tuple[tuple[str, str], ...] = ()
    """``(overlay, what it goes down into)``; the overlay is unlinked then."""
    later: tuple[str, ...] = ()
    """What going back unlinks when the parent has become current."""


def deletions(tree: Tree, records: Sequence[Wanted]) -> Iterator[Deletion]:
    """All that virsh does not refuse."""
    children: dict[str | None, list[Wanted]] = {}
    for each in records:
        children.setdefault(each.parent, []).append(each)
    by_name = {each.name: each for each in records}
    current = next((each for each in records if each.current), None)
    above: set[str] = set()
    at = current
    while at is not None:
        above.add(at.name)
        at = by_name.get(at.parent or "")
    lines = {disk: [layer.path for layer in tree.chain(tip.layer)] for disk, tip in tree.active_branch.tips.items()}
    for each in records:
        external = {disk: place.path for disk, place in each.points.items() if place.tag is None}
        grown = children.get(each.name, [])
        if (
            each.guarded
            or not external
            or (each.current and grown)
            or len(grown) > 1
            or (grown and each.name not in above)
        ):
            continue
        if not grown and not each.current:
            yield Deletion(each.name, unlinked=tuple(external.values()))
            continue
        pairs: list[tuple[str, str]] = []
        for disk, point in external.items():
            line = lines.get(disk, [])
            at_point = line.index(point) if point in line else 0
            if not at_point:
                break
            # Whatever the record names: what stands on the point in the active line is what goes down.
            pairs.append((line[at_point - 1], point))
        else:
            parent = by_name.get(each.parent or "") if each.current else None
            files = (parent.reverts or parent.overlays).values() if parent is not None else ()
            yield Deletion(each.name, committed=tuple(pairs), later=tuple(path for path, _ in files))


def needed_by(tree: Tree, path: str) -> set[str]:
    """The names that need the file at the path as it is, or anything that stands on it."""
    found: set[str] = set()
    waiting: list[LayerId] = [layer.id for layer in tree.layer_at(path)]
    while waiting:
        number = waiting.pop()
        waiting += tree.children.get(number, ())
        for point in (Point(number), *(Point(number, tag) for tag in tree.internals.get(number, ()))):
            found |= set(tree.names_on.get(point, ()))
    return found
