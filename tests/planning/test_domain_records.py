"""libvirt's records of random trees: the tree is read from them as it was, and what virsh does by them harms none."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from tests.kit.recorded import deletions, needed_by, recorded, unlinked_by_going_back
from tests.kit.simulated import survey
from tests.planning import test_random_plans
from tests.planning.test_random_plans import Journey

from snaptree.model.branch import Branch
from snaptree.model.domain import BRANCH, PLACEHOLDER, SNAPSHOT
from snaptree.model.layer import Layer, Point
from snaptree.model.snapshot import Snapshot
from snaptree.model.tree import Tree
from snaptree.planning.domain_tree import tree_of
from snaptree.planning.records import wanted_records


def told(tree: Tree) -> Any:
    """All of a tree but ids of layers and what frozen ones look like."""

    def places(points: Any) -> dict[str, tuple[str, str | None]]:
        return {disk: (tree.layers[point.layer].path, point.internal) for disk, point in points.items()}

    return {
        "active": tree.active,
        "snapshots": {each.name: (each.parent, places(each.points), each.created) for each in tree.snapshots.values()},
        "branches": {each.name: (each.parent, places(each.tips), each.created) for each in tree.branches.values()},
        "layers": {
            (each.disk, each.path): (
                each.format,
                tree.layers[each.parent].path if each.parent is not None else None,
                each.owned,
                each.made,
                each.virtual_size,
            )
            for each in tree.layers.values()
        },
    }


def harmless(tree: Tree) -> None:
    """Neither going back nor deleting with virsh harms anything but the work of now and what is deleted."""
    records = wanted_records(tree)
    for path in unlinked_by_going_back(records):
        assert needed_by(tree, path) <= {tree.active}, f"going back unlinks {path}"
    for each in deletions(tree, records):
        for path in each.unlinked:
            assert needed_by(tree, path) <= {each.name}, f"deleting {each.name} unlinks {path}"
        for overlay, target in each.committed:
            (layer,) = [one for one in tree.layer_at(target) if one.owned]
            above = [tree.layers[number].path for number in tree.children[layer.id]]
            # Internal snapshots within it stay what they were.
            names = set(tree.names_on.get(Point(layer.id), ()))
            assert above == [overlay] and names <= {each.name}, f"deleting {each.name} changes {target}"
            # Headers that name the overlay libvirt writes anew where they are those of what grew from it.
            grown = set(tree.descendants(each.name)) | {tree.active}
            # libvirt 11.3 crashes over what grew from it beside the active line.
            parked = {one.name for one in tree.branches.values() if one.parent in (*grown, each.name)} - {tree.active}
            assert parked == set(), f"deleting {each.name} crashes libvirt over {parked}"
            grown |= {branch.name for branch in tree.branches.values() if branch.parent in (*grown, each.name)}
            assert needed_by(tree, overlay) <= grown | {each.name}, f"deleting {each.name} unlinks {overlay}"
            (gone,) = [one for one in tree.layer_at(overlay) if one.owned]
            assert not tree.internals.get(gone.id), f"deleting {each.name} unlinks {overlay}, and what is in it"
        for path in each.later:
            left = needed_by(tree, path) - {each.name, tree.active}
            assert left == set(), f"going back after {each.name} has been deleted unlinks {path}"


def sound(tree: Tree) -> None:
    """What holds of any tree's records."""
    records = wanted_records(tree)
    parked = set(tree.branches) - {tree.active}
    kinds = {each.name: each.kind for each in records}
    assert {name for name, kind in kinds.items() if kind == SNAPSHOT} == set(tree.snapshots)
    assert {name for name, kind in kinds.items() if kind == BRANCH} == parked
    assert list(kinds.values()).count(PLACEHOLDER) <= 1
    current = [each for each in records if each.current]
    assert len(current) <= 1 and (current or not any(each.external for each in records))
    known: set[str] = set()
    for each in records:
        assert each.parent is None or each.parent in known, "a parent comes after what grew from it"
        known.add(each.name)
    found = recorded(tree)
    read = tree_of(found.domain, found.records, found.current, found.facts)
    assert read.notes == ()
    assert told(read.tree) == told(tree)
    assert {disk: read.tree.roots[disk] for disk, root in tree.roots.items() if tree.layer_at(root[0])} == {
        disk: root for disk, root in tree.roots.items() if tree.layer_at(root[0])
    }
    again = tree_of(found.domain, found.records, found.current, found.facts, tree)
    assert set(again.tree.layers) == set(tree.layers)
    assert all(again.tree.layers[number].path == layer.path for number, layer in tree.layers.items())
    harmless(tree)


@pytest.mark.parametrize("seed", range(1, 9))
def test_random_trees_are_read_as_they_were_and_virsh_does_them_no_harm(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_of_a_domain(*words: Any) -> Any:
        return replace(survey(*words), libvirt=True)

    monkeypatch.setattr(test_random_plans, "survey", as_of_a_domain)
    for number in range(6):
        journey = Journey(seed * 100 + number)
        try:
            for _ in range(40):
                journey.step()
                sound(journey.runner.tree)
        except BaseException as error:
            error.add_note(f"seed {seed * 100 + number}:\n  " + "\n  ".join(journey.story[-25:]))
            raise


def line(*names: str) -> Tree:
    """Snapshots in a row on one disk, and the tip on the last."""
    layers = {
        number: Layer(number, "vda", f"/{number}.qcow2", "qcow2", number - 1 or None, owned=True, virtual_size=1)
        for number in range(1, len(names) + 2)
    }
    snapshots = {
        name: Snapshot(name, names[at - 1] if at else None, {"vda": Point(at + 1)}, float(at + 1))
        for at, name in enumerate(names)
    }
    tips = {"vda": Point(len(names) + 1)}
    branches = {"main": Branch("main", names[-1] if names else None, tips, 1.0)}
    return Tree("web1", "main", layers, snapshots, branches, roots={"vda": ("/1.qcow2", "qcow2")})


def test_virsh_can_still_delete_in_a_row() -> None:
    tree = line("s1", "s2", "s3")
    assert [each.name for each in deletions(tree, wanted_records(tree))] == ["s1", "s2", "s3"]
    sound(tree)


def test_what_nobody_has_written_is_no_record_and_no_trouble() -> None:
    assert wanted_records(line()) == ()
    found = recorded(line())
    assert told(tree_of(found.domain, (), None, found.facts).tree) == told(line())
