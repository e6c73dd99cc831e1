"""An example of each kind of operation on each shape of tree, planned on simulated images, for the documents."""

from __future__ import annotations

import random
from collections.abc import Iterator

from msgspec.structs import replace
from tests.kit.simulated import CELL, Disk, Runner, measured, measured_point, survey

from snaptree.model.branch import Branch
from snaptree.model.layer import Layer, Point
from snaptree.model.live import Live
from snaptree.model.memory import Memory, Saveable
from snaptree.model.survey import Start
from snaptree.model.tree import Tree
from snaptree.planning.create import BranchRequest, SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.domain_steps import WriteRecords, with_records
from snaptree.planning.plan import Plan
from snaptree.planning.revert import RevertRequest, SwitchRequest
from snaptree.planning.sweep import SquashRequest
from snaptree.planning.unmeasured import Unmeasured
from snaptree.planning.verbs import DeleteBranchRequest, GcRequest, RemoveRequest, RenameRequest, Request, plan

LENGTH = 8


class Machine:
    """``web1`` with the disk ``vda``."""

    def __init__(self, *, shares: bool = False, raw: bool = False) -> None:
        disk = Disk(shares=shares, own=True)
        path, form = ("/disks/web1.raw", "raw") if raw else ("/disks/web1.qcow2", "qcow2")
        image = disk.make(path, form, None, LENGTH)
        image.cells = {0: 1, 1: 1}
        root = Layer(1, "vda", path, form, None, True, LENGTH * CELL)
        main = Branch("main", None, {"vda": Point(1)}, 0.0)
        tree = Tree("web1", "main", branches={"main": main}, roots={"vda": (root.path, root.format)}).with_layers(root)
        self.runner = Runner(disk, tree, random.Random(0), lambda: None)
        self.number = 1
        self.runs = False
        self.reopens = False
        """Whether the QEMU that runs it can be made to read a layer anew."""
        self.let_go = False
        """Whether it has let go of the disks, having saved the memory."""
        self.libvirt = False
        """Whether libvirt has it."""
        self.transient = False
        """Whether libvirt forgets it when it ends."""
        self.memory = Saveable(1 << 30, 1 << 28, {"RAM": f"{1 << 30} bytes"}, ("background", "mapped-ram", "plain"))
        self.tracked: frozenset[int] = frozenset()
        """The layers of which it keeps dirty bitmaps."""

    def plan(self, request: Request) -> Plan:
        """The plan for the request, on the files as they are."""
        disk, tree = self.runner.disk, self.runner.tree
        found = survey(disk, tree, self.number)
        if self.runs:
            opened = frozenset(each.id for tip in tree.active_branch.tips.values() for each in tree.chain(tip.layer))
            live = Live("running", 1, opened, tracked=self.tracked, memory=self.memory, let_go=self.let_go)
            live = replace(live, transient=self.transient)
            if self.reopens:
                live = replace(live, commands=frozenset({"blockdev-reopen"}), reopenable=opened)
            found = replace(found, running=True, live=live)
        start = Start("qemu-system-x86_64 -m 1024", "/", "/disks/web1.sock")
        found = replace(found, start=start, monitor=start.monitor, libvirt=self.libvirt)
        while True:
            try:
                return plan(tree, found, request)
            except Unmeasured as error:
                rows = {row: measured(disk, tree, row) for row in error.rows}
                points = {each: measured_point(disk, tree, each) for each in error.points}
                found = replace(found, rows={**found.rows, **rows}, points={**found.points, **points})

    def run(self, *requests: Request) -> Machine:
        """Carry the requests out, with writing after each."""
        for request in requests:
            for each in self.plan(request).every():
                self.runner.run(each)
            self.write()
        return self

    def remember(self, *names: str) -> Machine:
        """Let snapshots or branches have memory, one file for all of them."""
        tree = self.runner.tree
        memory = Memory(1, f"/disks/web1.{names[0]}.memory", "background", 1 << 28, needs=self.memory.needs)
        tree = replace(tree, memories={1: memory})
        tree = tree.with_snapshots(*(replace(one, memory=1) for each, one in tree.snapshots.items() if each in names))
        tree = tree.with_branches(*(replace(one, memory=1) for each, one in tree.branches.items() if each in names))
        self.runner.tree = tree
        return self

    def write(self) -> None:
        """The guest writes."""
        tree = self.runner.tree
        self.number += 1
        image = self.runner.disk.names[tree.layers[tree.active_branch.tips["vda"].layer].path]
        image.cells[self.number % LENGTH] = self.number
        image.version += 1


