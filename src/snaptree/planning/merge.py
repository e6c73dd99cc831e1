"""The steps that merge layers: one operation merges a row of each disk at once."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import replace

from snaptree.model.delta import diff
from snaptree.model.layer import Layer, LayerId
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning.draft import Draft, paths_of
from snaptree.planning.external import bound, make_external
from snaptree.planning.health import ailments
from snaptree.planning.live_merge import is_live, merge_live
from snaptree.planning.merged import merged_down, to_be_known
from snaptree.planning.plan import Plan
from snaptree.planning.settle import settle
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
    TakeName,
)
from snaptree.planning.unmeasured import Unmeasured
from snaptree.planning.ways import Choice, Row, choose, is_owned_root, require_room

USUAL_SPEED = 300e6
"""Bytes a second, for an estimate on a machine on which nothing has been merged yet."""
SHARING_SECONDS = 50e-6
"""What sharing one run of clusters takes, for an estimate."""


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
    holders = {row[0] for row in rows if external and bound(draft, row)}
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
        plans += merge_live(draft, batch, way) if live else (_merge(draft, batch, way),)
        tree = plans[-1].after
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
    after = settle(draft.tree, draft.outsiders)
    cleanup, freed = draft.cleanup(after)
    steps += [Record(diff(marked, after), to_be_known(after), "the merged layers are one"), *cleanup]
    copied = sum(choice.bytes for choice in choices)
    grown = sum(choice.grows for choice in choices)
    # What is shared with a file that stays takes no room.
    added = sum(choice.adds if choice.down or choice.row[0] not in after.layers else choice.grows for choice in choices)
    speed = draft.survey.bytes_per_second or USUAL_SPEED
    ways = sorted({choice.way for choice in choices})
    return Plan(
        operation="merge",
        summary="merge " + ", ".join(tree.layers[choice.row[0]].path for choice in choices),
        steps=tuple(steps),
        point_of_no_return=no_return,
        after=after,
        bytes_to_copy=copied,
        peak_extra_bytes=grown,
        frees_bytes=freed - added,
        seconds=0.1 + copied / speed + sum(choice.extents for choice in sharing) * SHARING_SECONDS,
        way="+".join(ways),
        cancel="pauses" if "commit" in ways else "undoes",
        paths_after=paths_of(after),
        notes=tuple(draft.notes),
        touches=tuple(sorted({tree.layers[each].path for choice in choices for each in choice.row})),
    )


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
            row = tuple((layer.path, layer.format) for layer in layers)
            covers.append(Cover(row, draft.files_below(layers[0].id)))
    draft.tree = draft.tree.with_layers(*changed.values())
    return bool(changed), covers


def _job(draft: Draft, choice: Choice, number: int) -> MoveJob:
    layers = [draft.tree.layers[each] for each in choice.row]
    facts = choice.facts
    return MoveJob(
        name=f"{choice.way}-{layers[0].disk}-{number}",
        way=choice.way,
        disk=layers[0].disk,
        row=tuple((layer.path, layer.format) for layer in layers),
        below=draft.files_below(choice.row[0]),
        bytes=choice.bytes,
        zeroes=facts.commit_zeroes if choice.way == "commit" else 0,
        profile=facts.profile_commit if choice.way == "commit" else facts.profile_pull,
        by_qemu=facts.by_qemu,
    )


def _build(draft: Draft, choice: Choice) -> BuildMerged:
    layers = [draft.tree.layers[each] for each in choice.row]
    taken = layers[0] if choice.down else layers[-1]
    row = tuple((layer.path, layer.format) for layer in layers)
    return BuildMerged(
        path=taken.path,
        row=row,
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
    merged = replace(top, parent=lowest.parent, identity=None)
    rooted = is_owned_root(tree, lowest.id)
    pulled = tree.with_layers(merged)
    draft.tree = pulled
    if not rooted or lowest.id in settle(pulled, draft.outsiders).layers:
        return steps
    elsewhere = posixpath.dirname(top.path) != posixpath.dirname(lowest.path)
    if elsewhere or top.format != lowest.format or top.id in draft.outsiders or draft.facts(lowest.id).block_device:
        draft.notes.append(f"the root of {top.disk} is now {top.path}")
        draft.tree = replace(pulled, roots={**pulled.roots, top.disk: (top.path, top.format)})
        return steps
    children = [pulled.layers[each] for each in pulled.children.get(top.id, ())]
    steps.append(TakeName(top.path, lowest.path))
    steps += [Repoint(child.path, lowest.path, lowest.format) for child in children]
    draft.tree = pulled.with_layers(
        replace(merged, path=lowest.path), *(replace(child, identity=None) for child in children)
    )
    return steps
