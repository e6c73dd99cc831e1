"""What is planned for a domain of libvirt's that runs: merging by a block copy, where blocks can be shared."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from tests.kit.examples import Machine

from snaptree.model.invariants import violations
from snaptree.model.survey import LayerFacts, Survey
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.domain_steps import DomainMerge, DomainSwap, WriteRecords, with_records
from snaptree.planning.draft import Draft
from snaptree.planning.live_swap import NOT_WORTH, needs_overlay
from snaptree.planning.plan import Plan
from snaptree.planning.steps import BuildMerged, MakeOverlay, Unlink

TELL = WriteRecords("qemu:///system", "the domain")


def domain(*names: str, shares: bool = True) -> Machine:
    """A domain that runs, on blocks that can be shared."""
    machine = Machine(shares=shares).run(*(SnapshotRequest(name) for name in names))
    machine.runs = machine.libvirt = True
    return machine


def kinds(found: Plan) -> list[list[str]]:
    return [[step.kind for step in each.steps] for each in found.every()]


DIRECT = ["make-overlay", "build-merged", "domain-swap", "record", "unlink", "unlink"]
"""The guest goes over to another tip."""
FREEZE = ["make-overlay", "live-snapshot", "record"]
BACK = ["record", "live-merge", "record", "unlink"]
"""It goes to an overlay on its tip, from there to another, and back."""
SHAPES = {
    "s1": [DIRECT],
    "s2": [DIRECT],
    "s3": [FREEZE, DIRECT, BACK],
    "s1 s2": [[*DIRECT, "unlink"]],
    "s1 s3": [DIRECT, FREEZE, DIRECT, BACK],
    "s2 s3": [FREEZE, [*DIRECT, "unlink"], BACK],
    "s1 s2 s3": [FREEZE, [*DIRECT, "unlink", "unlink"], BACK],
}


def files(found: Plan, before: set[str]) -> set[str]:
    """The files that are there when the plan has been carried out."""
    there = set(before)
    for step in (step for each in found.every() for step in each.steps):
        if isinstance(step, MakeOverlay):
            assert step.path not in there
            there.add(step.path)
        elif isinstance(step, Unlink):
            there.remove(step.path)
    return there


@pytest.mark.parametrize("names", SHAPES)
def test_the_guest_goes_over(names: str) -> None:
    machine = domain("s1", "s2", "s3")
    tree = machine.runner.tree
    found = machine.plan(DeleteRequest(tuple(names.split()), "reflink"))
    assert kinds(found) == [["record"], *SHAPES[names]]
    assert all(violations(each.after) == () for each in found.every())
    assert files(found, {each.path for each in tree.layers.values()}) == {
        each.path for each in found.end.layers.values()
    }
    assert found.public()["bytes_to_copy"] == 0 < found.public()["bytes_to_share"]
    told = [note for each in found.every() for note in each.notes if "the active tip of vda is" in note]
    assert bool(told) == (SHAPES[names][0] != FREEZE)
    for each in found.every():
        for step in each.steps:
            if isinstance(step, DomainSwap):
                # The change of names can be undone until the guest has gone over.
                assert each.steps[each.point_of_no_return - 1] == step
                (over,) = step.overs
                paths = [path for path, _ in over.chain]
                assert over.upper in paths and over.before not in paths and over.after not in paths
                assert paths == list(dict.fromkeys(paths))
                (built,) = (one for one in each.steps if isinstance(one, BuildMerged))
                assert built.path == over.upper and built.guest == over.before
                assert not {path for path, _ in built.row[:-1]} & set(paths)


def test_it_goes_on_beside_a_tip_with_much_in_it() -> None:
    machine = domain("s1", "s2")
    tip = machine.runner.tree.active_branch.tips["vda"].layer
    facts = replace(LayerFacts("/tip"), allocated=2 * NOT_WORTH, file_size=2 * NOT_WORTH)
    for changed, wanted in (
        (facts, True),
        (replace(facts, file_size=1 << 20), False),
        (replace(facts, file_size=0, bitmaps=("b",)), True),
        (replace(facts, file_size=0, links=2), True),
    ):
        survey = Survey(layers={tip: changed}, libvirt=True)
        assert needs_overlay(Draft(machine.runner.tree, survey, sick={}), (1, 2)) == wanted
    assert needs_overlay(Draft(machine.runner.tree, Survey(libvirt=True), sick={}), (2, tip))


def test_it_knows_what_disks_the_domain_has_meanwhile() -> None:
    found = with_records(domain("s1", "s2").plan(DeleteRequest(("s2",), "reflink")), TELL)
    steps = [step for each in found.every() for step in each.steps]
    assert [step.uri for step in steps if isinstance(step, DomainSwap | DomainMerge)] == [TELL.uri] * 2
    last = [step for step in steps if isinstance(step, WriteRecords)][-1]
    (swap,) = (step for step in steps if isinstance(step, DomainSwap))
    assert {("vda", swap.overs[0].before), ("vda", swap.overs[0].after)} <= set(last.tips)


def test_a_little_is_rather_copied() -> None:
    assert NOT_WORTH > 1 << 20
    assert not [step for step in domain("s1", "s2").plan(DeleteRequest(("s1",))).every() if step.way == "reflink"]


def test_it_says_why_it_cannot_be_done() -> None:
    notes = [note for each in domain("s1", "s2", shares=False).plan(DeleteRequest(("s1",), "reflink")).every()
             for note in each.notes]  # fmt: skip
    assert any("cannot be shared" in note for note in notes), notes


def test_a_transient_one_goes_over_to_nothing_but_what_its_tip_was_merged_into() -> None:
    """Nobody could say later where its guest had been."""
    machine = domain("s1", "s2")
    machine.transient = True
    for names in (("s1",), ("s2",)):
        found = machine.plan(DeleteRequest(names, "reflink"))
        assert not [step for each in found.every() for step in each.steps if isinstance(step, DomainSwap)]
        assert any("its domain is transient" in note for each in found.every() for note in each.notes)
