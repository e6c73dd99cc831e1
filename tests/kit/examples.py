"""An example of each kind of operation on each shape of tree, planned on simulated images, for the documents."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from msgspec.structs import replace
from tests.kit.simulated import CELL, Disk, Image, Runner, measured, measured_point, survey

from snaptree.model.branch import Branch
from snaptree.model.domain import Domain, Hints
from snaptree.model.layer import Layer, Point
from snaptree.model.live import Live
from snaptree.model.machine import MachineConfig
from snaptree.model.memory import Memory, Saveable
from snaptree.model.survey import LayerFacts, Start, Stray, Survey
from snaptree.model.tree import Tree
from snaptree.planning.accept import AcceptRequest, OwnRequest
from snaptree.planning.adopt import AddRequest, AttachRequest, DetachRequest, FoundDisk, add
from snaptree.planning.create import BranchRequest, SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.domain_plan import for_domain
from snaptree.planning.domain_steps import WriteRecords
from snaptree.planning.plan import Plan
from snaptree.planning.revert import RevertRequest, SwitchRequest
from snaptree.planning.sweep import SquashRequest
from snaptree.planning.unmeasured import Unmeasured
from snaptree.planning.verbs import (
    DeleteBranchRequest,
    GcRequest,
    PutBackRequest,
    RemoveRequest,
    RenameRequest,
    RepairRequest,
    Request,
    SetRequest,
    plan,
)

LENGTH = 8
Asked: TypeAlias = Request | AddRequest
Example: TypeAlias = tuple[str, "Machine", Asked]
"""What it is about, the machine as it is found, and what is asked for."""


class Machine:
    """``web1`` with the disk ``vda``."""

    def __init__(self, *, shares: bool = False, raw: bool = False, own: bool = True) -> None:
        disk = Disk(shares=shares, own=own)
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
        self.firmware: Mapping[str, str] = {}
        """Where its firmware state is, by role."""
        self.strays: tuple[Stray, ...] = ()
        """Files beside its layers that the tree does not know."""
        self.going: frozenset[tuple[str, str]] = frozenset()
        """Internal snapshots that libvirt could not delete while it ran, by path and tag."""

    def survey(self) -> Survey:
        """What is read of it."""
        disk, tree = self.runner.disk, self.runner.tree
        found = survey(disk, tree, self.number)
        found = replace(found, firmware=self.firmware, keep="/firmware", strays=self.strays)
        if self.runs:
            opened = frozenset(each.id for tip in tree.active_branch.tips.values() for each in tree.chain(tip.layer))
            live = Live("running", 1, opened, tracked=self.tracked, memory=self.memory, let_go=self.let_go)
            live = replace(live, transient=self.transient)
            if self.reopens:
                live = replace(live, commands=frozenset({"blockdev-reopen"}), reopenable=opened)
            found = replace(found, running=True, live=live)
        start = Start("qemu-system-x86_64 -m 1024", "/", "/disks/web1.sock")
        return replace(found, start=start, monitor=start.monitor, libvirt=self.libvirt)

    def plan(self, request: Request) -> Plan:
        """The plan for the request, on the files as they are."""
        disk, tree, found = self.runner.disk, self.runner.tree, self.survey()
        while True:
            try:
                return plan(tree, found, request)
            except Unmeasured as error:
                rows = {row: measured(disk, tree, row) for row in error.rows}
                points = {each: measured_point(disk, tree, each) for each in error.points}
                found = replace(found, rows={**found.rows, **rows}, points={**found.points, **points})

    def carried_out(self, request: Asked) -> Plan:
        """The plan as it is carried out, by libvirt and with what that is told where it has the machine."""
        if isinstance(request, AddRequest):
            return add(self.survey(), request)
        found = self.plan(request)
        if not self.libvirt:
            return found
        tell = WriteRecords("qemu:///system", "web1's")
        domain = Domain("web1", tell.uuid, tell.uri, "off", hints=Hints(going=self.going))
        return for_domain(found, request, self.runner.tree, self.survey(), tell, domain)

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

    def resize(self, cells: int) -> Machine:
        """Make the disk longer, or shorter."""
        self.tip.length += cells
        return self

    @property
    def tip(self) -> Image:
        """The image that the guest writes to."""
        tree = self.runner.tree
        return self.runner.disk.names[tree.layers[tree.active_branch.tips["vda"].layer].path]

    def write(self) -> None:
        """The guest writes."""
        self.number += 1
        image = self.tip
        image.cells[self.number % LENGTH] = self.number
        image.version += 1


def _line(*internal: int, shares: bool = False) -> Machine:
    return Machine(shares=shares).run(*(SnapshotRequest(f"s{number}", number in internal) for number in (1, 2, 3)))


def _fork(*, shares: bool = False) -> Machine:
    return _line(shares=shares).run(BranchRequest("other", "s1"))


def _loose() -> Machine:
    """Layers that nothing has a name for."""
    return _line().run(DeleteRequest(("s1", "s2", "s3"), "none"))


def _resized(cells: int) -> Machine:
    """A disk whose size changed before the second snapshot, in images that only QEMU merges."""
    return Machine(own=False).run(SnapshotRequest("s1")).resize(cells).run(SnapshotRequest("s2"))


def _two() -> Machine:
    """A machine with a second disk."""
    machine = Machine()
    machine.runner.disk.make("/disks/data.qcow2", "qcow2", None, LENGTH)
    return machine.run(AttachRequest(FoundDisk("vdb", (_facts("/disks/data.qcow2"),))))


def _facts(path: str) -> LayerFacts:
    return LayerFacts(path, virtual_size=LENGTH * CELL)


def _found(machine: Machine, *, adopt: bool = False) -> AddRequest:
    """The files of the machine, as they are found by who adds it; with ``adopt`` all that the disk stands on is its
    own, and other overlays on that are branches."""
    tree, facts = machine.runner.tree, machine.survey().layers
    chains = {
        name: tuple(facts[each.id] for each in tree.chain(line.tips["vda"].layer))
        for name, line in tree.branches.items()
    }
    disk = FoundDisk("vda", chains.pop(tree.active), tuple(chains.values()) if adopt else ())
    return AddRequest(MachineConfig("web1"), (disk,), adopt)


def _live(machine: Machine) -> Machine:
    """The same machine, running."""
    machine.runs = True
    machine.runner.start()
    return machine


def _reopening(machine: Machine) -> Machine:
    """The same machine, running, and its QEMU can be made to read a layer anew."""
    machine.reopens = True
    return _live(machine)


def _without_its_name() -> Machine:
    """A machine that has stopped, whose root was merged into another file while it ran."""
    machine = _reopening(_line(shares=True)).run(DeleteRequest(("s1",), "reflink"))
    machine.runs = False
    machine.runner.stop()
    return machine


def _firm(*requests: Request) -> Machine:
    """A machine with UEFI variables."""
    machine = Machine()
    machine.firmware = {"nvram": "/disks/web1.fd"}
    return machine.run(*requests)


def _changed() -> Machine:
    """A machine of which somebody has written to a layer that is frozen."""
    machine = _line()
    machine.runner.disk.names["/disks/web1.s1.qcow2"].version += 1
    return machine


def _littered() -> Machine:
    """A machine beside which there is a file of snaptree's that nothing needs."""
    machine = _line()
    machine.strays = (Stray("/disks/web1.old.qcow2", 1, 99, CELL, made=True),)
    return machine


