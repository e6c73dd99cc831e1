"""Taking machines and disks into snaptree's care, and letting them go."""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Collection, Iterable, Iterator

from msgspec import Struct
from msgspec.structs import replace

from snaptree.errors import ExistsError, NotFoundError, RefusedError, UnhealthyError
from snaptree.model.branch import Branch
from snaptree.model.delta import diff
from snaptree.model.invariants import violations
from snaptree.model.layer import Layer, LayerId, Point
from snaptree.model.machine import MachineConfig
from snaptree.model.names import check_name, check_target
from snaptree.model.snapshot import Snapshot
from snaptree.model.survey import LayerFacts, Survey
from snaptree.model.tree import MAX_CHAIN, Tree
from snaptree.planning.clearing import removal
from snaptree.planning.draft import Draft, is_tip, paths_of
from snaptree.planning.plan import Plan
from snaptree.planning.settle import settle
from snaptree.planning.steps import Forget, Record, Register, RemoveFirmware, Step, Unlink


class FoundDisk(Struct, frozen=True):
    """A disk as it was found: its chain, top first, and with ``--adopt`` the chains of overlays found beside it.

    The facts' ``backing`` are canonical paths.
    """

    target: str
    chain: tuple[LayerFacts, ...]
    siblings: tuple[tuple[LayerFacts, ...], ...] = ()

    def every(self) -> Iterator[LayerFacts]:
        """All that was found of it."""
        return itertools.chain(self.chain, *self.siblings)


class AddRequest(Struct, frozen=True):
    """``snaptree add NAME --disk …``. ``tree`` has what ``--from-xml`` read, if anything."""

    config: MachineConfig
    disks: tuple[FoundDisk, ...]
    adopt: bool = False
    records: tuple[FoundSnapshot, ...] = ()


class FoundSnapshot(Struct, frozen=True):
    """A snapshot that libvirt's XML describes: its points are ``(disk, path of the layer, internal tag or None)``.

    ``memory`` says that RAM and devices were saved with it.
    """

    name: str
    parent: str | None
    created: float
    description: str
    points: tuple[tuple[str, str, str | None], ...]
    memory: bool = False


class AttachRequest(Struct, frozen=True):
    """``snaptree disk attach NAME vdb=PATH``."""

    disk: FoundDisk
    adopt: bool = False


class DetachRequest(Struct, frozen=True):
    """``snaptree disk detach NAME vdb``; ``delete_files`` unlinks what then nothing needs."""

    target: str
    delete_files: bool = False


def empty(name: str) -> Tree:
    """The tree of a machine without disks: one branch, ``main``."""
    return Tree(name, "main", branches={"main": Branch("main", None, {}, 0.0)})


def add(survey: Survey, request: AddRequest) -> Plan:
    """Plan to look after a machine with the disks that were found.

    Internal snapshots that the images have become snapshots of the tree, one for all disks that have the same tag.

    :raise UnhealthyError: a chain is not sound.
    """
    check_name(request.config.name, "machine")
    start = replace(empty(request.config.name), branches={"main": Branch("main", None, {}, survey.now)})
    tree, notes = start, []
    if not request.disks:
        raise NotFoundError("a machine needs at least one disk", "name it with --disk vda=PATH")
    for disk in request.disks:
        tree, said = _with_disk(tree, disk, adopt=request.adopt, survey=survey)
        notes += said
    tree = _with_records(tree, request, notes) if request.records else tree
    tree = _with_internals(tree, request.disks, notes)
    wrong = violations(tree)
    if wrong:
        raise UnhealthyError(
            f"what was found is no sound tree: {wrong[0]}", "mend the chain or the snapshots' XML first"
        )
    steps: tuple[Step, ...] = (
        Register(request.config),
        Record(diff(empty(request.config.name), tree), _frozen(tree), f"machine {request.config.name} is known"),
    )
    return Plan(
        operation="add",
        summary=f"look after machine {request.config.name!r}",
        steps=steps,
        point_of_no_return=0,
        after=tree,
        paths_after=paths_of(tree),
        notes=tuple(notes),
        touches=tuple(sorted(layer.path for layer in tree.layers.values() if layer.owned)),
    )


