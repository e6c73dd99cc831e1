"""A machine with real images, and what each of its points in time must show."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kit import images

from snaptree.errors import CancelledError
from snaptree.images.locks import probe, who_has_open
from snaptree.machines.connection import Connection
from snaptree.machines.options import AddOptions, DiskOption
from snaptree.machines.standalone import Standalone
from snaptree.model.invariants import violations
from snaptree.model.tree import Tree
from snaptree.planning.adopt import AttachRequest, DetachRequest
from snaptree.planning.create import BranchRequest, SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.merged import to_be_known
from snaptree.planning.plan import Plan
from snaptree.planning.revert import RevertRequest, SwitchRequest
from snaptree.planning.steps import Move, MoveJob
from snaptree.planning.verbs import DeleteBranchRequest, RenameRequest, Request
from snaptree.running.progress import Report

Disks = dict[str, bytes]
Pieces = dict[str, dict[str, bytes]]
"""Firmware state: the files of each piece."""
FEW = 4 << 20


@dataclass
class World:
    """A machine on real images in a folder of its own, and the bytes that each name must show on each disk.

    ``truth`` has the contents by name (of a snapshot or branch) and disk. ``foreign`` are files that no operation may
    touch, with their contents as files.
    """

    folder: Path
    name: str = "web1"
    truth: dict[str, Disks] = field(default_factory=dict)
    foreign: dict[Path, bytes] = field(default_factory=dict)
    known: dict[tuple[object, ...], bytes] = field(default_factory=dict)
    sound: dict[str, tuple[int | bytes, ...]] = field(default_factory=dict)
    elsewhere: Path | None = None
    """Where the state folder lies, if not beside the images."""
    firmware: dict[str, Pieces] = field(default_factory=dict)
    """The firmware state that goes with each snapshot and each branch but the active one, which has the live state."""
    live: Pieces = field(default_factory=dict)
    extra: set[str] = field(default_factory=set)
    """Files beside the layers that are there by right: what a detached disk left, say."""

    def __post_init__(self) -> None:
        self.images = self.folder / "images"
        self.images.mkdir(exist_ok=True, parents=True)
        self.state = self.elsewhere or self.folder / "state"

    # ---- the machine ----------------------------------------------------------------------------------------------

    @property
    def connection(self) -> Connection:
        return Connection(str(self.state))

    @property
    def machine(self) -> Standalone:
        return self.connection.standalone(self.name)

    @property
    def tree(self) -> Tree:
        return self.machine.tree()

    @property
    def active(self) -> str:
        return self.tree.active

    def add(self, disks: Mapping[str, tuple[Path, str]], **options: Any) -> Plan:
        """Look after the disks; what they show now is the truth of ``main``. Options as ``AddOptions`` has them."""
        chosen = tuple(DiskOption(disk, str(path), form) for disk, (path, form) in disks.items())
        plan = self.connection.add(AddOptions(self.name, chosen, **options))
        for name, each in [*self.tree.snapshots.items(), *self.tree.branches.items()]:
            points = getattr(each, "points", None) or getattr(each, "tips", {})
            self.truth[name] = {disk: self.shown(self.tree, disk, name) for disk in points}
        return plan

    def tip(self, disk: str, branch: str | None = None) -> tuple[Path, str]:
        """Path and format of a branch's tip."""
        tree = self.tree
        layer = tree.layers[tree.branches[branch or tree.active].tips[disk].layer]
        return Path(layer.path), layer.format

    def write(self, disk: str, *commands: str) -> None:
        """The guest writes: qemu-io's commands on the active tip."""
        path, form = self.tip(disk)
        images.io(path, form, *commands)
        self.reread(disk)

    def reread(self, disk: str) -> None:
        """Take what the active tip shows now for the truth."""
        path, form = self.tip(disk)
        self.truth[self.active][disk] = images.read(path, form)

    def reread_firmware(self) -> None:
        """Take the live firmware state for the truth."""
        self.live = {role: files_of(Path(path)) for role, path in self.machine.config.firmware}

    # ---- verbs, and what they make of the truth -------------------------------------------------------------------

    def run(self, request: Request, *, report: Report | None = None, cancelled: threading.Event | None = None) -> Plan:
        """Carry out a request; the truth changes as the request says, by rules of the test's own."""
        before = self.tree
        self.reread_firmware()
        try:
            plan = self.machine.run(request, progress=report, cancelled=cancelled)
        except CancelledError:
            self._expect(request, before, done=request_done(before, self.tree, request))
            raise
        self._expect(request, before, done=True)
        return plan

    def settle(self, request: Request, before: Tree) -> bool:
        """After a kill and recovery: find out from the names whether the request was done, and expect accordingly."""
        now = self.tree
        done = request_done(before, now, request)
        if isinstance(request, RevertRequest) and not done:
            # Going back within a layer may leave all names as they were: it is done or not, on all disks.
            target = self.truth[request.name]
            done = all(self.shown(now, disk, now.active) == content for disk, content in target.items())
        self._expect(request, before, done=done)
        return done

    def _expect(self, request: Request, before: Tree, *, done: bool) -> None:
        if not done:
            return
        now, truth = self.tree, self.truth
        here = dict(truth[before.active])
        self._expect_firmware(request, before, now)
        match request:
            case SnapshotRequest():
                truth[request.name] = {disk: data for disk, data in here.items() if disk not in request.exclude}
            case BranchRequest():
                truth[request.name] = {**here, **(truth[request.source] if request.source else {})}
            case RenameRequest():
                truth[request.new] = truth.pop(request.old)
            case RevertRequest():
                target = dict(truth[request.name])
                for name in set(now.branches) - set(before.branches):
                    truth[name] = here
                truth[before.active] = {**here, **target}
            case SwitchRequest():
                truth[request.name] = {**here, **truth[request.name]}
            case DetachRequest():
                for name in set(now.branches) - set(before.branches):
                    truth[name] = {request.target: here[request.target]}
                del truth[before.active][request.target]
            case AttachRequest():
                self.reread(request.disk.target)
            case _:
                pass
        for name in [name for name in truth if not now.has_name(name)]:
            del truth[name]

    def _expect_firmware(self, request: Request, before: Tree, now: Tree) -> None:
        kept, live = self.firmware, self.live
        match request:
            case SnapshotRequest():
                kept[request.name] = live
            case BranchRequest():
                kept[request.name] = kept.get(request.source, {}) if request.source else live
            case RenameRequest() if request.old in kept:
                kept[request.new] = kept.pop(request.old)
            case RevertRequest():
                kept |= dict.fromkeys(set(now.branches) - set(before.branches), live)
                self.live = {**live, **kept.get(request.name, {})}
            case SwitchRequest():
                kept[before.active] = live
                self.live = {**live, **kept.pop(request.name, {})}
            case _:
                pass
        for name in [name for name in kept if not now.has_name(name)]:
            del kept[name]

    # ---- what must hold -------------------------------------------------------------------------------------------

    def shown(self, tree: Tree, disk: str, name: str) -> bytes:
        """What a name shows on a disk, read by QEMU; kept while no file of the chain changes."""
        named = tree.snapshots[name].points if name in tree.snapshots else tree.branches[name].tips
        point = named[disk]
        chain = list(tree.chain(point.layer))
        key = (point.internal, *((layer.path, *_looks(layer.path)) for layer in chain))
        if key not in self.known:
            if sum(map(len, self.known.values())) > 128 << 20:
                self.known.clear()
            self.known[key] = images.read(chain[0].path, chain[0].format, point.internal)
        return self.known[key]

    def wait_until_free(self, seconds: float = 20.0) -> None:
        """Wait until QEMU's programs are gone whose snaptree was killed, as recovery does."""
        until = time.monotonic() + seconds
        for path in filter(Path.is_file, self.images.rglob("*")):
            while probe(str(path)) is not None:
                assert time.monotonic() < until, f"{path} is still open by {who_has_open([str(path)])}"
                time.sleep(0.005)

    def check_meanwhile(self, request: Request) -> None:
        """What is kept is whole at every moment, before anything that a kill left is put right."""
        tree = self.tree
        # While it goes back or switches within a layer, a branch shows nothing in particular.
        going = (
            {tree.active, getattr(request, "name", "")} if isinstance(request, RevertRequest | SwitchRequest) else set()
        )
        for name in set(self.truth) & ({*tree.snapshots, *tree.branches} - (going - set(tree.snapshots))):
            named = tree.snapshots[name].points if name in tree.snapshots else tree.branches[name].tips
            for disk in set(named) & set(self.truth[name]):
                what = f"{disk} of {name!r}, before recovery"
                assert_same(self.shown(tree, disk, name), self.truth[name][disk], what)
        self.check_copies(tree, set(self.firmware) & {*tree.snapshots, *tree.branches} - going)

    def check(self, *, leaks: bool = False) -> None:
        """Everything that must hold after every operation.

        :param leaks: lost clusters are no fault (after a kill).
        """
        tree = self.tree
        assert set(self.truth) == set(tree.snapshots) | set(tree.branches)
        for name, disks in self.truth.items():
            named = tree.snapshots[name].points if name in tree.snapshots else tree.branches[name].tips
            assert set(named) == set(disks), f"{name} has disks {sorted(named)}, not {sorted(disks)}"
            for disk, wanted in disks.items():
                assert_same(self.shown(tree, disk, name), wanted, f"{disk} of {name!r}")
        assert violations(tree) == ()
        assert to_be_known(tree) == (), "what these layers look like is not kept"
        for layer in tree.layers.values():
            if layer.format == "qcow2" and self.sound.get(layer.path) != (looks := _looks(layer.path)):
                found = images.problems(layer.path)
                assert not {key: value for key, value in found.items() if not (leaks and key == "leaks")}, (
                    f"{layer.path}: {found}"
                )
                self.sound[layer.path] = looks
        self.check_copies(tree, {*tree.snapshots, *tree.branches} - {tree.active})
        self.check_firmware(tree)
        for path, content in self.foreign.items():
            assert path.read_bytes() == content, f"{path} is not the machine's, and has changed"
        self.check_files(tree)

    def check_copies(self, tree: Tree, names: set[str]) -> None:
        """The firmware state that goes with these names is what it was."""
        for name in names:
            pieces = (tree.snapshots.get(name) or tree.branches[name]).firmware
            found = {each.role: files_of(Path(each.path)) for each in pieces}
            assert found == self.firmware.get(name, {}), f"the firmware state of {name!r} is {found}"

    def check_firmware(self, tree: Tree) -> None:
        """The live firmware state is as it should be, and there is no copy that nothing refers to."""
        live = {role: files_of(Path(path)) for role, path in self.machine.config.firmware}
        assert live == self.live, f"the live firmware state is {live}"
        needed = {each.path for named in tree.named for each in named.firmware}
        there = {str(path) for path in (self.state / "firmware").glob("*")}
        assert there == needed, f"copies of firmware state: {sorted(there ^ needed)}"

    def check_files(self, tree: Tree) -> None:
        """No file is there that the tree does not need, and none is missing."""
        there = {str(path) for path in self.images.rglob("*") if not path.is_dir()}
        needed = {layer.path for layer in tree.layers.values()} | {str(path) for path in self.foreign} | self.extra
        assert there <= needed, f"not needed: {sorted(there - needed)}"
        assert needed - self.extra <= there, f"missing: {sorted(needed - there)}"


