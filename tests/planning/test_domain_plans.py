"""What is planned for a domain of libvirt's that runs: merging by a block copy, where blocks can be shared."""

from __future__ import annotations

import pytest
from tests.kit.examples import Machine

from snaptree.model.invariants import violations
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.domain_steps import DomainMerge, DomainSwap, WriteRecords, with_records
from snaptree.planning.live_swap import NOT_WORTH
from snaptree.planning.plan import Plan
from snaptree.planning.steps import BuildMerged

TELL = WriteRecords("qemu:///system", "the domain")


def domain(*names: str, shares: bool = True) -> Machine:
    """A domain that runs, on blocks that can be shared."""
    machine = Machine(shares=shares).run(*(SnapshotRequest(name) for name in names))
    machine.runs = machine.libvirt = True
    return machine


def kinds(found: Plan) -> list[list[str]]:
    return [[step.kind for step in each.steps] for each in found.every()]


FREEZE = ["make-overlay", "live-snapshot", "record"]
BACK = ["record", "live-merge", "record", "unlink"]


@pytest.mark.parametrize(("names", "rows"), [("s1", 1), ("s2", 1), ("s3", 1), ("s1 s2", 1), ("s1 s3", 2)])
def test_the_guest_goes_over_and_back(names: str, rows: int) -> None:
    machine = domain("s1", "s2", "s3")
    found = machine.plan(DeleteRequest(tuple(names.split()), "reflink"))
    swap = ["make-overlay", "build-merged", "domain-swap", "record", "unlink", "unlink"]
    swap += ["unlink"] * (len(names.split()) - rows)
    assert kinds(found) == [["record"], *([FREEZE, swap, BACK] * rows)]
    assert all(violations(each.after) == () for each in found.every())
    assert found.end.active_branch.tips == machine.runner.tree.active_branch.tips
    assert found.public()["bytes_to_copy"] == 0 < found.public()["bytes_to_share"]
    for each in found.every():
        for step in each.steps:
            if isinstance(step, DomainSwap):
                # The rename can be undone until the guest has gone over.
                assert each.steps[each.point_of_no_return - 1] == step
                (over,) = step.overs
                paths = [path for path, _ in over.chain]
                assert over.upper in paths and over.before not in paths and over.after not in paths
                assert paths == list(dict.fromkeys(paths))
                (built,) = (one for one in each.steps if isinstance(one, BuildMerged))
                assert built.path == over.upper and built.guest == over.before
                assert not {path for path, _ in built.row[:-1]} & set(paths)


def test_it_knows_what_disks_the_domain_has_meanwhile() -> None:
    found = with_records(domain("s1", "s2").plan(DeleteRequest(("s1",), "reflink")), TELL)
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
