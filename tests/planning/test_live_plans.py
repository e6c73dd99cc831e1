"""What is planned for a machine that runs: by QEMU what it has open, beside it what it has not."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from tests.kit.examples import Machine
from tests.kit.simulated import measured, survey

from snaptree.errors import RefusedError
from snaptree.model.invariants import violations
from snaptree.model.live import Live
from snaptree.planning.create import BranchRequest, SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.live import require_possible
from snaptree.planning.live_steps import LiveMerge, LiveOpen, LiveSnapshot, Mark
from snaptree.planning.naming import put_back, renamed_roots
from snaptree.planning.plan import Plan
from snaptree.planning.revert import SwitchRequest
from snaptree.planning.steps import BuildFromPoint, BuildMerged, DeleteInternal, Move, Repoint, TakeName
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
    # How QEMU has opened its images is not known here, so that they cannot be replaced under it.
    assert any(isinstance(step, LiveMerge) for step in steps) == (way not in ("none", "reflink"))
    assert violations(found.end) == ()
    assert found.public()["estimate"] is True
    if way not in ("none", "reflink"):
        # Names, and files that are not merged away, keep their paths.
        assert {each.path for each in found.end.layers.values()} < {
            each.path for each in line().runner.tree.layers.values()
        }


def sharing(*names: str, shares: bool = True) -> Machine:
    """A line whose blocks can be shared, under a QEMU that can be made to read a layer anew."""
    machine = Machine(shares=shares)
    machine.run(*(SnapshotRequest(name) for name in names))
    machine.reopens = True
    return running(machine)


@pytest.mark.parametrize("way", ["auto", "commit", "pull"])
def test_nothing_is_merged_in_disks_that_its_qemu_has_let_go_of(way: str) -> None:
    """So QEMU before 10.0 does with a guest that waits when its memory has been saved."""
    machine = line()
    machine.let_go = True
    found = machine.plan(DeleteRequest(("s2",), way))
    assert "live-merge" not in kinds(found) and "s2" not in found.end.snapshots
    assert any("when the guest runs, by gc" in note for each in found.every() for note in each.notes)


SWAP = ["build-merged", "live-swap", "put-in-place", "live-settle", "record", "unlink"]


def test_blocks_are_shared_under_it_where_they_can_be() -> None:
    found = sharing("s1", "s2", "s3").plan(DeleteRequest(("s2",)))
    assert kinds(found) == ["record", *SWAP] and found.public()["bytes_to_copy"] == 0
    (merge,) = found.then
    assert merge.steps[merge.point_of_no_return].kind == "put-in-place"
    assert violations(found.end) == ()
    for name in ("s1", "s2", "s3"):
        assert "live-swap" not in kinds(sharing("s1", "s2", "s3", shares=False).plan(DeleteRequest((name,))))
    # The root's name waits until the machine is off.
    machine = sharing("s1", "s2")
    found = machine.plan(DeleteRequest(("s1",)))
    assert kinds(found) == ["record", *SWAP] and violations(found.end) == ()
    assert any("when the machine has stopped" in note for each in found.every() for note in each.notes)
    assert found.end.roots == machine.runner.tree.roots
    assert list(renamed_roots(found.end)) == ["vda"] and not renamed_roots(machine.runner.tree)


def test_the_guest_goes_on_beside_its_tip_while_blocks_are_shared_with_it() -> None:
    machine = sharing("s1", "s2")
    found = machine.plan(DeleteRequest(("s2",), "reflink"))
    freeze = ["make-overlay", "live-snapshot", "record"]
    back = ["record", "live-merge", "record", "unlink"]
    assert kinds(found) == ["record", *freeze, *SWAP, *back]
    assert all(violations(each.after) == () for each in found.every())
    assert found.end.active_branch.tips == machine.runner.tree.active_branch.tips
    # A little is rather copied than that the guest goes over and back.
    assert "live-swap" not in kinds(machine.plan(DeleteRequest(("s2",))))


def test_roots_get_their_names_back() -> None:
    machine = sharing("s1", "s2")
    tree = machine.plan(DeleteRequest(("s1",))).end
    root = renamed_roots(tree)["vda"]
    given_up = put_back(tree, survey(machine.runner.disk, tree, 9))
    assert given_up is not None and kinds(given_up) == ["record"] and given_up.after.roots["vda"][0] == root.path
    del machine.runner.disk.names[tree.roots["vda"][0]]
    found = put_back(tree, survey(machine.runner.disk, tree, 9))
    assert found is not None
    assert kinds(found) == ["take-name", "repoint", "record", "unlink"]
    assert found.after.layers[root.id].path == tree.roots["vda"][0] and not renamed_roots(found.after)
    assert put_back(found.after, survey(machine.runner.disk, tree, 9)) is None


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


def test_other_branches_on_what_goes_down_are_pointed_anew() -> None:
    """QEMU writes the header of what it has open on it, and of nothing else."""
    forked = Machine().run(SnapshotRequest("s1"), SnapshotRequest("s2"), BranchRequest("other", "s2"))
    found = running(forked).plan(DeleteRequest(("s1",), "commit"))
    assert "live-merge" in kinds(found)
    paths = [step.path for each in found.every() for step in each.steps if isinstance(step, Repoint)]
    other = found.end.branches["other"].tips["vda"].layer
    assert paths == [found.end.layers[other].path]
    assert found.end.layers[other].parent == found.end.snapshots["s2"].points["vda"].layer


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
    with pytest.raises(RefusedError, match="web1"):
        require_possible("web1", RemoveRequest())


def test_what_a_merge_would_have_qemu_forget_is_not_merged_so() -> None:
    """A dirty bitmap is its node's, and a backup program relies on it."""
    machine = sharing("s1", "s2", "s3")
    tree = machine.runner.tree
    tip = tree.active_branch.tips["vda"].layer
    middle = next(each.id for each in list(tree.chain(tip))[1:])
    assert "live-merge" in kinds(machine.plan(DeleteRequest(("s3",), "pull")))
    machine.tracked = frozenset({tip})
    found = machine.plan(DeleteRequest(("s3",), "commit"))
    assert kinds(found) == ["record"]
    assert any("dirty bitmaps" in note for each in found.every() for note in each.notes)
    # A pull leaves the highest layer's node where it is.
    assert "live-merge" in kinds(machine.plan(DeleteRequest(("s3",), "pull")))
    machine.tracked = frozenset({middle})
    assert kinds(machine.plan(DeleteRequest(("s3",), "reflink"))) == ["record"]


