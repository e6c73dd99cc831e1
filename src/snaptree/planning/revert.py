"""Going back to a snapshot and switching between branches."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field
from msgspec.structs import replace

from snaptree.errors import NotFoundError, RefusedError, UsageError
from snaptree.model.branch import Branch
from snaptree.model.layer import LayerId, Point
from snaptree.model.live import OFF
from snaptree.model.memory import Memory
from snaptree.model.snapshot import Snapshot
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning import firmware
from snaptree.planning.create import require_disks, require_free_name, require_plain
from snaptree.planning.draft import Draft, renamed_tip
from snaptree.planning.health import ailments
from snaptree.planning.plan import Plan
from snaptree.planning.remembering import (
    Moves,
    forms_waited_for,
    go_over,
    moves,
    new_memory,
    require_loadable,
    require_open,
    saveable,
)
from snaptree.planning.sealing import require_keys
from snaptree.planning.settle import settle, without_names
from snaptree.planning.steps import ApplyInternal, MakeInternal
from snaptree.planning.sweep import follow


class RevertRequest(Struct, frozen=True):
    """``snaptree revert NAME SNAP``."""

    name: str
    discard: bool = False
    keep_as: str | None = None
    delete: bool = False
    children: bool = False
    files: Mapping[str, str] = field(default_factory=dict)
    power: str | None = None
    """What the machine does afterwards: ``running``, ``paused`` or ``off``; without it, what it does now, or did then
    where memory is loaded."""
    memory: bool | None = None
    """Whether memory is loaded, and that of now parked: without it, where the snapshot has some."""


class SwitchRequest(Struct, frozen=True):
    """``snaptree switch NAME BRANCH``; ``power`` and ``memory`` are as for going back."""

    name: str
    files: Mapping[str, str] = field(default_factory=dict)
    power: str | None = None
    memory: bool | None = None


def target_of(tree: Tree, request: RevertRequest | SwitchRequest) -> Snapshot | Branch | None:
    """What a request goes to; ``None`` when there is none of that name."""
    if isinstance(request, RevertRequest):
        return tree.snapshots.get(request.name)
    return tree.branches.get(request.name)


def memory_moves(tree: Tree, state: str, request: object) -> Moves | None:
    """What a request to go elsewhere does with memory; ``None`` when there is none in it, or the request is another.

    :param state: what the machine does now.
    """
    if not isinstance(request, RevertRequest | SwitchRequest):
        return None
    target = target_of(tree, request)
    if target is None or (isinstance(request, SwitchRequest) and request.name == tree.active):
        return None
    drops = isinstance(request, RevertRequest) and request.discard
    return moves(tree, state, target, wanted=request.memory, power=request.power, drops=drops)


def _whole(base: Tree, layer: LayerId, outsiders: frozenset[LayerId]) -> bool:
    """Whether the layer's whole state is free to be written: nothing stands on it, no snapshot needs it as a whole."""
    names = base.names_on.get(Point(layer), ())
    return (
        base.layers[layer].owned
        and not base.children.get(layer)
        and layer not in outsiders
        and not any(name in base.snapshots and Point(layer) in base.snapshots[name].points.values() for name in names)
    )


def _go_to(draft: Draft, base: Tree, point: Point, label: str, purpose: str, *, reuse: bool, beside: bool) -> Point:
    """The tip that shows what the point shows: the layer itself, its state applied in place, or a new file.

    :param base: the settled tree without what this operation drops; it says what still stands where.
    :param reuse: the snapshot goes, so that its layer may be the tip again.
    :param beside: a new QEMU opens it while the one of now has its own layers open, and no two can write to one.
    """
    layer = draft.before.layers[point.layer]
    if point.internal is None:
        if reuse and not beside and layer.owned and not layer.half_merged:
            held = point.layer in base.layers and (
                base.needed(point.layer) or not _whole(base, point.layer, draft.outsiders)
            )
            if not held and point.layer not in draft.outsiders:
                draft.require_whole(point.layer, purpose)
                draft.touches.add(layer.path)
                return point
        return Point(draft.stack(point.layer, label, purpose).id)
    if not beside and (point.layer not in base.layers or _whole(base, point.layer, draft.outsiders)):
        draft.require_whole(point.layer, purpose)
        require_keys(draft, draft.tree.chain(point.layer), purpose)
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
    """Whether the active branch has work of its own that the snapshot would take back: on a disk, or firmware's."""
    tips = draft.before.active_branch.tips
    return draft.survey.firmware_changed or any(
        not _idle(draft, tips[disk].layer) for disk in snapshot.points if disk in tips
    )


