"""Plans for memory: what is refused beforehand, and what the tree is when the memory could not be saved."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from tests.kit.examples import Machine

from snaptree.errors import NoSpaceError, RefusedError, SnaptreeError, UsageError
from snaptree.model.delta import apply
from snaptree.model.invariants import violations
from snaptree.planning.create import BranchRequest, SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.memory_steps import GoOver, SaveMemory
from snaptree.planning.plan import Plan
from snaptree.planning.revert import RevertRequest, SwitchRequest
from snaptree.planning.settle import loose_layers
from snaptree.planning.steps import Record, Unlink
from snaptree.planning.verbs import DeleteBranchRequest, Request


def running(**changes: Any) -> Machine:
    machine = Machine().run(SnapshotRequest("s1"))
    machine.runs, machine.memory = True, replace(machine.memory, **changes)
    return machine


def test_all_disks_and_the_memory_are_of_one_step() -> None:
    machine = running()
    found = machine.plan(SnapshotRequest("s9", memory=True))
    (save,) = [step for step in found.steps if isinstance(step, SaveMemory)]
    assert len(save.cuts) == 1 and save.forms == machine.memory.forms
    assert found.steps.index(save) == found.point_of_no_return - 1
    taken = found.after.snapshots["s9"]
    assert taken.memory is not None and taken.consistency == "memory"
    memory = found.after.memories[taken.memory]
    assert memory.path == save.path and memory.needs == machine.memory.needs and violations(found.after) == ()


def test_without_the_memory_the_name_is_not_there_and_nothing_is_lost() -> None:
    machine = running()
    found = machine.plan(SnapshotRequest("s9", memory=True))
    (record,) = [step for step in found.steps if isinstance(step, Record)]
    assert record.otherwise is not None
    without = apply(machine.runner.tree, record.otherwise)
    assert set(without.snapshots) == {"s1"} and violations(without) == () and not without.memories
    assert without.active_branch.tips == found.after.active_branch.tips
    assert len(loose_layers(without)) == 1


@pytest.mark.parametrize(
    ("request_", "changes", "error"),
    [
        (SnapshotRequest("s9", memory_file="/disks/x"), {}, UsageError),
        (SnapshotRequest("s9", memory=True), {"obstacle": "a device is in the way"}, RefusedError),
        (SnapshotRequest("s9", memory=True, exclude=("vda",)), {}, RefusedError),
        (SnapshotRequest("s9", memory=True), {"used": 1 << 60, "ram": 1 << 60}, NoSpaceError),
    ],
)
def test_what_cannot_be_is_told_beforehand(
    request_: SnapshotRequest, changes: dict[str, Any], error: type[SnaptreeError]
) -> None:
    with pytest.raises(error):
        running(**changes).plan(request_)


def test_a_machine_that_is_off_has_no_memory() -> None:
    with pytest.raises(RefusedError, match="is off"):
        Machine().plan(SnapshotRequest("s9", memory=True))


# ---- going back ---------------------------------------------------------------------------------------------------


def remembering(*names: str, runs: bool = True) -> Machine:
    machine = Machine().run(SnapshotRequest("s1"), SnapshotRequest("s2"), BranchRequest("other", "s1"))
    machine.runs = runs
    return machine.remember(*names) if names else machine


def going(found: Plan) -> GoOver | None:
    return next((step for step in found.steps if isinstance(step, GoOver)), None)


def test_the_work_of_now_is_parked_with_memory_where_the_snapshot_has_some() -> None:
    found = remembering("s1").plan(RevertRequest("s1"))
    step = going(found)
    assert step is not None and step.load is not None and step.save is not None and step.after == "running"
    assert found.steps.index(step) == found.point_of_no_return - 1
    parked = found.after.branches["main.1"]
    assert parked.memory is not None and found.after.memories[parked.memory].path == step.save.path
    assert found.after.snapshots["s1"].memory == 1 and violations(found.after) == ()
    # It starts on the new line's tips, which stand on the snapshot's points.
    tip = found.after.branches["main"].tips["vda"].layer
    assert [number for number, _, _ in step.load.disks["vda"]] == [each.id for each in found.after.chain(tip)]


def saves(request: Request, *names: str, runs: bool = True) -> tuple[bool, bool, str]:
    """What is loaded, what is saved, and what the machine is then."""
    step = going(remembering(*names, runs=runs).plan(request))
    assert step is not None
    return step.load is not None, step.save is not None, step.after


def test_what_is_loaded_and_what_is_saved() -> None:
    assert saves(RevertRequest("s1", memory=True)) == (False, True, "running")
    assert saves(RevertRequest("s1", discard=True), "s1") == (True, False, "running")
    assert saves(RevertRequest("s1", power="paused"), "s1") == (True, True, "paused")
    assert saves(RevertRequest("s1", power="off"), "s1") == (False, True, "off")
    assert saves(RevertRequest("s1"), "s1", runs=False) == (True, False, "running")
    assert saves(SwitchRequest("other"), "other") == (True, True, "running")
    assert saves(SwitchRequest("other", memory=True)) == (False, True, "running")
    for request in (RevertRequest("s1", memory=False), SwitchRequest("other", memory=False)):
        assert going(remembering("s1", "other").plan(request)) is None
    for nothing in (RevertRequest("s1"), SwitchRequest("other")):
        assert going(remembering().plan(nothing)) is None


def test_a_memory_file_goes_with_the_last_that_refers_to_it() -> None:
    machine = remembering("s1", "other")

    def removed(request: Request) -> bool:
        return machine.runner.tree.memories[1].path in [
            step.path for step in machine.plan(request).steps if isinstance(step, Unlink)
        ]

    assert not removed(DeleteRequest(("s1",))) and not removed(DeleteBranchRequest("other"))
    assert not removed(SwitchRequest("other")) and not removed(RevertRequest("s1", discard=True, delete=True))
    machine = remembering("s1")
    assert removed(DeleteRequest(("s1",))) and removed(DeleteRequest(("s1",), memory_only=True))
    assert removed(RevertRequest("s1", discard=True, delete=True))
    machine = remembering("other")
    assert removed(SwitchRequest("other")) and removed(SwitchRequest("other", memory=False))


def test_memory_is_not_lost_by_the_way() -> None:
    with pytest.raises(RefusedError, match="would be lost"):
        remembering("other").plan(SwitchRequest("other", power="off"))


# ---- internal points ----------------------------------------------------------------------------------------------


def test_memory_and_an_internal_point_are_of_one_step() -> None:
    machine = running()
    found = machine.plan(SnapshotRequest("s9", True, memory=True))
    (save,) = [step for step in found.steps if isinstance(step, SaveMemory)]
    assert save.cuts == () and [mark.tag for mark in save.marks] == ["s9"]
    assert found.after.active_branch.tips == machine.runner.tree.active_branch.tips and violations(found.after) == ()
    (record,) = [step for step in found.steps if isinstance(step, Record)]
    # Without the memory all is as before.
    assert record.otherwise is not None and apply(machine.runner.tree, record.otherwise) == machine.runner.tree


def inside(*, runs: bool) -> Machine:
    """s1 with memory, an internal point of the tip."""
    machine = Machine().run(SnapshotRequest("s1", True), SnapshotRequest("s2", True))
    machine.runs = runs
    return machine.remember("s1")


@pytest.mark.parametrize("runs", [True, False])
def test_memory_is_loaded_on_a_new_tip_that_is_made_of_the_point(*, runs: bool) -> None:
    """The QEMU of now has the layer open, and the new one starts before the tree has changed."""
    machine = inside(runs=runs)
    found = machine.plan(RevertRequest("s1"))
    assert [step.kind for step in found.steps][:2] == ["build-from-point", "go-over"]
    before, after = machine.runner.tree, found.after
    assert after.branches["main.1"].tips == before.branches["main"].tips
    assert after.snapshots["s1"].points == before.snapshots["s1"].points and violations(after) == ()
    step = going(found)
    assert step is not None and step.load is not None
    assert step.load.disks["vda"][0][0] == after.branches["main"].tips["vda"].layer
    # Nothing of the old line is left but what a name needs.
    found = machine.plan(RevertRequest("s1", True, children=True, delete=True))
    assert violations(found.after) == () and len(found.after.layers) == 1
    assert set(found.after.branches) == {"main"} and not found.after.snapshots


def test_a_guests_tip_is_never_taken_for_unchanged_since_an_internal_point() -> None:
    """It may write after it was looked at; with the machine off one knows."""
    machine = Machine().run(SnapshotRequest("s1", True))
    tip = machine.runner.tree.active_branch.tips["vda"]
    image = machine.runner.disk.names[machine.runner.tree.layers[tip.layer].path]
    image.length, image.cells = image.internals["s1"]
    machine = machine.remember("s1")
    assert set(machine.plan(RevertRequest("s1", memory=False)).after.branches) == {"main"}
    machine.runs = True
    assert set(machine.plan(RevertRequest("s1")).after.branches) == {"main", "main.1"}
