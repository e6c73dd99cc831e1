"""Taking snapshots and growing branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct, field
from msgspec.structs import replace

from snaptree.errors import ExistsError, NotFoundError, RefusedError, UsageError
from snaptree.model.branch import Branch
from snaptree.model.layer import Point
from snaptree.model.live import RUNNING
from snaptree.model.memory import Memory
from snaptree.model.names import check_name
from snaptree.model.snapshot import Snapshot
from snaptree.model.survey import LayerFacts, Survey
from snaptree.model.tree import Tree
from snaptree.planning import firmware, remembering
from snaptree.planning.draft import Draft
from snaptree.planning.live_steps import Cut, LiveSnapshot, Mark
from snaptree.planning.plan import Plan
from snaptree.planning.sealing import require_keys
from snaptree.planning.steps import MakeInternal

CUT_SECONDS = 0.01
"""So long a guest's disks wait while it goes on in new overlays; measured with QEMU 10.0.2 and two disks."""

MARK_SECONDS, MARK_SPEED = 0.01, 100e9
"""So long they wait while an internal snapshot is taken, and how many bytes of the image it counts in a second."""

QUIESCE_SECONDS = 0.1
"""So long a guest's file systems stand still when little is left to be written; measured with an emulated guest."""


class SnapshotRequest(Struct, frozen=True):
    """``snaptree snapshot NAME SNAP``; ``files`` are paths that the user chose for the new tips, by disk.

    ``quiesce`` has the guest's agent freeze the guest's file systems meanwhile.
    """

    name: str
    internal: bool = False
    exclude: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    memory: bool = False
    memory_file: str | None = None
    quiesce: bool = False


class BranchRequest(Struct, frozen=True):
    """``snaptree branch NAME BRANCH``: grow a line of work from a snapshot, or (``source`` is ``None``) from here."""

    name: str
    source: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)


def require_free_name(tree: Tree, name: str, what: str) -> None:
    """Refuse a name that is bad or that a snapshot or a branch has already.

    :raise UsageError: the name is not one that they may have.
    :raise ExistsError: it is taken.
    """
    check_name(name, what)
    if name in tree.snapshots:
        raise ExistsError(f"machine {tree.machine} has a snapshot {name!r} already", "choose another name")
    if name in tree.branches:
        raise ExistsError(f"machine {tree.machine} has a branch {name!r} already", "choose another name")


def require_disks(tree: Tree, disks: tuple[str, ...] | Mapping[str, str]) -> None:
    """Refuse disks that the machine does not have.

    :raise NotFoundError: names the disk and those that there are.
    """
    for disk in disks:
        if disk not in tree.disks:
            raise NotFoundError(
                f"machine {tree.machine} has no disk {disk!r}",
                f"its disks: {', '.join(tree.disks) or 'none'}",
            )


def require_plain(facts: LayerFacts, purpose: str) -> None:
    """Refuse internal snapshots where QEMU cannot go back to them.

    :raise RefusedError: the image has persistent bitmaps, or cannot count to two.
    """
    if facts.refcount_bits < 2:
        raise RefusedError(
            f"cannot {purpose}: it has reference counts of one bit, and an internal snapshot shares clusters",
            "take an external snapshot (without --internal)",
        )
    if facts.bitmaps:
        raise RefusedError(
            f"cannot {purpose}: it has persistent bitmaps ({', '.join(facts.bitmaps)}), with which QEMU cannot go back",
            "take an external snapshot (without --internal), or remove them with 'qemu-img bitmap --remove'",
        )