def _domain(machine: Machine) -> Machine:
    """The same machine, where libvirt has it."""
    machine.libvirt = True
    return machine


def _foreign() -> Machine:
    """A domain whose disk stands on what is not known to be its own."""
    machine = _domain(Machine().run(SnapshotRequest("s1"), DeleteRequest(("s1",), "none")))
    tree = machine.runner.tree
    machine.runner.tree = tree.with_layers(replace(tree.layers[1], owned=False, identity=None))
    return machine


def _left_over() -> Machine:
    """A domain that is off, with an internal snapshot whose name went while it ran."""
    machine = _domain(Machine().run(SnapshotRequest("s1")))
    machine.tip.internals["old"] = (LENGTH, {})
    machine.going = frozenset({("/disks/web1.s1.qcow2", "old")})
    return machine


def _snapshots() -> Iterator[Example]:
    yield "snapshot", Machine(), SnapshotRequest("s1")
    yield "snapshot, internal", Machine(), SnapshotRequest("s1", True)
    yield "snapshot with firmware state", _firm(), SnapshotRequest("s1")
    yield "snapshot of a running machine", _live(Machine()), SnapshotRequest("s1")
    yield "snapshot --quiesce of a running machine", _live(Machine()), SnapshotRequest("s1", quiesce=True)
    yield "snapshot of a running machine, internal", _live(Machine()), SnapshotRequest("s1", True)
    yield "snapshot of a running machine with firmware state", _live(_firm()), SnapshotRequest("s1")
    yield "snapshot with memory", _live(Machine()), SnapshotRequest("s1", memory=True)
    yield "snapshot with memory, internal", _live(Machine()), SnapshotRequest("s1", True, memory=True)


