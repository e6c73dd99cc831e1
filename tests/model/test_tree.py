"""The tree's nouns and its invariants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from snaptree.errors import UsageError
from snaptree.model.branch import Branch
from snaptree.model.delta import apply, diff
from snaptree.model.invariants import violations
from snaptree.model.layer import Layer, Point
from snaptree.model.names import check_name, check_target
from snaptree.model.snapshot import Snapshot
from snaptree.model.tree import Tree
from snaptree.planning.settle import is_loose, is_shared, role, settle, without_names


def layer(number: int, parent: int | None, *, owned: bool = True, disk: str = "vda") -> Layer:
    return Layer(number, disk, f"/{number}.qcow2", "qcow2", parent, owned, 1 << 20)


def forked() -> Tree:
    """golden(1) <- root(2) <- fork(3) <- {main's tip(4), other's tip(5)}, with snapshots on 2 and 3."""
    return Tree(
        "web1",
        "main",
        {1: layer(1, None, owned=False), 2: layer(2, 1), 3: layer(3, 2), 4: layer(4, 3), 5: layer(5, 3)},
        {"s1": Snapshot("s1", None, {"vda": Point(2)}, 1.0), "s2": Snapshot("s2", "s1", {"vda": Point(3)}, 2.0)},
        {"main": Branch("main", "s2", {"vda": Point(4)}, 3.0), "other": Branch("other", "s2", {"vda": Point(5)}, 4.0)},
        {},
        {"vda": ("/2.qcow2", "qcow2")},
    )


def test_a_sound_tree_has_no_violations() -> None:
    assert violations(forked()) == ()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tree: tree.with_layers(replace(tree.layers[2], parent=4)), "loop"),
        (lambda tree: tree.with_layers(replace(tree.layers[3], parent=9)), "does not exist"),
        (lambda tree: tree.with_layers(replace(tree.layers[2], disk="vdb")), "vdb"),
        (lambda tree: tree.with_layers(layer(6, 4)), "stands on /4.qcow2, the tip"),
        (lambda tree: tree.with_layers(layer(6, 3)), "nothing needs layer /6.qcow2"),
        (lambda tree: tree.with_layers(replace(tree.layers[4], owned=False)), "foreign"),
        (lambda tree: tree.with_layers(replace(tree.layers[3], half_merged=True)), "half-merged"),
        (lambda tree: replace(tree, active="nothing"), "active branch"),
        (lambda tree: tree.with_branches(Branch("twin", None, {"vda": Point(4)}, 0.0)), "one tip together"),
        (lambda tree: tree.with_branches(replace(tree.branches["other"], parent="x")), "which does not exist"),
        (lambda tree: tree.with_snapshots(replace(tree.snapshots["s1"], parent="s2")), "loop"),
        (lambda tree: tree.with_snapshots(Snapshot("main", None, {"vda": Point(2)}, 0.0)), "both named"),
        (lambda tree: tree.with_snapshots(replace(tree.snapshots["s1"], memory=3)), "memory 3"),
    ],
)  # fmt: skip
def test_each_invariant_is_found_broken(spoil: object, words: str) -> None:
    assert callable(spoil)
    assert any(words in sentence for sentence in violations(spoil(forked())))


def test_roles() -> None:
    tree = forked()
    assert [role(tree, number) for number in (1, 2, 3, 4, 5)] == ["foreign", "snapshot", "snapshot", "tip", "tip"]
    nameless = without_names(tree, ["s1", "s2"])
    assert is_loose(nameless, 2) and is_shared(nameless, 3)
    assert not is_loose(nameless, 2, {2}), "something outside stands on it"
    assert nameless.branches["main"].parent is None
    assert without_names(tree, ["s2"]).branches["other"].parent == "s1"


@pytest.mark.parametrize(
    ("gone", "branches", "whole"),
    [
        (["s2"], [], True),  # two stand on it
        ([], [], False),  # a snapshot shows what it shows
        (["s2"], ["other"], False),  # what was being committed may be what stands on it
    ],
)
def test_a_half_merged_layer_is_whole_when_nothing_is_left_to_be_committed(
    gone: list[str], branches: list[str], *, whole: bool
) -> None:
    tree = forked().with_layers(replace(layer(3, 2), half_merged=True))
    assert settle(without_names(tree, gone, branches)).layers[3].half_merged != whole


def test_a_half_merged_tip_is_whole() -> None:
    """It was gone over to, and what was being committed into it has gone."""
    tree = without_names(forked(), ["s2"], ["other"]).with_branches(Branch("main", "s1", {"vda": Point(3)}, 3.0))
    tree = tree.with_layers(replace(layer(3, 2), half_merged=True))
    left = settle(tree)
    assert set(left.layers) == {1, 2, 3} and not left.layers[3].half_merged


def test_what_nothing_needs_goes_with_all_beneath_that_only_it_needed() -> None:
    tree = forked()
    left = settle(without_names(tree, ["s1", "s2"], ["other"]))
    assert set(left.layers) == {1, 2, 3, 4}
    tree = tree.with_branches(replace(tree.branches["main"], tips={}))
    assert set(settle(without_names(tree, ["s1", "s2"], ["other"])).layers) == set()


@given(st.sets(st.sampled_from(["s1", "s2"])), st.booleans())
def test_a_difference_turns_one_tree_into_the_other(gone: set[str], branch: bool) -> None:
    before = forked()
    after = settle(without_names(before, gone, ["other"] if branch else []))
    delta = diff(before, after)
    assert apply(before, delta) == after
    assert apply(after, delta) == after
    assert bool(delta) == (before != after)


changes = st.lists(
    st.tuples(st.sampled_from(["put", "drop", "name"]), st.integers(1, 8), st.none() | st.integers(1, 8)), max_size=12
)


@given(changes, st.booleans())
def test_what_is_worked_out_of_a_tree_stays_right_in_those_made_of_it(
    done: list[tuple[str, int, int | None]], early: bool
) -> None:
    tree = forked()
    for what, number, parent in done:
        assert not early or tree.children is not None
        match what:
            case "put":
                tree = tree.with_layers(layer(number, parent), layer(number % 8 + 1, parent))
            case "drop":
                tree = tree.without_layers({number, parent or 1})
            case _:
                tree = tree.without_branches("other").with_snapshots(Snapshot(f"n{number}", None, {}, 0.0))
    assert tree.children == replace(tree).children


@given(changes)
def test_a_layer_comes_before_those_that_it_stands_on(done: list[tuple[str, int, int | None]]) -> None:
    higher = [layer(10 + number, 10 + parent if parent and parent < number else None) for _, number, parent in done]
    tree = forked().with_layers(*higher)
    order = [each.id for each in tree.deepest_first(tree.layers.values())]
    assert sorted(order) == sorted(tree.layers)
    for at, each in enumerate(order):
        assert not ({one.id for one in tree.chain(each)} - {each}) & set(order[:at])


@given(st.text(max_size=120))
def test_names_are_safe_in_file_names_or_refused(name: str) -> None:
    try:
        check_name(name, "snapshot")
    except UsageError:
        return
    assert name and "/" not in name and "\0" not in name and "\n" not in name
    assert name[0] not in ".-" and name == name.strip() and len(name.encode()) <= 180


@pytest.mark.parametrize("target", ["", "VDA", "vd a", "../x", "-a", "x" * 40, "1a"])
def test_targets_are_words(target: str) -> None:
    with pytest.raises(UsageError):
        check_target(target)