def snapshot(tree: Tree, survey: Survey, request: SnapshotRequest) -> Plan:
    """Plan a snapshot of the active branch as it is now.

    An external point freezes the tip under a new empty overlay, which becomes the tip. When nothing has been written
    since the previous snapshot, the two share a point and no overlay is stacked. With ``internal``, disks that can hold
    internal snapshots get one within their tip; the others get an external point. Of a machine that runs they are
    all of one instant.
    """
    require_free_name(tree, request.name, "snapshot")
    require_disks(tree, request.exclude)
    require_disks(tree, request.files)
    both = sorted(set(request.exclude) & set(request.files))
    if both:
        raise UsageError(f"{both[0]} is both excluded and given a file", "give one of --exclude and --file")
    within = request.internal and survey.libvirt and survey.live is not None
    if request.memory or request.memory_file is not None:
        remembering.require_saveable(tree, survey, request)
    if within:
        remembering.require_within(tree, survey, request)
    draft = Draft(tree, survey, request.files)
    branch = tree.active_branch
    points: dict[str, Point] = {}
    marks: list[Mark] = []
    tips = dict(branch.tips)
    for disk in tree.disks:
        if disk in request.exclude:
            continue
        tip = branch.tips[disk].layer
        layer = tree.layers[tip]
        draft.require_whole(tip, f"take a snapshot of {disk}")
        if request.internal and layer.format == "qcow2":
            require_keys(draft, (layer,), f"take an internal snapshot in {layer.path}", running=True)
            require_plain(draft.facts(tip), f"take an internal snapshot in {layer.path}")
            tag = draft.new_tag(tip, request.name)
            if survey.live is None:
                draft.prepare.append(MakeInternal(layer.path, tag))
            marks.append(Mark(disk, layer.path, tag))
            draft.touches.add(layer.path)
            points[disk] = Point(tip, tag)
            continue
        if request.internal:
            draft.notes.append(
                f"{disk} is {layer.format}, which cannot hold internal snapshots: it gets an external point"
            )
        parent = layer.parent
        if not survey.libvirt and parent is not None and tree.layers[parent].owned and draft.unwritten(tip):
            points[disk] = Point(parent)
            if draft.chosen.pop(disk, None):
                draft.notes.append(f"nothing was written to {disk} since the last snapshot: no new file was needed")
            continue
        points[disk] = Point(tip)
        tips[disk] = Point(draft.stack(tip, request.name, f"take a snapshot of {disk}").id)
    if request.quiesce:
        _require_quiescible(draft, request)
    if not points:
        raise UsageError("every disk is excluded: there is nothing to take a snapshot of", "exclude fewer disks")
    # The copies are there before the guest goes on in its overlays: afterwards nothing may fail.
    copies = firmware.keep(draft)
    saved: Memory | None = None
    if survey.live is not None:
        cuts = _cuts(draft, points, tips)
        if request.memory and not within:
            saved = remembering.save(draft, cuts, tuple(marks), request.name, request.memory_file)
        else:
            agent = survey.agent if request.quiesce else None
            draft.prepare.append(LiveSnapshot(cuts, request.quiesce, agent, tuple(marks), firmware.kept(draft)))
            draft.pause = QUIESCE_SECONDS if request.quiesce else CUT_SECONDS
        draft.pause += _marking(draft, marks)
        if within:
            remembering.save_within(draft, marks, request.name)
    taken = Snapshot(
        name=request.name,
        parent=branch.parent,
        points=points,
        created=survey.now,
        description=request.description,
        consistency=_consistency(survey, request),
        memory=saved.id if saved is not None else None,
        firmware=copies,
    )
    without = draft.tree.with_branches(replace(branch, tips=tips))
    draft.tree = draft.tree.with_snapshots(taken).with_branches(replace(branch, parent=request.name, tips=tips))
    plan = draft.conclude("snapshot", f"take snapshot {request.name!r}", f"snapshot {request.name!r} is there")
    return remembering.or_else(plan, draft, without) if saved is not None else plan


def _require_quiescible(draft: Draft, request: SnapshotRequest) -> None:
    """See that the guest's agent can be asked.

    :raise UsageError: with memory there is nothing to quiesce.
    :raise RefusedError: the guest stands still.
    """
    live = draft.survey.live
    if live is None:
        draft.notes.append("the machine is off: there is nothing to quiesce")
    elif request.memory:
        hint = "leave out --quiesce: memory and disks are of one instant"
        raise UsageError("--quiesce is for snapshots without memory", hint)
    elif live.state != RUNNING:
        hint = "let it run first, or leave out --quiesce"
        raise RefusedError(f"machine {draft.tree.machine} is {live.state}: its guest's agent cannot answer", hint)


def _consistency(survey: Survey, request: SnapshotRequest) -> str:
    """What the disks are at the snapshot's instant."""
    if survey.live is None:
        return "off"
    if request.memory or (request.internal and survey.libvirt):
        return "memory"
    return "quiesced" if request.quiesce else "crash"


def _cuts(draft: Draft, points: Mapping[str, Point], tips: Mapping[str, Point]) -> tuple[Cut, ...]:
    """How the running guest goes on in its new tips, on all disks at one instant."""
    layers = draft.tree.layers
    return tuple(
        Cut(disk, layers[points[disk].layer].path, layers[tips[disk].layer].path)
        for disk in sorted(points)
        if points[disk].internal is None
    )