def _deletions() -> Iterator[Example]:
    yield "delete the middle of a line while it runs", _live(_line()), DeleteRequest(("s2",))
    yield "delete the last of a line while it runs", _live(_line()), DeleteRequest(("s3",))
    yield "delete all of a line while it runs", _live(_line()), DeleteRequest(("s1", "s2", "s3"))
    yield "delete an internal snapshot below while it runs", _live(_line(2)), DeleteRequest(("s2",))
    shared = "while it runs, by sharing blocks"
    yield f"delete the middle of a line {shared}", _reopening(_line(shares=True)), DeleteRequest(("s2",), "reflink")
    yield f"delete the last of a line {shared}", _reopening(_line(shares=True)), DeleteRequest(("s3",), "reflink")
    yield "delete the first of a line, by commit", _line(), DeleteRequest(("s1",), "commit")
    yield "delete the first of a line, by pull", _line(), DeleteRequest(("s1",), "pull")
    yield "delete the middle of a line, by commit", _line(), DeleteRequest(("s2",), "commit")
    yield "delete the middle of a line, by pull", _line(), DeleteRequest(("s2",), "pull")
    yield "delete the middle of a line, by sharing blocks", _line(shares=True), DeleteRequest(("s2",), "reflink")
    yield "delete where the disk has grown, by QEMU's commit", _resized(2), DeleteRequest(("s1",), "commit")
    yield "delete where the disk has shrunk, by QEMU's commit", _resized(-2), DeleteRequest(("s1",), "commit")
    forked = "delete at a fork, a copy of its own for each, by sharing blocks"
    yield forked, _fork(shares=True), DeleteRequest(("s1",), "reflink")
    yield "delete several", _line(), DeleteRequest(("s1", "s2", "s3"))
    yield "delete at a fork", _fork(), DeleteRequest(("s1",))
    yield "delete, only forgetting the name", _line(), DeleteRequest(("s2",), "none")
    yield "delete an internal snapshot", _line(1, 2, 3), DeleteRequest(("s2",))
    yield "delete a snapshot with firmware state", _firm(SnapshotRequest("s1")), DeleteRequest(("s1",))
    yield "delete a snapshot with memory", _line().remember("s2"), DeleteRequest(("s2",))
    yield "delete --memory-only", _line().remember("s2"), DeleteRequest(("s2",), memory_only=True)
    yield "delete a branch", _fork(), DeleteBranchRequest("other")
    parked = _firm(SnapshotRequest("s1"), BranchRequest("other")).remember("other")
    yield "delete a branch with firmware state and memory", parked, DeleteBranchRequest("other")


def _going_back() -> Iterator[Example]:
    yield "revert", _line(), RevertRequest("s2")
    yield "revert --discard", _line(), RevertRequest("s2", True)
    yield "revert --discard --delete", _line(), RevertRequest("s3", True, delete=True)
    yield "revert with firmware state", _firm(SnapshotRequest("s1")), RevertRequest("s1")
    yield "revert to memory while it runs", _live(_line()).remember("s2"), RevertRequest("s2")
    dropped = "revert --discard --delete to memory while it runs"
    yield dropped, _live(_line()).remember("s3"), RevertRequest("s3", True, delete=True)
    inner = "revert to memory with an internal point while it runs"
    yield inner, _live(_line(1, 2, 3)).remember("s2"), RevertRequest("s2")
    firm = _live(_firm(SnapshotRequest("s1"))).remember("s1")
    yield "revert to memory with firmware state while it runs", firm, RevertRequest("s1")
    yield "revert to memory when it is off", _line().remember("s2"), RevertRequest("s2")
    yield "revert --memory while it runs, to a snapshot without", _live(_line()), RevertRequest("s2", memory=True)
    yield "revert to an internal snapshot of the tip", _line(1, 2, 3), RevertRequest("s2")
    yield "revert to an internal snapshot below", _line(2), RevertRequest("s2")
    yield "branch", _line(), BranchRequest("new", "s1")
    yield "branch from an internal snapshot", _line(2), BranchRequest("new", "s2")
    yield "branch from here while it runs", _live(_line()), BranchRequest("new")
    yield "switch", _fork(), SwitchRequest("other")
    yield "switch to a branch with memory while it runs", _live(_fork()).remember("other"), SwitchRequest("other")
    yield "rename", _line(), RenameRequest("s1", "new")


