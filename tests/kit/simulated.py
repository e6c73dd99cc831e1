"""Image files as plain values, on which plans are carried out step by step: what QEMU does to real ones, in miniature.

A file is a row of cells; a cell is missing (what is beneath shows), zero, or a number.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from snaptree.model.delta import apply
from snaptree.model.layer import Identity, Layer, LayerId, Point
from snaptree.model.survey import FileSystemFacts, InternalFacts, LayerFacts, PointFacts, RowFacts, Survey
from snaptree.model.tree import Tree
from snaptree.planning.live_steps import LiveJob, LiveMerge, LiveOpen, LiveSettle, LiveSnapshot, LiveSwap
from snaptree.planning.plan import Plan
from snaptree.planning.steps import (
    ApplyInternal,
    BuildFromPoint,
    BuildMerged,
    CopyFirmware,
    Cover,
    DeleteInternal,
    MakeInternal,
    MakeOverlay,
    Move,
    MoveJob,
    PutInPlace,
    Record,
    Repoint,
    Shrink,
    Step,
    TakeName,
    Unlink,
)

CELL = 65536
Cells = dict[int, int]


@dataclass
class Image:
    """One image: its cells, and internal snapshots as ``(length, cells)`` by tag."""

    inode: int
    format: str
    backing: str | None
    length: int
    cells: Cells = field(default_factory=dict)
    internals: dict[str, tuple[int, Cells]] = field(default_factory=dict)
    version: int = 0


class Disk:
    """A folder of images.

    :param shares: whether files can share blocks.
    :param own: whether the mover can merge them; QEMU's jobs do it otherwise.
    """

    def __init__(self, *, shares: bool = False, own: bool = False) -> None:
        self.shares = shares
        self.own = own
        self.built: dict[str, Image] = {}
        self.names: dict[str, Image] = {}
        self.inodes = 0

    def make(self, path: str, image_format: str, backing: str | None, length: int) -> Image:
        assert path not in self.names, f"{path} exists"
        self.inodes += 1
        self.names[path] = Image(self.inodes, image_format, backing, length)
        return self.names[path]

    def shows(self, path: str, tag: str | None = None) -> tuple[int, ...]:
        """What a guest would read, cell by cell."""
        image = self.names[path]
        length, cells = image.internals[tag] if tag is not None else (image.length, image.cells)
        return tuple(cells[at] if at in cells else self._below(image.backing, at) for at in range(length))

    def _below(self, path: str | None, at: int) -> int:
        while path is not None:
            image = self.names[path]
            if at >= image.length:
                return 0
            if at in image.cells:
                return image.cells[at]
            path = image.backing
        return 0


def identity(image: Image) -> Identity:
    return Identity(1, image.inode, image.length, image.version)


def survey(disk: Disk, tree: Tree, number: int) -> Survey:
    """What would be read of the files."""
    facts: dict[LayerId, LayerFacts] = {}
    for layer in tree.layers.values():
        image = disk.names[layer.path]
        facts[layer.id] = LayerFacts(
            path=layer.path,
            identity=identity(image),
            format=image.format,
            virtual_size=image.length * CELL,
            allocated=(len(image.cells) + 3) * CELL,
            links=sum(1 for each in disk.names.values() if each is image),
            backing=image.backing,
            written=bool(image.cells or image.internals) or image.format == "raw",
            internals=tuple(
                InternalFacts(str(place), tag, length * CELL, 0, 0.0)
                for place, (tag, (length, _)) in enumerate(image.internals.items(), 1)
            ),
            unchanged_since=tuple(
                tag
                for tag, (length, cells) in image.internals.items()
                if (length, cells) == (image.length, image.cells)
            ),
        )
    folders: dict[str, set[str]] = {}
    for path in disk.names:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, set()).add(name)
    return Survey(
        layers=facts,
        file_systems={1: FileSystemFacts(1, 1 << 40)},
        names={folder: frozenset(names) for folder, names in folders.items()},
        free=dict.fromkeys(folders, 1 << 40),
        now=float(number),
        token=str(number),
    )


def measured(disk: Disk, tree: Tree, row: tuple[LayerId, ...]) -> RowFacts:
    """What merging the row would move."""
    images = [disk.names[tree.layers[each].path] for each in row]
    length = images[-1].length
    down = _topmost(images[1:], length)
    up = {at: value for at, value in _topmost(images[:-1], length).items() if at not in images[-1].cells}
    commit, pull = (sum(1 for value in cells.values() if value) for cells in (down, up))
    return RowFacts(
        commit * CELL,
        (len(down) - commit) * CELL,
        commit * CELL,
        pull * CELL,
        pull * CELL,
        extents=(commit, pull),
        by_qemu="" if disk.own else "the images are not plain",
        unshared="" if disk.own and disk.shares else "blocks cannot be shared",
    )


def measured_point(disk: Disk, tree: Tree, point: Point) -> PointFacts:
    """What making the internal snapshot external would take."""
    assert point.internal is not None
    _, cells = disk.names[tree.layers[point.layer].path].internals[point.internal]
    return PointFacts(sum(1 for value in cells.values() if value) * CELL)


def _topmost(images: list[Image], length: int) -> Cells:
    """What the layers, lowest first, have by themselves; past its end a layer hides what is beneath."""
    found: Cells = {}
    for image in images:
        found.update(image.cells)
        found.update(dict.fromkeys(range(image.length, length), 0))
    return {at: value for at, value in found.items() if at < length}


def _alone(images: list[Image], length: int) -> Cells:
    """As QEMU's jobs see it: what layers hide past their end is forgotten."""
    found: Cells = {}
    for image in images:
        found.update(image.cells)
    return {at: value for at, value in found.items() if at < length}