def attach(tree: Tree, survey: Survey, request: AttachRequest) -> Plan:
    """Plan to look after one more disk, on the active branch.

    :raise ExistsError: the machine has a disk of that name, now or in a snapshot.
    """
    target = request.disk.target
    if target in tree.disks:
        raise ExistsError(
            f"machine {tree.machine} has a disk {target!r} already", "choose another target, or detach it first"
        )
    if any(layer.disk == target for layer in tree.layers.values()):
        raise ExistsError(
            f"snapshots or branches of machine {tree.machine} have a disk {target!r} of before",
            "choose another target, or delete those first",
        )
    draft = Draft(tree, survey)
    draft.tree, notes = _with_disk(tree, request.disk, adopt=request.adopt, survey=survey)
    draft.notes += notes
    return draft.conclude("attach", f"look after disk {target!r}", f"disk {target!r} is known")


def free_name(tree: Tree, wanted: str) -> str:
    """The name, or one like it that nothing has."""
    name, number = wanted, 2
    while tree.has_name(name):
        name, number = f"{wanted}-{number}", number + 1
    return name


def detach(tree: Tree, survey: Survey, request: DetachRequest) -> Plan:
    """Plan to let a disk of the active branch go. Snapshots and parked branches keep what they have of it.

    The files stay where they are unless ``delete_files``; what a snapshot or another branch needs stays in any case.
    """
    target = request.target
    if target not in tree.disks:
        raise NotFoundError(f"machine {tree.machine} has no disk {target!r}", f"its disks: {', '.join(tree.disks)}")
    if len(tree.disks) == 1:
        raise RefusedError(
            f"{target!r} is the only disk of machine {tree.machine}", f"use 'snaptree remove {tree.machine}' instead"
        )
    draft = Draft(tree, survey)
    active = tree.active_branch
    draft.tree = tree.with_branches(
        replace(active, tips={disk: tip for disk, tip in active.tips.items() if disk != target})
    )
    after = settle(draft.tree, draft.outsiders)
    gone = [layer for layer in tree.layers.values() if layer.owned and layer.id not in after.layers]
    others = any(layer.disk == target and layer.owned for layer in after.layers.values())
    files, plugged = (survey.live.files, survey.live.disks) if survey.live is not None else ((), ())
    if request.delete_files:
        _require_none_of(survey, gone, files, "is to be removed")
    elif others:
        # What its tip stands on is kept by the tip's name only while nothing more is written to it.
        tip = tree.layers[active.tips[target].layer]
        _require_none_of(survey, [tip], plugged, "stands on what snapshots or branches have")
    if not request.delete_files and others:
        # Snapshots or branches go on with layers of this disk: only a name keeps from them what its tip stands on.
        name = free_name(tree, f"{active.name}-{target}")
        kept = Branch(name, active.parent, {target: active.tips[target]}, survey.now)
        draft.tree = draft.tree.with_branches(kept)
        path = tree.layers[active.tips[target].layer].path
        draft.notes.append(f"{path} stays as the branch {name!r}, for there are snapshots or branches with {target}")
    elif not request.delete_files:
        draft.spared = {layer.id for layer in gone}
        draft.notes += [f"{layer.path} stays where it is" for layer in gone]
    return draft.conclude("detach", f"let disk {target!r} go", f"disk {target!r} is gone")


def _require_none_of(survey: Survey, layers: Iterable[Layer], files: Collection[tuple[int, int]], why: str) -> None:
    """Refuse to remove, or to take for parked, what a running machine has among these files of its own.

    :raise RefusedError: it has one of the layers.
    """
    for layer in layers:
        looks = survey.layers[layer.id].identity
        if looks is not None and (looks.device, looks.inode) in files:
            hint = "unplug the disk first (device_del, blockdev-del), or stop the machine"
            raise RefusedError(f"the running machine has {layer.path} open, which {why}", hint)


def remove(tree: Tree, survey: Survey, *, delete_files: bool) -> Plan:
    """Plan to forget a machine; with ``delete_files`` all its owned files go as well.

    Files that something outside stands on stay, and so does all beneath them.
    """
    steps: list[Step] = []
    notes: list[str] = []
    freed = 0
    held = {each.id for outsider in survey.outsiders for each in tree.chain(outsider.layer)}
    owned = [layer for layer in tree.layers.values() if layer.owned]
    depth = {layer.id: sum(1 for _ in tree.chain(layer.id)) for layer in owned}
    for layer in sorted(owned, key=lambda each: -depth[each.id]) if delete_files else ():
        facts = survey.layers.get(layer.id)
        if layer.id in held:
            notes.append(f"{layer.path} stays: something outside stands on it")
        elif facts is not None and facts.block_device:
            notes.append(f"{layer.path} stays: it is a block device")
        elif facts is not None and facts.identity is not None:
            steps.append(Unlink(layer.path, facts.identity.generation, facts.identity.inode, facts.allocated))
            freed += facts.allocated
    for memory in tree.memories.values() if delete_files else ():
        steps.append(removal(memory))
        freed += memory.size
    for piece in sorted({piece for each in tree.named for piece in each.firmware}, key=lambda each: each.path):
        steps.append(RemoveFirmware(piece.role, piece.path))
    return Plan(
        operation="remove",
        summary=f"forget machine {tree.machine!r}" + (" and remove its files" if delete_files else ""),
        steps=(Forget(tree.machine), *steps),
        point_of_no_return=0,
        after=tree,
        frees_bytes=freed,
        notes=tuple(notes),
        touches=tuple(sorted(layer.path for layer in owned)),
    )


