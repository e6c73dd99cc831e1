"""The tree of a libvirt domain, out of libvirt's records, the domain's definition and the images' headers.

Where they disagree the headers win: a layer's parent is what its header names, whatever libvirt believes, and the
active branch grew from the snapshot whose points its tips stand on, wherever "current" points. What was known of the
files before (ids of layers, what frozen ones look like) is kept by their paths; without it the tree is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from snaptree.model.branch import Branch
from snaptree.model.domain import BRANCH, EXTERNAL, INTERNAL, PLACEHOLDER, Domain, Hints, Record
from snaptree.model.layer import Layer, LayerId, Point
from snaptree.model.memory import LIBVIRT, Memory
from snaptree.model.snapshot import Snapshot
from snaptree.model.survey import LayerFacts
from snaptree.model.tree import MAX_CHAIN, Tree
from snaptree.planning.settle import has_merged, is_frozen

_CONSISTENCY = {"shutoff": "off", "shutdown": "off", "crashed": "off"}


class FoundTree(Struct, frozen=True):
    """A tree that was found, and in sentences what there is to know of how."""

    tree: Tree
    notes: tuple[str, ...] = ()


def tree_of(
    domain: Domain,
    records: Sequence[Record],
    current: str | None,
    facts: Mapping[str, LayerFacts],
    known: Tree | None = None,
    memory_sizes: Mapping[str, int] | None = None,
) -> FoundTree:
    """The tree of a domain.

    :param facts: what was read of each image, by its canonical path; ``backing`` is canonical as well.
    :param known: the tree of before, for ids and for what frozen layers look like.
    :param memory_sizes: the sizes of the records' memory files, in bytes.
    """
    ordered = sorted(records, key=lambda each: (each.created, each.name))
    layers = _Layers(facts, known)
    tips = {disk.target: Point(layers.add(disk.target, disk.path, disk.format)) for disk in domain.disks}
    by_name = {record.name: record for record in ordered}
    standing = {each.name for each in ordered if each.mark is not None and each.mark.kind == PLACEHOLDER}
    points = {each.name: {} if each.name in standing else _points(each, layers) for each in ordered}
    notes: list[str] = []
    parked = {each.name for each in ordered if _is_parked(each, points[each.name], layers, current)}
    for each in ordered:
        if each.mark is not None and each.mark.kind == BRANCH and each.name not in parked:
            notes.append(f"something stands on what was parked as {each.name!r}: it is taken for a snapshot")
    aside = parked | standing

    def grown_from(name: str | None) -> str | None:
        passed: set[str] = set()
        while name is not None and name in aside and name not in passed:
            passed.add(name)
            name = by_name[name].parent
        return name if name in by_name and name not in aside else None

    memories = _memories(ordered, known, memory_sizes or {})
    numbers = {each.path: each.id for each in memories.values()}
    snapshots = {
        each.name: _snapshot(each, grown_from(each.parent), points[each.name], numbers)
        for each in ordered
        if each.name not in aside
    }
    branches = {
        each.name: Branch(
            each.name,
            grown_from(each.parent),
            points[each.name],
            _created(each),
            numbers.get(each.memory or ""),
            each.mark.firmware if each.mark is not None else (),
        )
        for each in ordered
        if each.name in parked
    }
    hints = _hints(domain, ordered)
    active = _free_name({*by_name}, hints.active or "main")
    branches[active] = Branch(active, None, tips, hints.created)
    tree = Tree(domain.name, active, layers.found, snapshots, branches, memories)
    tree = _with_owners(tree, ordered, hints)
    tree = replace(tree, roots=_roots(tree, hints))
    here, note = _here(tree, grown_from(current), domain.hints)
    tree = tree.with_branches(replace(tree.active_branch, parent=here))
    notes += [note] if note else []
    return FoundTree(_with_looks(tree, known, _half_merged(ordered)), tuple(notes))


class _Layers:
    """The layers that were found, by disk and path; each has the id that it had before."""

    def __init__(self, facts: Mapping[str, LayerFacts], known: Tree | None) -> None:
        self._facts = facts
        self._known = {(each.disk, each.path): each.id for each in known.layers.values()} if known is not None else {}
        self._next = known.next_layer_id() if known is not None else 1
        self._ids: dict[tuple[str, str], LayerId] = {}
        self.found: dict[LayerId, Layer] = {}

    def add(self, disk: str, path: str, image_format: str) -> LayerId:
        """The layer at the path, with all that its header says is beneath it."""
        chain: list[tuple[str, str]] = []
        at: str | None = path
        while at is not None and (disk, at) not in self._ids and len(chain) < MAX_CHAIN:
            facts = self._facts.get(at)
            chain.append((at, image_format if facts is None else facts.format))
            # A loop ends where it would repeat: the layer that closes it stands on nothing here.
            at = facts.backing if facts is not None and facts.backing not in {each for each, _ in chain} else None
        below = self._ids.get((disk, at)) if at is not None else None
        for each, form in reversed(chain):
            number = self._known.get((disk, each))
            if number is None:
                number, self._next = self._next, self._next + 1
            size = self._facts[each].virtual_size if each in self._facts else 0
            self.found[number] = Layer(number, disk, each, form, below, owned=False, virtual_size=size)
            self._ids[disk, each] = below = number
        return self._ids[disk, path]

    def stood_on(self, number: LayerId) -> bool:
        """Whether any layer stands on this one."""
        return any(each.parent == number for each in self.found.values())


def _points(record: Record, layers: _Layers) -> dict[str, Point]:
    found: dict[str, Point] = {}
    for target, (path, form) in sorted(record.points.items()):
        disk = record.disks.get(target)
        kind = disk.kind if disk is not None else ("no" if record.disks else INTERNAL)
        if kind == EXTERNAL:
            found[target] = Point(layers.add(target, path, form))
        elif kind == INTERNAL:
            tags = record.mark.tags if record.mark is not None else {}
            found[target] = Point(layers.add(target, path, form), tags.get(target, record.name))
    return found


def _is_parked(record: Record, points: Mapping[str, Point], layers: _Layers, current: str | None) -> bool:
    """Whether the record is that of a parked branch still: virsh may have gone back to it, as to a snapshot."""
    if record.mark is None or record.mark.kind != BRANCH or record.name == current or not points:
        return False
    return not any(point.internal is None and layers.stood_on(point.layer) for point in points.values())


def _snapshot(record: Record, parent: str | None, points: Mapping[str, Point], numbers: Mapping[str, int]) -> Snapshot:
    mark = record.mark
    remembers = record.memory is not None or record.inside
    guessed = "memory" if remembers else _CONSISTENCY.get(record.state, "crash")
    return Snapshot(
        name=record.name,
        parent=parent,
        points=points,
        created=_created(record),
        description=record.description,
        consistency=mark.consistency if mark is not None and mark.consistency else guessed,
        memory=numbers.get(record.memory or ""),
        firmware=mark.firmware if mark is not None else (),
    )


def _created(record: Record) -> float:
    """When it was taken; libvirt keeps whole seconds."""
    exact = record.mark.created if record.mark is not None else 0.0
    return exact if int(exact) == int(record.created) else record.created


def _memories(records: Iterable[Record], known: Tree | None, sizes: Mapping[str, int]) -> dict[int, Memory]:
    before = {each.path: each for each in known.memories.values()} if known is not None else {}
    number = max((each.id for each in before.values()), default=0)
    found: dict[int, Memory] = {}
    for record in records:
        if record.memory is None or any(each.path == record.memory for each in found.values()):
            continue
        memory = before.get(record.memory)
        if memory is None:
            number += 1
            state = "paused" if record.state == "paused" else "running"
            memory = Memory(number, record.memory, LIBVIRT, sizes.get(record.memory, 0), state=state)
        found[memory.id] = memory
    return found


def _hints(domain: Domain, records: Sequence[Record]) -> Hints:
    """What the domain's metadata says; where virsh has put it back to that of a record, what records say as well.

    The record that was current knows the active branch's name.
    """
    all_of = [domain.hints, *(each.hints for each in reversed(records))]
    first = next((each for each in all_of if each.active is not None), Hints())
    named = [each.mark.active for each in records if each.mark is not None and each.mark.active is not None]
    roots: dict[str, tuple[str, str]] = {}
    renamed: dict[str, str] = {}
    for each in reversed(all_of):
        roots.update(each.roots)
        renamed = {disk: now for disk, now in renamed.items() if disk not in each.roots} | dict(each.renamed)
    return Hints(
        named[0] if len(named) == 1 else first.active,
        first.parent,
        first.created,
        roots,
        renamed,
        frozenset().union(*(each.owned for each in all_of)),
        frozenset().union(*(each.made for each in all_of)),
    )


def _free_name(taken: set[str], wanted: str) -> str:
    name, number = wanted, 1
    while name in taken:
        name, number = f"{wanted}.{number}", number + 1
    return name


def _with_owners(tree: Tree, records: Iterable[Record], hints: Hints) -> Tree:
    """Owned is what the domain or a record names, and all that stands on it; what is only beneath is foreign."""
    named = {tree.layers[point.layer].path for point in tree.names_on} | hints.owned
    for record in records:
        named |= {each.overlay for each in (*record.disks.values(), *record.reverts.values()) if each.overlay}
    owned: dict[LayerId, bool] = {}
    for layer in tree.layers.values():
        chain = list(tree.chain(layer.id))
        for each in reversed(chain):
            if each.id not in owned:
                beneath = each.parent is not None and owned.get(each.parent, False)
                owned[each.id] = beneath or each.path in named
    return tree.with_layers(
        *(replace(each, owned=owned[each.id], made=each.path in hints.made) for each in tree.layers.values())
    )


def _roots(tree: Tree, hints: Hints) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for disk in sorted({layer.disk for layer in tree.layers.values()}):
        hint = hints.roots.get(disk)
        if hint is not None and any(each.disk == disk and each.owned for each in tree.layer_at(hint[0])):
            found[disk] = hint
            continue
        tip = tree.active_branch.tips.get(disk)
        first = tip.layer if tip is not None else min(each.id for each in tree.layers.values() if each.disk == disk)
        root = tree.owned_root(first)
        if root is not None:
            waits = hint is not None and hints.renamed.get(disk) == root.path and not tree.layer_at(hint[0])
            found[disk] = hint if hint is not None and waits else (root.path, root.format)
    return found


def _here(tree: Tree, current: str | None, noted: Hints) -> tuple[str | None, str]:
    """The snapshot that the active branch grew from, and a sentence where libvirt believes another.

    Where libvirt believes what snaptree has noted that is it. Otherwise it is one all of whose points the tips stand
    on, and of these the nearest to the tips. A disk that the machine has no more says nothing; of several in one layer
    the images do not say after which one work went on, and libvirt does.
    """
    if noted.active is not None and noted.parent == current:
        return current, ""
    depth: dict[LayerId, int] = {}
    tips = tree.active_branch.tips
    for tip in tips.values():
        depth.update((layer.id, number) for number, layer in enumerate(tree.chain(tip.layer)))
    beneath: dict[str, dict[str, float]] = {}
    for each in tree.snapshots.values():
        points = {disk: point for disk, point in each.points.items() if disk in tips}
        if points and all(point.layer in depth for point in points.values()):
            beneath[each.name] = {
                disk: depth[point.layer] + (0.5 if point.internal is not None else 0.0)
                for disk, point in points.items()
            }
    if not beneath:
        return current, ""

    def later(one: str, other: str) -> bool:
        shared = beneath[one].keys() & beneath[other].keys()
        pairs = [(beneath[one][disk], beneath[other][disk]) for disk in shared]
        return any(mine < theirs for mine, theirs in pairs) and all(mine <= theirs for mine, theirs in pairs)

    if current in beneath and not any(later(each, current) for each in beneath):
        return current, ""
    latest = [one for one in beneath if not any(later(each, one) for each in beneath)] or list(beneath)
    best = max(latest, key=lambda name: (tree.snapshots[name].created, name))
    note = f"libvirt takes {current!r} for the current snapshot, but the disks stand on {best!r}"
    return best, note if current is not None else ""


def _half_merged(records: Iterable[Record]) -> set[str]:
    """The files that libvirt was merging something into when it was stopped."""
    return {
        each.overlay
        for record in records
        for disk, each in record.disks.items()
        if each.deleting and each.overlay and (record.mark is None or disk not in record.mark.guarded)
    }


def _with_looks(tree: Tree, known: Tree | None, merging: set[str]) -> Tree:
    """The tree with what is known of frozen layers' looks, where they are still what they were known as."""
    changed: list[Layer] = []
    for layer in tree.layers.values():
        before = known.layers.get(layer.id) if known is not None else None
        kept = known is not None and before is not None and _same_place(tree, known, layer.id)
        half = layer.path in merging or (kept and before is not None and before.half_merged)
        half = half and not has_merged(tree, layer.id)
        looks = before.identity if kept and before is not None and is_frozen(tree, layer.id) else None
        if half or looks is not None:
            changed.append(replace(layer, identity=looks, half_merged=half))
    return tree.with_layers(*changed)


def _same_place(tree: Tree, known: Tree, number: LayerId) -> bool:
    """Whether a layer holds what it held: the same names need it or what is in it, and it stands on the same file."""
    now, before = tree.layers[number], known.layers[number]
    under = (tree.layers[now.parent].path if now.parent is not None else None) == (
        known.layers[before.parent].path if before.parent is not None else None
    )
    return under and _names_in(tree, number) == _names_in(known, number)


def _names_in(tree: Tree, number: LayerId) -> dict[Point, set[str]]:
    points = (Point(number), *(Point(number, tag) for tag in tree.internals.get(number, ())))
    return {point: set(tree.names_on.get(point, ())) for point in points}