def _upkeep() -> Iterator[Example]:
    yield "add", _line(), _found(_line())
    yield "add --adopt", _fork(), _found(_fork(), adopt=True)
    yield "set", _line(), SetRequest(MachineConfig("web1", start="qemu-system-x86_64 -m 2048"))
    yield "disk attach", _line(), AttachRequest(FoundDisk("vdb", (_facts("/disks/data.qcow2"),)))
    yield "disk detach", _two(), DetachRequest("vdb")
    yield "disk detach, when a snapshot has the disk as well", _two().run(SnapshotRequest("s1")), DetachRequest("vdb")
    yield "disk detach --delete-files", _two(), DetachRequest("vdb", True)
    yield "verify --accept", _changed(), AcceptRequest("/disks/web1.s1.qcow2")
    yield "squash", _loose(), SquashRequest("vda")
    yield "gc", _loose(), GcRequest()
    yield "gc --delete", _littered(), GcRequest(True)
    yield "stop, when a root waits for its name", _without_its_name(), PutBackRequest()
    yield "remove", _line(), RemoveRequest()
    yield "remove --delete-files", _line(), RemoveRequest(True)
    remembering = _firm(SnapshotRequest("s1")).remember("s1")
    yield "remove --delete-files, with firmware state and memory", remembering, RemoveRequest(True)


def _domains() -> Iterator[Example]:
    """Of libvirt's."""
    off, on = "of a libvirt domain", "of a libvirt domain that runs"
    yield f"snapshot {off}", _domain(Machine()), SnapshotRequest("s1")
    yield f"snapshot {on}", _domain(_live(Machine())), SnapshotRequest("s1")
    yield f"snapshot {on}, internal, with memory", _domain(_live(Machine())), SnapshotRequest("s1", True, memory=True)
    yield f"snapshot with memory {on}", _domain(_live(Machine())), SnapshotRequest("s1", memory=True)
    yield f"delete the middle of a line {off}", _domain(_line()), DeleteRequest(("s2",))
    yield f"delete the middle of a line {on}", _domain(_live(_line())), DeleteRequest(("s2",))
    shared = f"{on}, by sharing blocks"
    yield f"delete the middle of a line {shared}", _domain(_live(_line(shares=True))), DeleteRequest(("s2",), "reflink")
    yield f"delete the last of a line {shared}", _domain(_live(_line(shares=True))), DeleteRequest(("s3",), "reflink")
    yield f"delete an internal snapshot {on}", _domain(_live(_line(1, 2, 3))), DeleteRequest(("s2",))
    yield f"delete an internal snapshot below the tip {on}", _domain(_live(_line(2))), DeleteRequest(("s2",))
    yield f"revert {off}", _domain(_line()), RevertRequest("s2")
    yield f"revert to memory {on}", _domain(_live(_line()).remember("s2")), RevertRequest("s2")
    yield f"switch to a branch with memory {on}", _domain(_live(_fork()).remember("other")), SwitchRequest("other")
    yield (
        f"revert --stopped to a snapshot with memory {on}",
        _domain(_live(_line()).remember("s2")),
        RevertRequest("s2", power="off"),
    )
    yield f"rename {off}", _domain(_line()), RenameRequest("s1", "new")
    yield f"set --adopt {off}", _foreign(), OwnRequest()
    yield f"verify --repair {off}", _domain(_line()), RepairRequest()
    yield f"gc {off}, with what had to wait while it ran", _left_over(), GcRequest()
    yield f"remove {off}", _domain(_line()), RemoveRequest()
    yield f"remove --delete-files {off}", _domain(_line()), RemoveRequest(True)


def examples() -> Iterator[tuple[str, Asked, Plan]]:
    """What it is about, what is asked for, and the plan as it is carried out."""
    for each in (_snapshots, _deletions, _going_back, _upkeep, _domains):
        for title, machine, request in each():
            yield title, request, machine.carried_out(request)
