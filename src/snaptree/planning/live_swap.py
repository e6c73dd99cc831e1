"""Merging by shared blocks what a running machine has open: a merged file takes a layer's place under its QEMU.

Its monitor is told so. Where libvirt has that, a block copy lets the guest go over to another tip, with which libvirt
opens the merged file. Where there is more in its tip than is worth copying it first goes over to an overlay on it, the
copy is of that, and then it goes back.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from snaptree.model.layer import Layer, LayerId, Point
from snaptree.model.survey import RowFacts
from snaptree.model.tree import MAX_CHAIN, Tree
from snaptree.planning.domain_steps import DomainSwap, Over
from snaptree.planning.draft import Draft, is_tip
from snaptree.planning.live_steps import Cut, LiveSettle, LiveSnapshot, LiveSwap, Swap
from snaptree.planning.merged import SHARING_SECONDS, merged_up, merging
from snaptree.planning.plan import Plan
from snaptree.planning.steps import BuildMerged, PutInPlace, Step
from snaptree.planning.ways import Choice, Row

SWAP_SECONDS, CUT_SECONDS = 0.02, 0.02
"""So long a guest's disk waits while QEMU goes over to another file beneath it, or to a new overlay."""
NOT_WORTH = 16 << 20
"""As many bytes are copied into the running tip rather than that the guest goes over to another file and back."""


def obstacle(draft: Draft, row: Row, closed: Mapping[str, str]) -> str:
    """Why the row cannot be merged by shared blocks under the running machine; empty when it can.

    What keeps data from going up keeps it from that too. That a root would lose its name is nothing: it gets it back.
    """
    tree, live = draft.tree, draft.survey.live
    assert live is not None
    if reason := closed.get("pull"):
        return reason
    if unshared := draft.survey.rows[row].unshared:
        return unshared
    if draft.survey.libvirt:
        return _no_copy(draft, row)
    if "blockdev-reopen" not in live.commands:
        return "its QEMU does not know blockdev-reopen"
    tip = is_tip(tree, row[-1])
    above = [each for each in tree.children.get(row[-1], ()) if each in live.open]
    if tip and len(list(tree.chain(row[-1]))) >= MAX_CHAIN:
        return f"the chain under {tree.layers[row[-1]].path} is as deep as it may be"
    # What stands on it is put on another node with every option as it is, where it has no name to be reopened by.
    for each in (row[-1], *(each for each in above if each not in live.unnamed)):
        if each not in live.reopenable:
            return f"how its QEMU has opened {tree.layers[each].path} is not known, so that it cannot be reopened"
    return ""


def _no_copy(draft: Draft, row: Row) -> str:
    """Why a domain cannot go over by a block copy: an overlay has to be put on its tip meanwhile."""
    tree, live = draft.tree, draft.survey.live
    if live is not None and live.transient:
        return "its domain is transient: if it ended meanwhile nobody would know which file its guest had written to"
    tip = _tip(draft, row)
    if len(list(tree.chain(tip.id))) >= MAX_CHAIN:
        return f"the chain under {tip.path} is as deep as it may be"
    if tip.half_merged:
        return f"{tip.path} is half-merged"
    for each in tree.chain(tip.id):
        ailment = draft.ailments.get(each.id)
        if ailment is not None and ailment.blocks:
            return f"{ailment.detail} ({ailment.word})"
        if draft.facts(each.id).encrypted:
            return f"{each.path} is encrypted"
    return ""


def _tip(draft: Draft, row: Row) -> Layer:
    """The layer that the guest writes to of the row's disk."""
    disk = draft.tree.layers[row[0]].disk
    return draft.tree.layers[draft.tree.active_branch.tips[disk].layer]


def needs_overlay(draft: Draft, row: Row) -> bool:
    """Whether the guest has to go on in an overlay while the row is merged by shared blocks."""
    tip = _tip(draft, row)
    if row[-1] == tip.id or not draft.survey.libvirt:
        return row[-1] == tip.id
    facts = draft.facts(tip.id)
    plain = tip.format == "qcow2" and not (facts.block_device or facts.internals or facts.bitmaps)
    gone = plain and facts.removable and facts.links == 1 and tip.id not in draft.outsiders
    return not gone or _own(draft, tip) > NOT_WORTH


def _own(draft: Draft, layer: Layer) -> int:
    """How many bytes of its own a layer has, at the most."""
    facts = draft.facts(layer.id)
    return min(facts.allocated, facts.file_size)


def freeze(draft: Draft, rows: Sequence[Row]) -> tuple[Plan, Mapping[Row, LayerId]]:
    """The plan that lets the guest go on in new overlays, so that what is beneath can be merged; and which overlay it
    is for which row.
    """
    branch = draft.tree.active_branch
    tips, over, cuts = dict(branch.tips), dict[Row, LayerId](), list[Cut]()
    for row in rows:
        layer = _tip(draft, row)
        new = draft.stack(layer.id, "merging", f"merge into {layer.path}")
        tips[layer.disk], over[row] = Point(new.id), new.id
        cuts.append(Cut(layer.disk, layer.path, new.path))
    draft.prepare.append(LiveSnapshot(tuple(cuts)))
    draft.pause = CUT_SECONDS
    draft.tree = draft.tree.with_branches(replace(branch, tips=tips))
    paths = ", ".join(cut.tip for cut in cuts)
    return draft.conclude("merge", f"let the guest go on beside {paths}", "the guest goes on beside"), over


