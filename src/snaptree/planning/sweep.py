"""What is merged when: after a deletion, by ``squash``, and by ``gc``."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from snaptree.errors import NotFoundError, RefusedError, UsageError
from snaptree.model.layer import LayerId, Point
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning.external import without_internals
from snaptree.planning.merge import plan_merges
from snaptree.planning.plan import Plan
from snaptree.planning.settle import is_loose, loose_layers, shared_layers
from snaptree.planning.steps import ApplyInternal
from snaptree.planning.ways import copies_of_shared, rows_to_merge


def follow(plan: Plan, tree: Tree, survey: Survey, way: str) -> Plan:
    """The plan with the merges of the layers that it makes loose (with a way that makes copies: and shared).

    :param tree: the tree before the plan.
    """
    if way == "none":
        return plan
    survey = _as_it_will_be(plan, tree, survey)
    outsiders = frozenset(each.layer for each in survey.outsiders)
    loose = loose_layers(plan.after, outsiders) - loose_layers(tree, outsiders)
    rows = rows_to_merge(plan.after, loose, outsiders)
    if way in ("pull", "reflink"):
        shared = shared_layers(plan.after, outsiders) - shared_layers(tree, outsiders)
        copies = copies_of_shared(plan.after, shared, outsiders)
        covered = {each for row in copies for each in row[:-1]}
        rows = (*(row for row in rows if not covered & set(row[:-1])), *copies)
    return replace(plan, then=plan_merges(plan.after, survey, rows, way, external=way == "commit")) if rows else plan


def _as_it_will_be(plan: Plan, tree: Tree, survey: Survey) -> Survey:
    """The survey without the internal snapshots that the plan deletes, and without layers whose state it changes."""
    survey = without_internals(survey, tree, plan.after)
    applied = {step.path for step in plan.steps if isinstance(step, ApplyInternal)}
    facts = {number: each for number, each in survey.layers.items() if each.path not in applied}
    return replace(survey, layers=facts)


class SquashRequest(Struct, frozen=True):
    """``snaptree squash NAME --disk vda``: make one layer of all from ``base`` up to ``top``, both included, by file.

    Without ``top`` it is the active tip, without ``base`` the lowest layer that can be merged with it.
    """

    disk: str
    top: str | None = None
    base: str | None = None
    merge: str = "auto"


def squash(tree: Tree, survey: Survey, request: SquashRequest) -> Plan:
    """Plan to merge by file, as blockcommit and blockpull do.

    :raise RefusedError: a kept point lies between, or nothing can be merged.
    """
    if request.disk not in tree.disks:
        raise NotFoundError(
            f"machine {tree.machine} has no disk {request.disk!r}", f"its disks: {', '.join(tree.disks)}"
        )
    if request.merge == "none":
        raise UsageError("--merge none leaves nothing to do for squash", "leave it out, or use commit or pull")
    row = _row_by_file(tree, survey, request)
    plans = plan_merges(tree, survey, [row], request.merge, external=request.merge != "pull")
    if not plans or not any(plan.way for plan in plans):
        notes = [note for plan in plans for note in plan.notes]
        raise RefusedError(notes[0] if notes else "nothing to merge")
    first = replace(plans[0], operation="squash", summary=f"make one layer of {len(row)} on {request.disk}")
    return replace(first, then=plans[1:])


def _row_by_file(tree: Tree, survey: Survey, request: SquashRequest) -> tuple[LayerId, ...]:
    disk, top, base = request.disk, request.top, request.base
    highest = _find(tree, disk, top) if top is not None else tree.active_branch.tips[disk].layer
    lowest = _find(tree, disk, base) if base is not None else None
    if lowest is not None and lowest not in {each.id for each in tree.chain(highest)}:
        raise RefusedError(
            f"{tree.layers[lowest].path} is not beneath {tree.layers[highest].path}",
            f"see the chain with 'snaptree show {tree.machine}'",
        )
    outsiders = frozenset(each.layer for each in survey.outsiders)
    row: list[LayerId] = [highest]
    while row[0] != lowest:
        below = tree.layers[row[0]].parent
        if below is None or not is_loose(tree, below, outsiders):
            if lowest is None or below is None:
                break
            why = _why_kept(tree, survey, below)
            raise RefusedError(f"cannot merge across {tree.layers[below].path}: {why}", _hint(tree, below))
        row.insert(0, below)
    if len(row) == 1:
        under = tree.layers[highest].parent
        why = _why_kept(tree, survey, under) if under is not None else "nothing is beneath it"
        hint = _hint(tree, under) if under is not None else ""
        raise RefusedError(f"nothing to merge with {tree.layers[highest].path}: {why}", hint)
    return tuple(row)


def _find(tree: Tree, disk: str, path: str) -> LayerId:
    for layer in tree.layer_at(path):
        if layer.disk == disk:
            return layer.id
    raise RefusedError(f"{path} is not a layer of {disk}", f"see the layers with 'snaptree show {tree.machine}'")


def _why_kept(tree: Tree, survey: Survey, layer: LayerId) -> str:
    known = tree.layers[layer]
    if not known.owned:
        return f"{known.path} is foreign, and never written to"
    names = tree.names_on.get(Point(layer), ())
    if names:
        return f"{', '.join(map(repr, names))} needs it as it is"
    who = [each.what for each in survey.outsiders if each.layer == layer]
    if who:
        return f"{who[0]} stands on it"
    return f"{tree.stands_on(layer)} things stand on it"


def _hint(tree: Tree, layer: LayerId) -> str:
    names = tree.names_on.get(Point(layer), ())
    return f"delete {names[0]!r} first" if names else "delete what stands on it first"


def gc(tree: Tree, survey: Survey) -> tuple[Plan, ...]:
    """Plan all merges that wait."""
    outsiders = frozenset(each.layer for each in survey.outsiders)
    return plan_merges(tree, survey, rows_to_merge(tree, loose_layers(tree, outsiders), outsiders), "auto")