class Runner:
    """Carries out plans on the simulated files, and looks at everything after every step.

    :param look: is called after every step and in the middle of moving.
    """

    def __init__(self, disk: Disk, tree: Tree, chance: random.Random, look: Callable[[], None]) -> None:
        self.disk = disk
        self.tree = tree
        self.chance = chance
        self.look = look
        self.open: set[str] = set()
        """What a QEMU that runs has open: nobody else writes there."""
        self.writable: set[str] = set()
        """Of that, what it can write to."""

    def start(self) -> None:
        """QEMU has the active tips open, and what they stand on for reading."""
        tips = [point.layer for point in self.tree.active_branch.tips.values()]
        self.open = {each.path for tip in tips for each in self.tree.chain(tip)}
        self.writable = {self.tree.layers[tip].path for tip in tips}

    def stop(self) -> None:
        """No QEMU runs."""
        self.open, self.writable = set(), set()

    def run(self, plan: Plan, *, kill_at: int | None = None) -> bool:
        """Take the steps; with ``kill_at`` the process dies there and is recovered. Whether it came to its end."""
        for number, step in enumerate(plan.steps):
            if kill_at == number:
                if isinstance(step, Move | LiveMerge):
                    self._part(step)
                if number < plan.point_of_no_return:
                    for begun in reversed(plan.steps[: number + 1]):
                        self.undo(begun)
                        self.look()
                    return False
            self.do(step)
            self.look()
            if self.chance.random() < 0.1 and number >= plan.point_of_no_return:
                self.do(step)  # A crash repeats the step that it came in.
                self.look()
        return True

    def _part(self, step: Move | LiveMerge) -> None:
        """A move that was interrupted: some cells have been moved, no header has changed."""
        for job in step.jobs:
            if isinstance(job, LiveJob):
                self._move_live(job, lambda: self.chance.random() < 0.5)
            else:
                self._move(job, lambda: self.chance.random() < 0.5)
        self.look()

    def _move_live(self, job: LiveJob, wanted: Callable[[], bool]) -> None:
        """As the jobs of a QEMU that runs do it, which mind neither sizes nor internal snapshots."""
        files = [*job.row, *job.below[:1], *([job.child] if job.child is not None else [])]
        assert {path for path, _ in files} <= self.open, "QEMU has not all of it"
        images = [self.disk.names[path] for path, _ in job.row]
        assert len({each.length for each in images}) == 1, "it forgets what a shorter layer hides"
        if job.way == "commit":
            assert not any(each.internals for each in images[1:]), "internal snapshots would go"
            target, moved = images[0], _alone(images[1:], images[0].length)
        else:
            target, moved = images[-1], _alone(images[:-1], images[0].length)
            moved = {at: value for at, value in moved.items() if at not in target.cells}
            assert not target.internals, "internal snapshots would turn to zeroes"
        target.cells.update({at: value for at, value in moved.items() if wanted()})
        self._touched(job.target[0])

    def _finalize(self, job: LiveJob) -> None:
        """The header that names what was merged no longer does, and the guest goes over if it has to."""
        if job.way == "pull":
            self.disk.names[job.row[-1][0]].backing = job.below[0][0] if job.below else None
        elif job.child is not None:
            self.disk.names[job.child[0]].backing = job.row[0][0]
            self._touched(job.child[0])
        else:
            self.writable.add(job.row[0][0])
        self.open -= {path for path, _ in job.gone}

    def _offline(self, *paths: str) -> None:
        assert not self.open & set(paths), f"QEMU has {sorted(self.open & set(paths))} open"

    def _touched(self, path: str) -> None:
        """Written by snaptree itself: what a frozen layer looks like is kept anew."""
        image = self.disk.names[path]
        image.version += 1
        for layer in self.tree.layers.values():
            if layer.path == path and layer.identity is not None:
                self._keep(layer)

    def _keep(self, layer: Layer) -> None:
        from msgspec.structs import replace

        self.tree = self.tree.with_layers(replace(layer, identity=identity(self.disk.names[layer.path])))

    def _move(self, job: MoveJob, wanted: Callable[[], bool]) -> None:
        images = [self.disk.names[path] for path, _ in job.row]
        if not job.by_qemu:
            into = 0 if job.way == "commit" else len(images) - 1
            self._merge(images[into], images, into, wanted)
            self._touched(job.row[into][0])
            return
        length = images[-1].length
        if job.way == "commit":
            target, path = images[0], job.row[0][0]
            moved = _alone(images[1:], length)
            target.length = max(target.length, length)
        else:
            target, path = images[-1], job.row[-1][0]
            moved = {at: value for at, value in _alone(images[:-1], length).items() if at not in target.cells}
            assert not target.internals, "internal snapshots would turn to zeroes"
        target.cells.update({at: value for at, value in moved.items() if wanted()})
        self._touched(path)

    def _merge(self, target: Image, images: list[Image], into: int, wanted: Callable[[], bool]) -> None:
        """As the mover does it: what layers hide past their end is zeroes; an interrupted one has not grown yet."""
        length = images[-1].length
        moved = _topmost(images[1:] if into == 0 else images[:-1], length)
        if into == 0:
            moved = {**dict.fromkeys(range(images[0].length, length), 0), **moved}
        else:
            moved = {at: value for at, value in moved.items() if at not in target.cells}
            assert not target.internals, "internal snapshots would show other data"
        chosen = {at: value for at, value in moved.items() if wanted()}
        target.cells.update(chosen)
        if len(chosen) == len(moved):
            target.length = max(target.length, length)

    def do(self, step: Step) -> None:
        """Take a step; taking it again changes nothing."""
        disk = self.disk
        match step:
            case MakeOverlay():
                disk.make(step.path, "qcow2", step.backing, step.virtual_size // CELL)
            case BuildFromPoint():
                length, cells = disk.names[step.source].internals[step.tag]
                made = disk.make(step.path, "qcow2", step.below[0][0] if step.below else None, length)
                made.cells = dict(cells)
            case MakeInternal():
                self._offline(step.path)
                image = disk.names[step.path]
                assert step.tag not in image.internals
                image.internals[step.tag] = (image.length, dict(image.cells))
                self._touched(step.path)
            case ApplyInternal():
                self._offline(step.path)
                image = disk.names[step.path]
                image.length, cells = image.internals[step.tag]
                image.cells = dict(cells)
                self._touched(step.path)
            case DeleteInternal():
                assert step.path not in self.open or step.path in self.writable, f"QEMU only reads {step.path}"
                disk.names[step.path].internals.pop(step.tag, None)
                self._touched(step.path)
            case Cover():
                self._offline(step.row[-1][0])
                images = [disk.names[path] for path, _ in step.row]
                for at in range(images[-1].length):
                    for image in reversed(images):
                        if at in image.cells:
                            break
                        if at >= image.length:
                            images[-1].cells[at] = 0
                            break
                self._touched(step.row[-1][0])
            case Shrink():
                self._offline(step.path)
                image = disk.names[step.path]
                size = step.size // CELL
                image.cells = {at: value for at, value in image.cells.items() if at < size}
                assert size >= image.length or not image.internals, "QEMU does not shrink what has internal snapshots"
                image.length = size
                self._touched(step.path)
            case Move():
                for job in step.jobs:
                    self._offline(job.row[0 if job.way == "commit" else -1][0])
                    self._move(job, lambda: True)
            case BuildMerged():
                images = [disk.names[path] for path, _ in step.row]
                old = disk.names[step.path]
                disk.inodes += 1
                below = step.below[0][0] if step.below else None
                made = Image(disk.inodes, old.format, below, old.length, dict(old.cells), dict(old.internals))
                self._merge(made, images, step.into, lambda: True)
                disk.built[step.path] = made
            case PutInPlace():
                if not step.live:
                    self._offline(step.path)
                if step.path in disk.built:
                    disk.names[step.path] = disk.built.pop(step.path)
                    self._touched(step.path)
            case Repoint():
                self._offline(step.path)
                disk.names[step.path].backing = step.backing
                self._touched(step.path)
            case TakeName():
                if step.source in disk.names:
                    disk.names[step.target] = disk.names[step.source]
            case Record():
                self.tree = apply(self.tree, step.delta)
                for number in step.baseline:
                    self._keep(self.tree.layers[number])
            case Unlink():
                if step.path in disk.names and step.inode in (0, disk.names[step.path].inode):
                    del disk.names[step.path]
            case LiveSnapshot():
                assert {each.tip for each in step.cuts} | {each.path for each in step.marks} <= self.writable
                for mark in step.marks:
                    image = disk.names[mark.path]
                    assert mark.tag not in image.internals
                    image.internals[mark.tag] = (image.length, dict(image.cells))
                for cut in step.cuts:
                    assert disk.names[cut.overlay].backing == cut.tip
                    self.open.add(cut.overlay)
                    self.writable = self.writable - {cut.tip} | {cut.overlay}
            case LiveOpen():
                assert set(step.paths) <= self.open - self.writable
                self.writable |= set(step.paths)
            case LiveMerge():
                for live in step.jobs:
                    self._move_live(live, lambda: True)
                for live in step.jobs:
                    self._finalize(live)
            case LiveSwap():
                assert {path for each in step.swaps for path, _ in (*each.row, each.child)} <= self.open
            case CopyFirmware():
                pass  # The disks are what is looked at.
            case LiveSettle():
                self.open -= {path for each in step.swaps for path, _ in each.row[:-1]}
            case _:
                raise AssertionError(f"{step.kind} is not simulated")

    def undo(self, step: Step) -> None:
        """Take a step back, as before the point of no return."""
        match step:
            case MakeOverlay() | BuildFromPoint():
                self.disk.names.pop(step.path, None)
            case BuildMerged():
                self.disk.built.pop(step.path, None)
            case LiveOpen():
                self.writable -= set(step.paths)
            case LiveSnapshot():
                for mark in step.marks:
                    self.disk.names[mark.path].internals.pop(mark.tag, None)
                for cut in step.cuts:
                    self.open.discard(cut.overlay)
                    self.writable = self.writable - {cut.overlay} | {cut.tip}
            case MakeInternal():
                if self.disk.names[step.path].internals.pop(step.tag, None) is not None:
                    self._touched(step.path)
            case _:
                pass


def point_shows(disk: Disk, tree: Tree, point: Point) -> tuple[int, ...]:
    """What a point shows."""
    return disk.shows(tree.layers[point.layer].path, point.internal)