# ---- internal points ----------------------------------------------------------------------------------------------


def inner(*internal: int, count: int = 3) -> Machine:
    """A line in which some are internal, of a machine that runs."""
    numbers = range(1, count + 1)
    return running(Machine().run(*(SnapshotRequest(f"s{number}", number in internal) for number in numbers)))


def test_an_internal_point_is_taken_by_qemu_in_the_tip() -> None:
    machine = line()
    found = machine.plan(SnapshotRequest("i1", True))
    (step,) = [step for step in found.steps if isinstance(step, LiveSnapshot)]
    tip = machine.runner.tree.layers[machine.runner.tree.active_branch.tips["vda"].layer]
    assert kinds(found) == ["live-snapshot", "record"] and found.point_of_no_return == 1
    assert step.cuts == () and step.marks == (Mark("vda", tip.path, "i1"),)
    assert found.after.active_branch.tips == machine.runner.tree.active_branch.tips
    assert found.public()["guest_pause"] > 0 and violations(found.after) == ()


def test_one_is_deleted_by_qemu_where_it_has_the_layer_open() -> None:
    """It is seen that QEMU can write to a layer that it only reads before the name goes."""
    found = inner(3).plan(DeleteRequest(("s3",)))
    assert kinds(found) == ["record", "delete-internal"] and found.point_of_no_return == 0
    found = inner(2).plan(DeleteRequest(("s2",)))
    assert kinds(found) == ["live-open", "record", "delete-internal"] and found.point_of_no_return == 1
    opened, deleted = found.steps[0], found.steps[2]
    assert isinstance(opened, LiveOpen) and isinstance(deleted, DeleteInternal) and opened.paths == (deleted.path,)
    # What it has not open is nobody's.
    forked = Machine().run(SnapshotRequest("s1"), BranchRequest("other", "s1"), SwitchRequest("other"))
    forked.run(SnapshotRequest("o1", True), SwitchRequest("main"))
    assert kinds(running(forked).plan(DeleteRequest(("o1",)))) == ["record", "delete-internal"]


def test_what_is_merged_beside_internal_points() -> None:
    # s1 in the root, s2 and s3 external ones above it.
    machine = inner(1)
    assert [step.jobs[0].way for each in machine.plan(DeleteRequest(("s2",))).every() for step in each.steps
            if isinstance(step, LiveMerge)] == ["commit"]  # fmt: skip
    found = machine.plan(DeleteRequest(("s2",), "pull"))
    assert [step.kind for each in found.every() for step in each.steps if isinstance(step, LiveMerge)] == ["live-merge"]
    assert "/disks/web1.qcow2" in {layer.path for layer in found.end.layers.values()} and violations(found.end) == ()
    # One in the tip, which stays on what it stands on.
    for way in ("auto", "commit", "pull", "reflink"):
        found = inner(3).plan(DeleteRequest(("s2",), way))
        assert kinds(found) == ["record"]


def test_a_new_layer_is_made_of_a_point_that_qemu_has_open() -> None:
    found = inner(3).plan(BranchRequest("new", "s3"))
    assert [step.tag for step in found.steps if isinstance(step, BuildFromPoint)] == ["s3"]
    assert violations(found.after) == ()


def test_a_pull_across_sizes_is_not_to_be_had_by_asking() -> None:
    """A raw root stays raw unless a pull is asked for: that it would show other data is another matter."""
    machine = Machine(raw=True).run(SnapshotRequest("s1"))
    tip = machine.runner.tree.active_branch.tips["vda"].layer
    assert "live-merge" in kinds(running(machine).plan(DeleteRequest(("s1",), "pull")))
    machine.runner.disk.names[machine.runner.tree.layers[tip].path].length += 2
    found = running(machine).plan(DeleteRequest(("s1",), "pull"))
    assert kinds(found) == ["record"]
    assert any("different sizes" in note for each in found.every() for note in each.notes)
