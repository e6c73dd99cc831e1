"""What is planned for a machine that runs: by QEMU what it has open, beside it what it has not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.kit.examples import Machine
from tests.kit.simulated import measured, survey

from snaptree.errors import RefusedError
from snaptree.model.invariants import violations
from snaptree.model.live import Live
from snaptree.planning.create import BranchRequest, SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.live import require_possible
from snaptree.planning.live_steps import LiveMerge, LiveSnapshot
from snaptree.planning.plan import Plan
from snaptree.planning.revert import SwitchRequest
from snaptree.planning.steps import BuildMerged, Move, Repoint, TakeName
from snaptree.planning.unmeasured import Unmeasured
from snaptree.planning.verbs import DeleteBranchRequest, RemoveRequest, Request, plan


def running(machine: Machine) -> Machine:
    machine.runs = True
    return machine


def line() -> Machine:
    return running(Machine().run(*(SnapshotRequest(f"s{number}") for number in (1, 2, 3))))


def kinds(found: Plan) -> list[str]:
    return [step.kind for each in found.every() for step in each.steps]


@pytest.mark.parametrize("names", [("s1",), ("s2",), ("s3",), ("s1", "s2"), ("s2", "s3"), ("s1", "s2", "s3")])
@pytest.mark.parametrize("way", ["auto", "commit", "pull", "reflink", "none"])
def test_what_a_running_machine_has_open_its_qemu_merges(names: tuple[str, ...], way: str) -> None:
    found = line().plan(DeleteRequest(names, way))
    steps = [step for each in found.every() for step in each.steps]
    assert not any(isinstance(step, Move | BuildMerged | Repoint | TakeName) for step in steps)
    assert any(isinstance(step, LiveMerge) for step in steps) == (way != "none")
    assert violations(found.end) == ()
    assert found.public()["estimate"] is True
    if way != "none":
        # Names, and files that are not merged away, keep their paths.
        assert {each.path for each in found.end.layers.values()} < {
            each.path for each in line().runner.tree.layers.values()
        }


def test_a_pause_is_foretold_where_the_guest_goes_over() -> None:
    assert line().plan(DeleteRequest(("s2",))).public()["guest_pause"] == 0
    assert line().plan(DeleteRequest(("s3",), "pull")).public()["guest_pause"] == 0
    assert line().plan(DeleteRequest(("s3",), "commit")).public()["guest_pause"] > 0
    assert running(Machine()).plan(SnapshotRequest("s1")).public()["guest_pause"] > 0


def test_another_branch_is_merged_beside_it() -> None:
    forked = Machine().run(SnapshotRequest("s1"), BranchRequest("other", "s1"), SwitchRequest("other"))
    forked.run(SnapshotRequest("o1"), SwitchRequest("main"), SnapshotRequest("s2"))
    found = running(forked).plan(DeleteRequest(("o1",)))
    assert "move" in kinds(found) and "live-merge" not in kinds(found)
    found = running(forked).plan(DeleteBranchRequest("other"))
    assert "live-merge" not in kinds(found)
    # The fork point is shared: a copy of its own for each, one by QEMU, the other beside it.
    found = running(forked).plan(DeleteRequest(("s1",), "pull"))
    assert "move" in kinds(found) and "live-merge" in kinds(found)


def test_a_live_snapshot_is_one_step_over_all_disks() -> None:
    found = running(Machine()).plan(SnapshotRequest("s1"))
    cuts = [step for step in found.steps if isinstance(step, LiveSnapshot)]
    assert len(cuts) == 1 and found.steps.index(cuts[0]) == found.point_of_no_return - 1


def test_a_row_of_different_sizes_waits() -> None:
    machine = line()
    tree = machine.runner.tree
    tip = tree.active_branch.tips["vda"].layer
    longer = replace(tree.layers[tip], virtual_size=2 * tree.layers[tip].virtual_size)
    found = survey(machine.runner.disk, tree.with_layers(longer), 9)
    opened = frozenset(each.id for each in tree.chain(tip))
    found = replace(
        found,
        live=Live("running", 1, opened),
        layers={**found.layers, tip: replace(found.layers[tip], virtual_size=longer.virtual_size)},
    )
    request: Request = DeleteRequest(("s3",))
    while True:
        try:
            made = plan(tree.with_layers(longer), found, request)
            break
        except Unmeasured as error:
            rows = {row: measured(machine.runner.disk, tree, row) for row in error.rows}
            found = replace(found, rows={**found.rows, **rows})
    assert kinds(made) == ["record"]
    assert any("different sizes" in note for each in made.every() for note in each.notes)


def test_what_is_refused_names_the_machine() -> None:
    for request in (SnapshotRequest("s1", internal=True), RemoveRequest()):
        with pytest.raises(RefusedError, match="web1"):
            require_possible("web1", request)
    with pytest.raises(RefusedError, match="fork"):
        line().plan(BranchRequest("b"))