def files_of(path: Path) -> dict[str, bytes]:
    """A file, or all files of a folder, with their contents."""
    paths = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return {str(each.relative_to(path)): each.read_bytes() for each in paths}


def request_done(before: Tree, now: Tree, request: Request) -> bool:
    """Whether the names say that the request has come to pass."""
    match request:
        case SnapshotRequest() | BranchRequest():
            return now.has_name(request.name)
        case RenameRequest():
            return now.has_name(request.new)
        case SwitchRequest():
            return now.active == request.name
        case RevertRequest():
            return now.branches != before.branches or now.snapshots != before.snapshots
        case DeleteRequest() | DeleteBranchRequest():
            return True
        case _:
            return now != before


def jobs_of(plan: Plan) -> list[MoveJob]:
    """All merges of a plan and of those that follow it."""
    return [job for each in plan.every() for step in each.steps if isinstance(step, Move) for job in step.jobs]


def assert_same(found: bytes, wanted: bytes, what: str) -> None:
    """The bytes are the same; says where they first differ."""
    if found == wanted:
        return
    place = next((at for at, (one, other) in enumerate(zip(found, wanted, strict=False)) if one != other), None)
    if place is None:
        raise AssertionError(f"{what} is {len(found)} bytes long, not {len(wanted)}")
    raise AssertionError(
        f"{what} differs from byte {place} on ({place / 65536:.2f} x 64 KiB): {found[place]:#x}, not {wanted[place]:#x}"
    )


def _looks(path: str) -> tuple[int | bytes, ...]:
    """By what a file is known again: all its bytes if they are few."""
    status = os.stat(path)
    if status.st_size <= FEW:
        return (hashlib.blake2b(Path(path).read_bytes()).digest(),)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def hidden_files(folder: Path) -> list[str]:
    """Temporary files of snaptree's."""
    return [str(path) for path in folder.rglob("*") if re.match(r"\.snaptree-", path.name)]