def _marking(draft: Draft, marks: Sequence[Mark]) -> float:
    """So long a guest's disks wait while internal snapshots are taken, which count every cluster once more."""
    layers = {layer.path: layer.id for layer in draft.tree.layers.values()}
    return sum(MARK_SECONDS + draft.facts(layers[each.path]).allocated / MARK_SPEED for each in marks)


def branch(tree: Tree, survey: Survey, request: BranchRequest) -> Plan:
    """Plan a new parked branch with tips of its own, grown from a snapshot or from what the machine shows now.

    Disks that the snapshot does not have fork where they stand: what a guest writes to is frozen under two new
    overlays, without a name, on all of them at one instant.
    """
    require_free_name(tree, request.name, "branch")
    if request.source is not None and request.source not in tree.snapshots:
        if request.source in tree.branches:
            raise RefusedError(
                f"{request.source!r} is a branch: branches grow from snapshots, or from here",
                f"switch to {request.source!r} and grow the branch from there",
            )
        raise NotFoundError(
            f"machine {tree.machine} has no snapshot {request.source!r}",
            f"see 'snaptree tree {tree.machine}'",
        )
    draft = Draft(tree, survey, request.files)
    active = tree.active_branch
    tips: dict[str, Point] = {}
    mine = dict(active.tips)
    points = tree.snapshots[request.source].points if request.source is not None else {}
    cuts = survey.live is not None and not survey.libvirt
    for disk in sorted({*tree.disks, *points}):
        point = points.get(disk)
        if point is None:
            mine[disk], tips[disk] = draft.fork(disk, active.name, request.name, cuts=cuts)
        elif point.internal is None:
            tips[disk] = Point(draft.stack(point.layer, request.name, f"grow branch {request.name!r}").id)
        else:
            tips[disk] = Point(draft.build(point, request.name, f"grow branch {request.name!r}").id)
    source = tree.snapshots[request.source] if request.source is not None else None
    # Copies are never written to, so that a branch can share those of the snapshot that it grows from.
    copies = source.firmware if source is not None else firmware.keep(draft)
    forked = {disk: tip for disk, tip in active.tips.items() if disk in tree.disks and disk not in points}
    if cuts and forked:
        draft.prepare.append(LiveSnapshot(_cuts(draft, forked, mine), firmware=firmware.kept(draft)))
        draft.pause = CUT_SECONDS
        draft.notes.append(f"branch {request.name!r} has what is on the disks at that instant, as after a power cut")
    grown = Branch(
        name=request.name,
        parent=source.name if source is not None else active.parent,
        tips=tips,
        created=survey.now,
        memory=source.memory if source is not None else None,
        firmware=copies,
    )
    draft.tree = draft.tree.with_branches(grown, replace(active, tips=mine))
    where = f"from snapshot {request.source!r}" if request.source is not None else "from here"
    return draft.conclude("branch", f"grow branch {request.name!r} {where}", f"branch {request.name!r} is there")


def rename(tree: Tree, survey: Survey, old: str, new: str) -> Plan:
    """Plan another name for a snapshot or a branch.

    :raise NotFoundError: nothing has the old name.
    """
    if not tree.has_name(old):
        raise NotFoundError(
            f"machine {tree.machine} has no snapshot or branch {old!r}", f"see 'snaptree tree {tree.machine}'"
        )
    require_free_name(tree, new, "snapshot" if old in tree.snapshots else "branch")
    draft = Draft(tree, survey)
    if old in tree.snapshots:
        children = [replace(each, parent=new) for each in tree.snapshots.values() if each.parent == old]
        lines = [replace(each, parent=new) for each in tree.branches.values() if each.parent == old]
        moved = tree.without_snapshots(old).with_snapshots(*children, replace(tree.snapshots[old], name=new))
        draft.tree = moved.with_branches(*lines)
        for point in tree.snapshots[old].points.values():
            if point.internal is not None:
                path = tree.layers[point.layer].path
                draft.notes.append(
                    f"{path} goes on calling it {point.internal!r}: qemu-img and virsh ask for that name"
                )
    else:
        line = replace(tree.branches[old], name=new)
        draft.tree = tree.without_branches(old).with_branches(line)
        if tree.active == old:
            draft.tree = replace(draft.tree, active=new)
    return draft.conclude("rename", f"rename {old!r} to {new!r}", f"{old!r} is now {new!r}")