# ---- building a tree from what was found ----------------------------------------------------------------------------


def _frozen(tree: Tree) -> tuple[LayerId, ...]:
    return tuple(layer.id for layer in tree.layers.values() if layer.owned and not is_tip(tree, layer.id))


def _with_disk(tree: Tree, disk: FoundDisk, *, adopt: bool, survey: Survey) -> tuple[Tree, list[str]]:
    check_target(disk.target)
    if disk.target in tree.roots:
        raise ExistsError(f"disk {disk.target!r} is given twice", "give each disk a target of its own")
    top = disk.chain[0]
    if top.path in {layer.path for layer in tree.layers.values() if layer.owned}:
        raise ExistsError(f"{top.path} is given for two disks", "give each disk a file of its own")
    tree, tip = _with_chain(tree, disk.target, disk.chain, adopt=adopt)
    notes = [f"{facts.path} is foreign: it is read and never written to" for facts in disk.chain[1:] if not adopt]
    if any(facts.encrypted and facts.luks not in survey.keys for facts in disk.every()):
        notes.append(
            f"{disk.target} is encrypted: to merge its layers, or start the machine, takes its key (--key FILE)"
        )
    active = tree.active_branch
    tree = tree.with_branches(replace(active, tips={**active.tips, disk.target: Point(tip)}))
    if adopt:
        tree, said = _with_siblings(tree, disk, survey.now)
        notes += said
    root = tree.owned_root(tip)
    assert root is not None
    return replace(tree, roots={**tree.roots, disk.target: (root.path, root.format)}), notes


def _with_chain(tree: Tree, target: str, chain: Iterable[LayerFacts], *, adopt: bool) -> tuple[Tree, LayerId]:
    """The tree with the layers of the chain (top first) that it does not have yet, and the id of the topmost."""
    links = list(chain)
    if len(links) > MAX_CHAIN:
        raise RefusedError(
            f"the chain under {links[0].path} has {len(links)} layers", f"at most {MAX_CHAIN} are handled"
        )
    below: LayerId | None = None
    for number, facts in reversed(list(enumerate(links))):
        if facts.problem:
            raise UnhealthyError(facts.detail or f"{facts.path}: {facts.problem}", "repair the image first")
        known = [layer for layer in tree.layer_at(facts.path) if layer.disk == target]
        if known:
            below = known[0].id
            continue
        layer = Layer(
            id=tree.next_layer_id(),
            disk=target,
            path=facts.path,
            format=facts.format,
            parent=below,
            owned=number == 0 or adopt,
            virtual_size=facts.virtual_size,
        )
        tree, below = tree.with_layers(layer), layer.id
    assert below is not None
    return tree, below


def _with_siblings(tree: Tree, disk: FoundDisk, now: float) -> tuple[Tree, list[str]]:
    """Overlays found beside the chain become parked branches, named after their files."""
    notes: list[str] = []
    backing = {chain[0].backing for chain in disk.siblings}
    for chain in disk.siblings:
        top = chain[0]
        if top.path in backing or tree.layer_at(top.path):
            continue
        tree, tip = _with_chain(tree, disk.target, chain, adopt=True)
        stem = posixpath.basename(top.path).rsplit(".", 1)[0].lstrip(".-") or "branch"
        name = free_name(tree, stem[:80])
        tree = tree.with_branches(Branch(name, None, {disk.target: Point(tip)}, now))
        notes.append(f"{top.path} is adopted as the tip of branch {name!r}")
    return tree, notes


