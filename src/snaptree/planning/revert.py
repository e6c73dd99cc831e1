"""Going back to a snapshot and switching between branches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from snaptree.errors import NotFoundError, RefusedError, UsageError
from snaptree.model.branch import Branch
from snaptree.model.layer import LayerId, Point
from snaptree.model.snapshot import Snapshot
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning.create import require_disks, require_free_name, require_plain
from snaptree.planning.draft import Draft, renamed_tip
from snaptree.planning.plan import Plan
from snaptree.planning.settle import settle, without_names
from snaptree.planning.steps import ApplyInternal, MakeInternal
from snaptree.planning.sweep import follow


@dataclass(frozen=True)
class RevertRequest:
    """``snaptree revert NAME SNAP``."""

    name: str
    discard: bool = False
    keep_as: str | None = None
    delete: bool = False
    children: bool = False
    files: Mapping[str, str] = field(default_factory=dict)
    power: str | None = None
    """What the machine does afterwards: ``running``, ``paused`` or ``off``; without it, what it does now."""


@dataclass(frozen=True)
class SwitchRequest:
    """``snaptree switch NAME BRANCH``; ``power`` is as for going back."""

    name: str
    files: Mapping[str, str] = field(default_factory=dict)
    power: str | None = None


def _whole(base: Tree, layer: LayerId, outsiders: frozenset[LayerId]) -> bool:
    """Whether the layer's whole state is free to be written: nothing stands on it, no snapshot needs it as a whole."""
    names = base.names_on.get(Point(layer), ())
    return (
        base.layers[layer].owned
        and not base.children.get(layer)
        and layer not in outsiders
        and not any(name in base.snapshots and Point(layer) in base.snapshots[name].points.values() for name in names)
    )


def _go_to(draft: Draft, base: Tree, point: Point, label: str, purpose: str, *, reuse: bool) -> Point:
    """The tip that shows what the point shows: the layer itself, its state applied in place, or a new file.

    :param base: the settled tree without what this operation drops; it says what still stands where.
    :param reuse: the snapshot goes, so that its layer may be the tip again.
    """
    layer = draft.before.layers[point.layer]
    if point.internal is None:
        if reuse and layer.owned and not layer.half_merged:
            held = point.layer in base.layers and (
                base.needed(point.layer) or not _whole(base, point.layer, draft.outsiders)
            )
            if not held and point.layer not in draft.outsiders:
                draft.require_whole(point.layer, purpose)
                draft.touches.add(layer.path)
                return point
        return Point(draft.stack(point.layer, label, purpose).id)
    if point.layer not in base.layers or _whole(base, point.layer, draft.outsiders):
        draft.require_whole(point.layer, purpose)
        draft.require_readable(point.layer, purpose)
        require_plain(draft.facts(point.layer), f"{purpose} within {layer.path}")
        for branch in [each for each in draft.tree.branches.values() if each.tips.get(layer.disk) == Point(layer.id)]:
            tag = draft.new_tag(layer.id, branch.name)
            draft.prepare.append(MakeInternal(layer.path, tag))
            draft.tree = renamed_tip(draft.tree, branch.name, layer.disk, Point(layer.id, tag))
        draft.finish.append(ApplyInternal(layer.path, point.internal, draft.files_below(layer.id)))
        draft.touches.add(layer.path)
        size = next(
            (one.virtual_size for one in draft.facts(layer.id).internals if one.name == point.internal),
            layer.virtual_size,
        )
        # Whatever a commit had begun to write there goes with the active state of before.
        draft.tree = draft.tree.with_layers(replace(layer, virtual_size=size, identity=None, half_merged=False))
        return Point(layer.id)
    return Point(draft.build(point, label, purpose).id)


def _is_written(draft: Draft, snapshot: Snapshot) -> bool:
    """Whether the active branch has work of its own on a disk that the snapshot would take back."""
    tips = draft.before.active_branch.tips
    return any(not _idle(draft, tips[disk].layer) for disk in snapshot.points if disk in tips)


def _idle(draft: Draft, tip: LayerId) -> bool:
    """Whether dropping the layer's active state would lose nothing: it shows what a point that stays shows."""
    kept = set(draft.facts(tip).unchanged_since) & set(draft.before.internals.get(tip, ()))
    return draft.unwritten(tip) or bool(kept)