def _idle(draft: Draft, tip: LayerId) -> bool:
    """Whether dropping the layer's active state would lose nothing: it shows what a point that stays shows."""
    if draft.is_busy(tip):
        return False
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
    remembered = memory_moves(tree, survey.live.state if survey.live is not None else OFF, request)
    parks = not request.discard and _is_written(draft, snapshot)
    if request.keep_as is not None and not parks:
        draft.notes.append(f"nothing was written since the last snapshot: no branch {request.keep_as!r} was made")
    gone = [snapshot.name] if request.delete else []
    if request.children:
        gone += tree.descendants(snapshot.name)
    purpose = f"go back to {snapshot.name!r}"
    parked_name = request.keep_as or _free_name(tree, active.name)

    parked = replace(active, name=parked_name, firmware=firmware.keep(draft) if parks else ())
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
    saved = _park_memory(draft, parked_name) if remembered is not None and remembered.saves and parks else None
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
            beside = remembered is not None
            tips[disk] = _go_to(draft, base, point, active.name, purpose, reuse=request.delete, beside=beside)
    draft.tree = renamed_line(draft.tree, active.name, tips)
    if remembered is not None:
        if remembered.loads is not None:
            require_loadable(draft, snapshot.name, remembered.loads, others)
        go_over(draft, remembered, saved, snapshot.firmware)
    else:
        firmware.put_back(draft, snapshot.firmware)
    work = f", parking the work of now as {parked_name!r}" if parks else ""
    plan = draft.conclude("revert", f"go back to {snapshot.name!r}{work}", f"the machine is at {snapshot.name!r}")
    # With memory, what becomes loose is merged when it is known what the machine has open then.
    return follow(plan, tree, survey, "auto") if gone and remembered is None else plan


def _park_memory(draft: Draft, name: str) -> Memory:
    """Give the branch that is parked the memory of now, which is still to be saved."""
    found = saveable(draft.survey)
    require_open(found)
    forms_waited_for(found)
    memory = new_memory(draft, name)
    draft.tree = draft.tree.with_branches(replace(draft.tree.branches[name], memory=memory.id))
    return memory


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
    remembered = memory_moves(tree, survey.live.state if survey.live is not None else OFF, request)
    if target.memory is not None and (remembered is None or remembered.loads is None):
        if request.memory is not False:
            hint = "leave out --stopped to go on from it, or drop it with --no-memory"
            raise RefusedError(f"branch {request.name!r} was parked with its memory, which would be lost", hint)
        # Without its memory it goes on from whatever its tips show by now.
        tips_of = [tree.layers[point.layer] for point in target.tips.values() if point.internal is None]
        draft.ailments = ailments(tree.with_layers(*(replace(each, identity=None) for each in tips_of)), survey)
    draft.tree = tree.with_branches(replace(active, firmware=firmware.keep(draft)))
    saved = _park_memory(draft, active.name) if remembered is not None and remembered.saves else None
    base = settle(draft.tree, draft.outsiders)
    tips: dict[str, Point] = {}
    for disk, point in sorted(target.tips.items()):
        if point.internal is None:
            draft.require_whole(point.layer, purpose)
            tips[disk] = point
        else:
            beside = remembered is not None
            tips[disk] = _go_to(draft, base, point, target.name, purpose, reuse=False, beside=beside)
    for disk in sorted(set(active.tips) - set(target.tips)):
        tips[disk], left = draft.fork(disk, target.name, active.name)
        draft.tree = renamed_tip(draft.tree, active.name, disk, left)
    for disk in sorted(set(target.tips) - set(active.tips)):
        draft.notes.append(f"{disk} comes back with branch {target.name!r}")
    draft.tree = replace(
        draft.tree.with_branches(replace(target, tips=tips, firmware=(), memory=None)),
        active=target.name,
    )
    if remembered is not None:
        if remembered.loads is not None:
            require_loadable(draft, target.name, remembered.loads, set(tips) - set(target.tips))
        go_over(draft, remembered, saved, target.firmware)
    else:
        firmware.put_back(draft, target.firmware)
    return draft.conclude("switch", f"switch to branch {target.name!r}", f"the machine works on {target.name!r}")
