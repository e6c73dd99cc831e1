"""Plans for memory: what is refused beforehand, and what the tree is when the memory could not be saved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.kit.examples import Machine

from snaptree.errors import NoSpaceError, RefusedError, SnaptreeError, UsageError
from snaptree.model.delta import apply
from snaptree.model.invariants import violations
from snaptree.planning.create import SnapshotRequest
from snaptree.planning.memory_steps import SaveMemory
from snaptree.planning.settle import loose_layers
from snaptree.planning.steps import Record


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
        (SnapshotRequest("s9", memory=True, internal=True), {}, UsageError),
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