def _line(*internal: int, shares: bool = False) -> Machine:
    return Machine(shares=shares).run(*(SnapshotRequest(f"s{number}", number in internal) for number in (1, 2, 3)))


def _fork(*, shares: bool = False) -> Machine:
    return _line(shares=shares).run(BranchRequest("other", "s1"))


def _live(machine: Machine) -> Machine:
    """The same machine, running."""
    machine.runs = True
    return machine


def examples() -> Iterator[tuple[str, Plan]]:
    """What it is about, and the plan."""
    yield "snapshot", Machine().plan(SnapshotRequest("s1"))
    yield "snapshot, internal", Machine().plan(SnapshotRequest("s1", True))
    yield "snapshot of a running machine", _live(Machine()).plan(SnapshotRequest("s1"))
    yield "snapshot of a running machine, internal", _live(Machine()).plan(SnapshotRequest("s1", True))
    yield "snapshot with memory", _live(Machine()).plan(SnapshotRequest("s1", memory=True))
    yield "snapshot with memory, internal", _live(Machine()).plan(SnapshotRequest("s1", True, memory=True))
    yield "delete the middle of a line while it runs", _live(_line()).plan(DeleteRequest(("s2",)))
    yield "delete the last of a line while it runs", _live(_line()).plan(DeleteRequest(("s3",)))
    yield "delete all of a line while it runs", _live(_line()).plan(DeleteRequest(("s1", "s2", "s3")))
    yield "delete an internal snapshot below while it runs", _live(_line(2)).plan(DeleteRequest(("s2",)))
    yield "delete the first of a line, by commit", _line().plan(DeleteRequest(("s1",), "commit"))
    yield "delete the first of a line, by pull", _line().plan(DeleteRequest(("s1",), "pull"))
    yield "delete the middle of a line, by commit", _line().plan(DeleteRequest(("s2",), "commit"))
    yield "delete the middle of a line, by pull", _line().plan(DeleteRequest(("s2",), "pull"))
    yield "delete the middle of a line, by sharing blocks", _line(shares=True).plan(DeleteRequest(("s2",), "reflink"))
    forked = _fork(shares=True).plan(DeleteRequest(("s1",), "reflink"))
    yield "delete at a fork, a copy of its own for each, by sharing blocks", forked
    yield "delete several", _line().plan(DeleteRequest(("s1", "s2", "s3")))
    yield "delete at a fork", _fork().plan(DeleteRequest(("s1",)))
    yield "delete, only forgetting the name", _line().plan(DeleteRequest(("s2",), "none"))
    yield "delete an internal snapshot", _line(1, 2, 3).plan(DeleteRequest(("s2",)))
    yield "delete a branch", _fork().plan(DeleteBranchRequest("other"))
    yield "revert", _line().plan(RevertRequest("s2"))
    yield "revert --discard", _line().plan(RevertRequest("s2", True))
    yield "revert --discard --delete", _line().plan(RevertRequest("s3", True, delete=True))
    yield "revert to memory while it runs", _live(_line()).remember("s2").plan(RevertRequest("s2"))
    dropped = _live(_line()).remember("s3").plan(RevertRequest("s3", True, delete=True))
    yield "revert --discard --delete to memory while it runs", dropped
    inner = _live(_line(1, 2, 3)).remember("s2").plan(RevertRequest("s2"))
    yield "revert to memory with an internal point while it runs", inner
    yield "revert to an internal snapshot of the tip", _line(1, 2, 3).plan(RevertRequest("s2"))
    yield "revert to an internal snapshot below", _line(2).plan(RevertRequest("s2"))
    yield "branch", _line().plan(BranchRequest("new", "s1"))
    yield "branch from here while it runs", _live(_line()).plan(BranchRequest("new"))
    yield "switch", _fork().plan(SwitchRequest("other"))
    yield "rename", _line().plan(RenameRequest("s1", "new"))
    loose = _line().run(DeleteRequest(("s1", "s2", "s3"), "none"))
    yield "squash", loose.plan(SquashRequest("vda"))
    yield "gc", loose.plan(GcRequest())
    yield "remove --delete-files", _line().plan(RemoveRequest(True))
    tell = WriteRecords("qemu:///system", "the domain")
    yield "snapshot of a libvirt domain", with_records(Machine().plan(SnapshotRequest("s1")), tell)
    yield "delete the middle of a line of a libvirt domain", with_records(_line().plan(DeleteRequest(("s2",))), tell)
    domain = _live(_line(shares=True))
    domain.libvirt = True
    copied = domain.plan(DeleteRequest(("s2",), "reflink"))
    yield "delete the middle of a line of a libvirt domain that runs, by sharing blocks", with_records(copied, tell)