def revert(tree: Tree, survey: Survey, request: RevertRequest) -> Plan:
    """Plan to go back to a snapshot.

    The active branch's name moves to a new line at the snapshot. The work of before is parked under a name of its own,
    unless ``discard`` drops it or nothing has been written. With ``delete`` the snapshot goes too, and where nothing
    else needs its layer, that layer is the tip again.

    :raise NotFoundError: there is no such snapshot.
    """
    snapshot = _checked(tree, request)
    draft = Draft(tree, survey, request.files)
    active = tree.active_branch
    parks = not request.discard and _is_written(draft, snapshot)
    if request.keep_as is not None and not parks:
        draft.notes.append(f"nothing was written since the last snapshot: no branch {request.keep_as!r} was made")
    gone = [snapshot.name] if request.delete else []
    if request.children:
        gone += tree.descendants(snapshot.name)
    purpose = f"go back to {snapshot.name!r}"
    parked_name = request.keep_as or _free_name(tree, active.name)

    parked = replace(active, name=parked_name, firmware=draft.keep_firmware(parked_name) if parks else ())
    others = {disk: tip for disk, tip in active.tips.items() if disk not in snapshot.points}
    stays = {
        disk: active.tips[disk]
        for disk, point in snapshot.points.items()
        if not parks and disk in active.tips and _stands_idle(draft, active.tips[disk].layer, point)
    }
    # What is left when the active line is parked or dropped and the names are gone: it says what layers are still held.
    line = Branch(active.name, snapshot.name, {**others, **stays}, active.created)
    left = tree.without_branches(active.name).with_branches(*([parked] if parks else []))
    draft.tree = without_names(left.with_branches(line), gone)
    keep = {**({} if parks else others), **({} if request.delete else stays)}
    base = settle(renamed_line(draft.tree, active.name, keep), draft.outsiders)

    tips: dict[str, Point] = {}
    for disk in sorted(others):
        if parks:
            tips[disk], left_behind = draft.fork(disk, active.name, parked_name)
            draft.tree = renamed_tip(draft.tree, parked_name, disk, left_behind)
        else:
            tips[disk] = others[disk]
    for disk, point in sorted(snapshot.points.items()):
        if disk in stays and not (request.delete and point.layer not in base.layers):
            tips[disk] = stays[disk]
        else:
            tips[disk] = _go_to(draft, base, point, active.name, purpose, reuse=request.delete)
    draft.restore_firmware(snapshot.firmware)
    draft.tree = renamed_line(draft.tree, active.name, tips)
    work = f", parking the work of now as {parked_name!r}" if parks else ""
    plan = draft.conclude("revert", f"go back to {snapshot.name!r}{work}", f"the machine is at {snapshot.name!r}")
    return follow(plan, tree, survey, "auto") if gone else plan


def _checked(tree: Tree, request: RevertRequest) -> Snapshot:
    if request.name not in tree.snapshots:
        hint = f"see 'snaptree tree {tree.machine}'"
        if request.name in tree.branches:
            hint = f"{request.name!r} is a branch: use 'snaptree switch {tree.machine} {request.name}'"
        raise NotFoundError(f"machine {tree.machine} has no snapshot {request.name!r}", hint)
    if request.discard and request.keep_as is not None:
        raise UsageError("--discard and --keep-as exclude each other", "give one of them")
    if request.children and not request.discard:
        raise UsageError("--children deletes what grew from the snapshot: it needs --discard", "add --discard")
    if request.keep_as is not None:
        require_free_name(tree, request.keep_as, "branch")
    for disk in request.files:
        if disk not in tree.snapshots[request.name].points:
            raise NotFoundError(f"snapshot {request.name!r} has no disk {disk!r}", "leave out --file for it")
    return tree.snapshots[request.name]


def _stands_idle(draft: Draft, tip: LayerId, point: Point) -> bool:
    """Whether the tip is an unwritten overlay on the very point: there is nothing to do for this disk."""
    return point.internal is None and draft.unwritten(tip) and draft.before.layers[tip].parent == point.layer


def renamed_line(tree: Tree, branch: str, tips: Mapping[str, Point]) -> Tree:
    """The tree with other tips of one branch."""
    return tree.with_branches(replace(tree.branches[branch], tips=dict(tips)))


def _free_name(tree: Tree, branch: str) -> str:
    stem, dot, number = branch.rpartition(".")
    stem = stem if dot and number.isdigit() else branch
    count = 1
    while tree.has_name(f"{stem}.{count}"):
        count += 1
    return f"{stem}.{count}"


def switch(tree: Tree, survey: Survey, request: SwitchRequest) -> Plan:
    """Plan to work on another branch; the one of now is parked as it is, and nothing is dropped.

    :raise NotFoundError: there is no such branch.
    :raise RefusedError: the machine works on it already.
    """
    if request.name not in tree.branches:
        hint = f"see 'snaptree branches {tree.machine}'"
        if request.name in tree.snapshots:
            hint = f"{request.name!r} is a snapshot: use 'revert', or grow a branch from it"
        raise NotFoundError(f"machine {tree.machine} has no branch {request.name!r}", hint)
    if request.name == tree.active:
        raise RefusedError(f"the machine works on branch {request.name!r} already")
    require_disks(tree, request.files)
    draft = Draft(tree, survey, request.files)
    purpose = f"switch to {request.name!r}"
    active, target = tree.active_branch, tree.branches[request.name]
    draft.tree = tree.with_branches(replace(active, firmware=draft.keep_firmware(active.name)))
    base = settle(draft.tree, draft.outsiders)
    tips: dict[str, Point] = {}
    for disk, point in sorted(target.tips.items()):
        if point.internal is None:
            draft.require_whole(point.layer, purpose)
            tips[disk] = point
        else:
            tips[disk] = _go_to(draft, base, point, target.name, purpose, reuse=False)
    for disk in sorted(set(active.tips) - set(target.tips)):
        tips[disk], left = draft.fork(disk, target.name, active.name)
        draft.tree = renamed_tip(draft.tree, active.name, disk, left)
    for disk in sorted(set(target.tips) - set(active.tips)):
        draft.notes.append(f"{disk} comes back with branch {target.name!r}")
    draft.restore_firmware(target.firmware)
    draft.tree = replace(
        draft.tree.with_branches(replace(target, tips=tips, firmware=())),
        active=target.name,
    )
    return draft.conclude("switch", f"switch to branch {target.name!r}", f"the machine works on {target.name!r}")