def _with_records(tree: Tree, request: AddRequest, notes: list[str]) -> Tree:
    """The snapshots that records tell of. None is taken without its data: what it needs would be taken for loose."""
    names = {record.name for record in request.records}
    for record in request.records:
        check_name(record.name, "snapshot")
        if record.name in tree.snapshots:
            raise UnhealthyError(f"there are two files of the snapshot {record.name!r}", "take one out of the folder")
        points = _recorded_points(tree, request.disks, record, notes)
        if record.memory:
            notes.append(
                f"snapshot {record.name!r} has memory, which is left where it is: only its disks are looked after"
            )
        if record.parent is not None and record.parent not in names:
            notes.append(f"snapshot {record.name!r} grew from {record.parent!r}, of which there is no XML")
        tree = tree.with_snapshots(
            Snapshot(
                name=record.name,
                parent=record.parent if record.parent in names else None,
                points=points,
                created=record.created,
                description=record.description,
            )
        )
    return _with_parents(tree)


def _recorded_points(
    tree: Tree, disks: tuple[FoundDisk, ...], record: FoundSnapshot, notes: list[str]
) -> dict[str, Point]:
    """Where the recorded snapshot's disks are.

    :raise UnhealthyError: what it has of a disk that was given is not there, or it has none of them.
    """
    facts_of = {facts.path: facts for disk in disks for chain in (disk.chain, *disk.siblings) for facts in chain}
    hint = "put it back where it was, or take the snapshot's XML out of the folder"
    points: dict[str, Point] = {}
    for disk, path, internal in record.points:
        if disk not in tree.roots:
            notes.append(f"snapshot {record.name!r} has a disk {disk!r}, which was not given: it is left out")
            continue
        found = [layer for layer in tree.layer_at(path) if layer.disk == disk]
        if not found:
            raise UnhealthyError(
                f"the snapshot {record.name!r} has {disk} in {path}, which is not beneath or beside the disk", hint
            )
        if internal is not None and internal not in {each.name for each in facts_of[path].internals}:
            raise UnhealthyError(f"{path} has no internal snapshot {internal!r}", hint)
        points[disk] = Point(found[0].id, internal)
    if not points:
        raise UnhealthyError(
            f"the snapshot {record.name!r} has no disk that was given",
            "give its disks with --disk, or take its XML out of the folder",
        )
    return points


def _with_parents(tree: Tree) -> Tree:
    """Branches hang on the newest snapshot whose points are in their chains."""
    for branch in list(tree.branches.values()):
        beneath = {each.id for tip in branch.tips.values() for each in tree.chain(tip.layer)}
        nearest = [
            each
            for each in tree.snapshots.values()
            if each.points and all(point.layer in beneath for point in each.points.values())
        ]
        if nearest:
            newest = max(nearest, key=lambda each: (each.created, each.name))
            tree = tree.with_branches(replace(branch, parent=newest.name))
    return tree


def _with_internals(tree: Tree, disks: tuple[FoundDisk, ...], notes: list[str]) -> Tree:
    """Internal snapshots in owned layers become snapshots; the same tag on several disks is one snapshot."""
    facts_of = {facts.path: facts for disk in disks for chain in (disk.chain, *disk.siblings) for facts in chain}
    taken = {point for point in tree.names_on if point.internal is not None}
    found: dict[str, tuple[float, dict[str, Point]]] = {}
    for layer in tree.layers.values():
        facts = facts_of.get(layer.path)
        if facts is None or not layer.owned:
            continue
        names = [each.name for each in facts.internals]
        numbers = {each.id for each in facts.internals}
        for each in facts.internals:
            if Point(layer.id, each.name) in taken:
                continue
            if names.count(each.name) > 1 or not each.name or (each.name in numbers and each.name != each.id):
                notes.append(f"the internal snapshot {each.name!r} in {layer.path} is ambiguous: it is left alone")
                continue
            created, points = found.setdefault(each.name, (each.created, {}))
            if layer.disk in points:
                notes.append(f"the internal snapshot {each.name!r} is in two layers of {layer.disk}: one is left alone")
                continue
            points[layer.disk] = Point(layer.id, each.name)
            found[each.name] = (min(created, each.created), points)
    parent: str | None = None
    for tag, (created, points) in sorted(found.items(), key=lambda item: (item[1][0], item[0])):
        try:
            name = check_name(tag, "snapshot")
        except Exception:
            notes.append(f"the internal snapshot {tag!r} has a name that a snapshot cannot have: it is left alone")
            continue
        name = free_name(tree, name)
        tree = tree.with_snapshots(Snapshot(name, parent, points, created))
        parent = name
    return _with_parents(tree) if found else tree
