"""The steps that merge layers: one operation merges a row of each disk at once."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from msgspec.structs import replace

from snaptree.model.delta import diff
from snaptree.model.layer import Layer, LayerId
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning.draft import Draft, paths_of
from snaptree.planning.external import bound, make_external
from snaptree.planning.health import ailments
from snaptree.planning.live_merge import as_moved, is_live, merge_live, moved
from snaptree.planning.merged import SHARING_SECONDS, merged_down, merged_up, merging, renamed
from snaptree.planning.plan import Plan
from snaptree.planning.sealing import opening_seconds
from snaptree.planning.steps import (
    BuildMerged,
    Cover,
    Move,
    MoveJob,
    PutInPlace,
    Record,
    Repoint,
    Shrink,
    Step,
)
from snaptree.planning.unmeasured import Unmeasured
from snaptree.planning.ways import Choice, Row, choose, require_room

USUAL_SPEED = 300e6
"""Bytes a second, for an estimate on a machine on which nothing has been merged yet."""


def plan_merges(
    tree: Tree, survey: Survey, rows: Sequence[Row], way: str, *, external: bool = False
) -> tuple[Plan, ...]:
    """The merges of these rows, as operations that follow one another; one operation merges a row of each disk at once.

    :param external: internal snapshots that keep a row from being committed are made external first.

    :raise Unmeasured: the survey lacks the figures of some rows.
    :raise NoSpaceError: there is no room for the data.
    """
    measured = set(survey.rows)
    wanted = tuple(row for row in rows if row not in measured and all(each in survey.layers for each in row))
    if wanted:
        raise Unmeasured(wanted)
    sick = ailments(tree, survey)
    waiting = list(rows)
    plans: list[Plan] = []
    draft = Draft(tree, survey, sick=sick)
    # What a running machine has open is not merged across sizes, wherever the points are.
    holders = {row[0] for row in rows if external and not is_live(survey, row) and bound(draft, row)}
    if holders:
        plan, survey = make_external(tree, survey, holders, sick)
        plans.append(plan)
        tree = plan.after
    while waiting:
        batch: list[Row] = []
        live = is_live(survey, waiting[0])
        for row in list(waiting):
            taken = {tree.layers[each[0]].disk for each in batch}
            if is_live(survey, row) == live and tree.layers[row[0]].disk not in taken:
                batch.append(row)
                waiting.remove(row)
        draft = Draft(tree, survey, sick=sick)
        draft.fresh = moved(survey)
        plans += merge_live(draft, batch, way) if live else (_merge(draft, batch, way),)
        tree = plans[-1].after
        survey = as_moved(survey, tree) if live else survey
        renamed = {gone: stays for row in batch for gone, stays in _merged_into(row, tree)}
        waiting = [tuple(dict.fromkeys(renamed.get(each, each) for each in row)) for row in waiting]
    return tuple(plan for plan in plans if plan.steps or plan.notes)


def _merged_into(row: Row, after: Tree) -> list[tuple[LayerId, LayerId]]:
    if row[-1] in after.layers:
        return []
    return [(each, row[0]) for each in row[1:]]


def _merge(draft: Draft, rows: Sequence[Row], way: str) -> Plan:
    tree = draft.tree
    choices: list[Choice] = []
    for row in rows:
        if row not in draft.survey.rows:
            draft.notes.append(
                f"{tree.layers[row[0]].path} is not merged yet: a layer on it is only just being made; gc does it"
            )
            continue
        choice = choose(draft, row, way)
        if isinstance(choice, str):
            draft.notes.append(choice)
        else:
            choices.append(choice)
    require_room(draft, choices)
    if not choices:
        return Plan("merge", "merge nothing", (), 0, tree, notes=tuple(draft.notes), paths_after=paths_of(tree))
    return _steps(draft, choices)


def _steps(draft: Draft, choices: Sequence[Choice]) -> Plan:
    tree = draft.tree
    marks, covers = _marks(draft, choices)
    marked = draft.tree
    moving = [choice for choice in choices if choice.way != "reflink"]
    sharing = [choice for choice in choices if choice.way == "reflink"]
    jobs = tuple(_job(draft, choice, number) for number, choice in enumerate(moving))
    steps: list[Step] = []
    if marks:
        steps.append(Record(diff(tree, marked), (), "note that the lower layers are being written"))
    steps += [*covers, *(_build(draft, choice) for choice in sharing), *([Move(jobs)] if jobs else [])]
    no_return = len(steps)
    steps += [PutInPlace(step.path) for step in steps if isinstance(step, BuildMerged)]
    for choice in choices:
        steps += _down(draft, choice) if choice.down else _up(draft, choice)
    speed = draft.survey.bytes_per_second or USUAL_SPEED
    copied, extents = sum(choice.bytes for choice in choices), sum(choice.extents for choice in sharing)
    seconds = 0.1 + copied / speed + extents * SHARING_SECONDS + opening_seconds(draft, (each.row for each in moving))
    return merging(draft, choices, steps, no_return, before=tree, recorded=marked, seconds=seconds)


def _marks(draft: Draft, choices: Sequence[Choice]) -> tuple[bool, list[Step]]:
    """Mark what a commit writes to, and cover what tops show past the end of shorter layers."""
    changed: dict[LayerId, Layer] = {}
    covers: list[Step] = []
    for choice in choices:
        layers = [draft.tree.layers[each] for each in choice.row]
        if choice.way == "commit":
            changed[layers[0].id] = replace(layers[0], half_merged=True)
        # The mover sees to that itself; QEMU's jobs don't.
        shorter = any(layer.virtual_size < layers[-1].virtual_size for layer in layers[:-1])
        if shorter and choice.facts.by_qemu:
            covers.append(Cover(draft.files(choice.row), draft.files_below(layers[0].id)))
    draft.tree = draft.tree.with_layers(*changed.values())
    return bool(changed), covers


def _job(draft: Draft, choice: Choice, number: int) -> MoveJob:
    layers = [draft.tree.layers[each] for each in choice.row]
    facts = choice.facts
    return MoveJob(
        name=f"{choice.way}-{layers[0].disk}-{number}",
        way=choice.way,
        disk=layers[0].disk,
        row=draft.files(choice.row),
        below=draft.files_below(choice.row[0]),
        bytes=choice.bytes,
        zeroes=facts.commit_zeroes if choice.way == "commit" else 0,
        profile=facts.profile_commit if choice.way == "commit" else facts.profile_pull,
        by_qemu=facts.by_qemu,
    )


def _build(draft: Draft, choice: Choice) -> BuildMerged:
    return BuildMerged(
        path=draft.tree.layers[choice.row[0 if choice.down else -1]].path,
        row=draft.files(choice.row),
        below=draft.files_below(choice.row[0]),
        shared=choice.moves - choice.bytes,
        bytes=choice.bytes,
    )


def _down(draft: Draft, choice: Choice) -> list[Step]:
    """What follows when the lowest layer has it all: what stood on the highest stands on it, and has its name."""
    tree = draft.tree
    lowest, top = tree.layers[choice.row[0]], tree.layers[choice.row[-1]]
    steps: list[Step] = []
    if top.virtual_size < lowest.virtual_size:
        steps.append(Shrink(lowest.path, lowest.format, draft.files_below(lowest.id), top.virtual_size))
    children = [tree.layers[each] for each in tree.children.get(top.id, ())]
    steps += [Repoint(child.path, lowest.path, lowest.format) for child in children]
    draft.tree = merged_down(tree, choice.row)
    return steps


def _up(draft: Draft, choice: Choice) -> list[Step]:
    """What follows when the highest layer has it all: it stands on what the lowest stood on."""
    tree = draft.tree
    lowest, top = tree.layers[choice.row[0]], tree.layers[choice.row[-1]]
    below = tree.layers[lowest.parent] if lowest.parent is not None else None
    steps: list[Step] = []
    if choice.way != "reflink":
        steps.append(Repoint(top.path, below.path if below else None, below.format if below else None))
    draft.tree, rootless = merged_up(draft, choice.row)
    if not rootless:
        return steps
    elsewhere = posixpath.dirname(top.path) != posixpath.dirname(lowest.path)
    if elsewhere or top.format != lowest.format or top.id in draft.outsiders or draft.facts(lowest.id).block_device:
        draft.notes.append(f"the root of {top.disk} is now {top.path}")
        draft.tree = replace(draft.tree, roots={**draft.tree.roots, top.disk: (top.path, top.format)})
        return steps
    draft.tree, named = renamed(draft.tree, draft.tree.layers[top.id], lowest.path)
    return [*steps, *named]