def swap(draft: Draft, choices: Sequence[Choice], over: Mapping[Row, LayerId]) -> tuple[Plan, Mapping[Row, LayerId]]:
    """The plan that builds the merged files and puts them in place of the rows' highest layers; and the overlays that
    are then to be merged into the tips beneath them.

    :param over: overlays that have only just been made for rows.
    """
    return _by_copy(draft, choices, over) if draft.survey.libvirt else (_by_reopening(draft, choices, over), over)


def _by_reopening(draft: Draft, choices: Sequence[Choice], over: Mapping[Row, LayerId]) -> Plan:
    tree = draft.tree
    swaps = tuple(_swap(draft, choice, over) for choice in choices)
    steps: list[Step] = [_build(choice, each) for choice, each in zip(choices, swaps, strict=True)]
    steps.append(LiveSwap(swaps))
    no_return = len(steps)
    steps += [PutInPlace(each.upper, live=True) for each in swaps]
    steps.append(LiveSettle(swaps))
    return _concluded(draft, choices, steps, no_return, tree)


def _by_copy(
    draft: Draft, choices: Sequence[Choice], over: Mapping[Row, LayerId]
) -> tuple[Plan, Mapping[Row, LayerId]]:
    """A block copy from the tip, or an overlay on it, to another, which finds the merged file by its name."""
    tree, branch = draft.tree, draft.tree.active_branch
    tips, after, overs, steps = dict(branch.tips), dict[Row, LayerId](), list[Over](), list[Step]()
    draft.fresh |= frozenset(over.values())
    copied = 0
    for choice in choices:
        before, upper = _tip(draft, choice.row), tree.layers[choice.row[-1]]
        assert before.parent is not None
        if choice.row in over:
            new = draft.stack(before.parent, "merging", f"merge into {tree.layers[before.parent].path}")
            tips[before.disk], after[choice.row] = Point(new.id), new.id
        else:
            path = draft.twin(before.id, f"merge beneath {before.path}")
            new = replace(before, path=path, made=True)
            draft.tree = draft.tree.with_layers(new)
            draft.notes.append(f"the active tip of {before.disk} is {path} then")
            copied += _own(draft, before)
        beneath = {each.id for each in tree.chain(upper.id)}
        above = [each.id for each in tree.chain(before.parent) if each.id not in beneath]
        chain = (*draft.files([*above, upper.id]), *draft.files_below(choice.row[0]))
        overs.append(Over(before.disk, before.path, new.path, upper.path, chain))
        steps.append(
            BuildMerged(
                upper.path,
                draft.files(choice.row),
                draft.files_below(choice.row[0]),
                choice.moves - choice.bytes,
                choice.bytes,
                guest=before.path,
            )
        )
    steps = [*draft.prepare, *steps, DomainSwap(tuple(overs))]
    draft.tree = draft.tree.with_branches(replace(branch, tips=tips))
    plan = _concluded(draft, choices, steps, len(steps), tree)
    return replace(plan, bytes_to_copy=plan.bytes_to_copy + copied), after


def _concluded(draft: Draft, choices: Sequence[Choice], steps: Sequence[Step], no_return: int, before: Tree) -> Plan:
    for choice in choices:
        draft.tree = up(draft, choice.row)
    seconds = 0.1 + sum(choice.extents for choice in choices) * SHARING_SECONDS
    return merging(
        draft, choices, steps, no_return, before=before, recorded=before, seconds=seconds, live=True, pause=SWAP_SECONDS
    )


def back(draft: Draft, over: LayerId) -> Choice:
    """The commit of what the overlay has gathered meanwhile into the tip beneath it."""
    tip = draft.tree.layers[over].parent
    assert tip is not None
    return Choice((tip, over), "commit", RowFacts(0, 0, 0, 0, 0), down=True)


def _swap(draft: Draft, choice: Choice, over: Mapping[Row, LayerId]) -> Swap:
    tree, live = draft.tree, draft.survey.live
    assert live is not None
    child = over.get(choice.row)
    if child is None:
        (child,) = (each for each in tree.children.get(choice.row[-1], ()) if each in live.open)
    return Swap(
        disk=tree.layers[choice.row[0]].disk,
        row=draft.files(choice.row),
        below=draft.files_below(choice.row[0]),
        child=draft.files([child])[0],
    )


def _build(choice: Choice, swap: Swap) -> BuildMerged:
    return BuildMerged(swap.upper, swap.row, swap.below, choice.moves - choice.bytes, choice.bytes)


def up(draft: Draft, row: Row) -> Tree:
    """The tree when the highest layer has it all, in a running machine, where nothing is renamed.

    A root that goes leaves its name for later, where it can be had then.
    """
    lowest, top = draft.tree.layers[row[0]], draft.tree.layers[row[-1]]
    pulled, rootless = merged_up(draft, row)
    if not rootless:
        return pulled
    if top.format == lowest.format and posixpath.dirname(top.path) == posixpath.dirname(lowest.path):
        by = f", by 'snaptree gc {draft.tree.machine}'" if draft.survey.libvirt else ""
        draft.notes.append(f"{top.path} gets the name {lowest.path} when the machine has stopped{by}")
        return pulled
    draft.notes.append(f"the root of {top.disk} is now {top.path}")
    return replace(pulled, roots={**pulled.roots, top.disk: (top.path, top.format)})
