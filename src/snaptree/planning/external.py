"""Making internal snapshots external, where a merge needs their layer to be free of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from msgspec.structs import replace

from snaptree.model.layer import LayerId, Point
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning.draft import Draft
from snaptree.planning.health import Ailment
from snaptree.planning.plan import Plan
from snaptree.planning.ways import Row


def bound(draft: Draft, row: Row) -> bool:
    """Whether nothing but internal snapshots of the lowest layer, all with names, keeps the row from a commit.

    QEMU does not shrink an image that has some, nor grow one of version 2.
    """
    lowest, top = draft.tree.layers[row[0]], draft.tree.layers[row[-1]]
    facts = draft.facts(lowest.id)
    resized = top.virtual_size < lowest.virtual_size or (facts.version < 3 and top.virtual_size > lowest.virtual_size)
    named = set(draft.tree.internals.get(lowest.id, ()))
    return bool(named) and resized and named == {each.name for each in facts.internals}


def make_external(
    tree: Tree, survey: Survey, layers: Collection[LayerId], sick: Mapping[LayerId, Ailment]
) -> tuple[Plan, Survey]:
    """Plan to build a layer out of every internal snapshot of these layers; the survey as it will be then."""
    draft = Draft(tree, survey, sick=sick)
    moved: dict[Point, Point] = {}
    for layer in sorted(layers):
        for tag in tree.internals[layer]:
            point = Point(layer, tag)
            label = tree.names_on[point][0]
            moved[point] = Point(draft.build(point, label, f"make {label!r} external").id)
    draft.tree = draft.tree.with_snapshots(
        *(replace(each, points=_moved(each.points, moved)) for each in tree.snapshots.values())
    ).with_branches(*(replace(each, tips=_moved(each.tips, moved)) for each in tree.branches.values()))
    names = ", ".join(sorted({repr(name) for point in moved for name in tree.names_on[point]}))
    plan = draft.conclude("external", f"make the internal points of {names} external", f"{names}: layers of their own")
    return plan, without_internals(survey, tree, plan.after)


def _moved(points: Mapping[str, Point], moved: Mapping[Point, Point]) -> dict[str, Point]:
    return {disk: moved.get(point, point) for disk, point in points.items()}


def without_internals(survey: Survey, before: Tree, after: Tree) -> Survey:
    """The survey without the internal snapshots that go between the two trees."""
    facts = dict(survey.layers)
    for number, tags in before.internals.items():
        gone = set(tags) - set(after.internals.get(number, ()))
        if gone and number in facts:
            left = tuple(each for each in facts[number].internals if each.name not in gone)
            facts[number] = replace(facts[number], internals=left)
    return replace(survey, layers=facts)
