"""Random operations on simulated images: after every single step of every plan all that is kept shows what it should.

``SNAPTREE_PLANS`` says how many operations, ``SNAPTREE_SEED`` with which seed.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

from msgspec.structs import replace
from tests.kit.simulated import CELL, Disk, Runner, measured, measured_point, point_shows, survey

from snaptree.errors import RefusedError, UsageError
from snaptree.model.branch import Branch
from snaptree.model.invariants import violations
from snaptree.model.layer import Layer, Point
from snaptree.model.survey import Survey
from snaptree.model.tree import Tree
from snaptree.planning.adopt import DetachRequest
from snaptree.planning.create import BranchRequest, SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.plan import Plan
from snaptree.planning.revert import RevertRequest, SwitchRequest
from snaptree.planning.steps import ApplyInternal, Record, TakeName
from snaptree.planning.sweep import SquashRequest
from snaptree.planning.unmeasured import Unmeasured
from snaptree.planning.verbs import DeleteBranchRequest, GcRequest, RenameRequest, Request, plan

J = TypeVar("J", bound="Journey")
Truth = dict[str, dict[str, tuple[int, ...]]]


class Journey:
    """One machine and what happens to it."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.disk = Disk(shares=self.chance.random() < 0.5, own=self.chance.random() < 0.7)
        self.numbers = iter(range(1, 1_000_000))
        self.truth: Truth = {"main": {}}
        self.loose_tips: set[str] = set()
        """Names whose contents are not settled just now: the active branch while going back within its layer."""
        self.done: Counter[str] = Counter()
        self.story: list[str] = []
        self.foreign: dict[str, tuple[int, ...]] = {}
        tree = Tree("web1", "main", branches={"main": Branch("main", None, {}, 0.0)})
        for disk in ("vda", "vdb", "vdc")[: self.chance.randint(1, 3)]:
            tree = self._with_disk(tree, disk)
        self.runner = Runner(self.disk, tree, self.chance, self.look)

    def _with_disk(self, tree: Tree, disk: str) -> Tree:
        below: int | None = None
        for depth in range(self.chance.choice([1, 1, 2, 3])):
            raw = depth == 0 and self.chance.random() < 0.3
            path = f"/disks/{disk}-{depth}.{'raw' if raw else 'qcow2'}"
            number = tree.next_layer_id()
            image = self.disk.make(
                path, "raw" if raw else "qcow2", tree.layers[below].path if below else None, self.chance.randint(2, 6)
            )
            image.cells = self._cells(image.length, 0.5)
            tree = tree.with_layers(Layer(number, disk, path, image.format, below, True, image.length * CELL))
            below = number
        assert below is not None
        # All but the top are foreign.
        top = tree.layers[below]
        tree = tree.with_layers(*(replace(each, owned=False) for each in list(tree.chain(below))[1:]))
        self.foreign |= {each.path: self.disk.shows(each.path) for each in list(tree.chain(below))[1:]}
        main = tree.branches["main"]
        self.truth["main"][disk] = self.disk.shows(top.path)
        tree = replace(tree, roots={**tree.roots, disk: (top.path, top.format)})
        return tree.with_branches(replace(main, tips={**main.tips, disk: Point(below)}))

    def _cells(self, length: int, share: float) -> dict[int, int]:
        return {
            at: 0 if self.chance.random() < 0.3 else next(self.numbers)
            for at in range(length)
            if self.chance.random() < share
        }

    # ---- what must hold after every step --------------------------------------------------------------------------

    def look(self) -> None:
        tree = self.runner.tree
        for name, disks in self.truth.items():
            if not tree.has_name(name):
                continue
            points = tree.snapshots[name].points if name in tree.snapshots else tree.branches[name].tips
            for disk, wanted in disks.items():
                if name not in self.loose_tips and disk in points:
                    assert point_shows(self.disk, tree, points[disk]) == wanted, f"{disk} of {name}"
        for path, shown in self.foreign.items():
            assert self.disk.shows(path) == shown, f"{path} is foreign, and has changed"

    def settled(self) -> None:
        """What must hold between operations."""
        tree = self.runner.tree
        assert violations(tree) == ()
        assert set(self.truth) == {*tree.snapshots, *tree.branches}
        for name, disks in self.truth.items():
            points = tree.snapshots[name].points if name in tree.snapshots else tree.branches[name].tips
            assert set(points) == set(disks), name
        paths = {layer.path for layer in tree.layers.values()}
        assert set(self.disk.names) == paths | set(self.foreign), set(self.disk.names) ^ paths
        for layer in tree.layers.values():
            parent = tree.layers[layer.parent].path if layer.parent is not None else None
            assert self.disk.names[layer.path].backing == parent, layer.path
            kept = set(self.disk.names[layer.path].internals)
            assert kept == set(tree.internals.get(layer.id, ())), f"{layer.path}: {kept}"
        for disk in tree.disks:
            root = tree.owned_root(tree.active_branch.tips[disk].layer)
            assert root is not None

    # ---- operations -----------------------------------------------------------------------------------------------

    def write(self) -> None:
        """The guest writes, or its disk is resized."""
        tree = self.runner.tree
        disk = self.chance.choice(tree.disks)
        image = self.disk.names[tree.layers[tree.active_branch.tips[disk].layer].path]
        if self.chance.random() < 0.25:
            size = self.chance.randint(1, 8)
            if size >= image.length or not image.internals:
                image.cells.update(dict.fromkeys(range(image.length, size), 0))
                image.cells = {at: value for at, value in image.cells.items() if at < size}
                image.length = size
        else:
            image.cells.update(self._cells(image.length, 0.4))
        image.version += 1
        self.truth[tree.active][disk] = point_shows(self.disk, tree, tree.active_branch.tips[disk])

    def request(self) -> Request:
        tree, chance = self.runner.tree, self.chance
        new = f"n{next(self.numbers)}"
        snapshots, others = sorted(tree.snapshots), sorted(set(tree.branches) - {tree.active})
        way = chance.choice(["auto", "auto", "auto", "none", "commit", "pull", "reflink"])
        exclude = (chance.choice(tree.disks),) if len(tree.disks) > 1 and chance.random() < 0.2 else ()
        some: list[Request] = [GcRequest(), RenameRequest(chance.choice(sorted(self.truth)), new)]
        if len(self.truth) < 12:
            some += [SnapshotRequest(new, chance.random() < 0.35, exclude)] * 4 + [BranchRequest(new)]
        if snapshots:
            name = chance.choice(snapshots)
            several = tuple(chance.sample(snapshots, min(len(snapshots), chance.randint(1, 3))))
            some += [DeleteRequest(several, way)] * 3
            some += [DeleteRequest((name,), way, chance.random() < 0.5, False, chance.random() < 0.5)]
            some += [DeleteRequest((name,), way, children_only=True)]
            some += [RevertRequest(name, keep_as=new), RevertRequest(name), RevertRequest(name, True)]
            some += [RevertRequest(name, True, delete=True), RevertRequest(name, delete=True)]
            some += [RevertRequest(name, True, children=True, delete=chance.random() < 0.5)]
            some += [BranchRequest(new, name)]
        if others:
            some += [SwitchRequest(chance.choice(others)), DeleteBranchRequest(chance.choice(others), way)]
        disk = chance.choice(tree.disks)
        top = chance.choice([None, *[layer.path for layer in tree.layers.values() if layer.disk == disk]])
        some += [SquashRequest(disk, top, None, way if way != "none" else "auto")]
        if len(tree.disks) > 1 and chance.random() < 0.1:
            some += [DetachRequest(disk, delete_files=True)]
        return chance.choice(some)

    def surveyed(self, request: Request) -> Survey:
        """What a plan for the request rests on."""
        return survey(self.disk, self.runner.tree, next(self.numbers))

    def may_be_refused(self, request: Request) -> bool:
        """Whether the request may be one that cannot be carried out."""
        return isinstance(request, SquashRequest | DeleteRequest)

    def operate(self) -> None:
        """One operation, from time to time killed on the way and recovered."""
        request = self.request()
        self.story.append(repr(request))
        tree = self.runner.tree
        found = self.surveyed(request)
        while True:
            try:
                planned = plan(tree, found, request)
                break
            except Unmeasured as wanted:
                rows = {**found.rows, **{row: measured(self.disk, tree, row) for row in wanted.rows}}
                points = {**found.points, **{each: measured_point(self.disk, tree, each) for each in wanted.points}}
                found = replace(found, rows=rows, points=points)
            except (RefusedError, UsageError):
                assert self.may_be_refused(request)
                return
        self.done[type(request).__name__] += 1
        for number, each in enumerate(planned.every()):
            kill = self.chance.randrange(len(each.steps) + 1) if self.chance.random() < 0.25 else None
            before = dict(self.truth)
            self._expect(request, planned, each if number == 0 else None)
            if not self.runner.run(each, kill_at=kill):
                if number == 0:
                    self.truth = before
                self.loose_tips.clear()
                break
            self.loose_tips.clear()
        else:
            assert {layer.path for layer in self.runner.tree.layers.values()} == {
                layer.path for layer in planned.end.layers.values()
            }
        for name in set(self.truth) - {*self.runner.tree.snapshots, *self.runner.tree.branches}:
            del self.truth[name]

    def _expect(self, request: Request, planned: Plan, first: Plan | None) -> None:
        """What the names will show, from the words of the request alone."""
        if first is None:
            return
        tree, truth = self.runner.tree, dict(self.truth)
        here = dict(truth[tree.active])
        match request:
            case SnapshotRequest():
                truth[request.name] = {disk: shown for disk, shown in here.items() if disk not in request.exclude}
            case BranchRequest():
                truth[request.name] = {**here, **(truth[request.source] if request.source else {})}
            case RenameRequest():
                truth[request.new] = truth[request.old]
            case RevertRequest():
                for name in set(planned.after.branches) - set(tree.branches):
                    truth[name] = here
                truth[tree.active] = {**here, **truth[request.name]}
                self.loose_tips.add(tree.active)
            case SwitchRequest():
                truth[request.name] = {**here, **truth[request.name]}
                if any(isinstance(step, ApplyInternal) for step in planned.steps):
                    self.loose_tips.add(request.name)
            case DetachRequest():
                truth[tree.active] = {disk: shown for disk, shown in here.items() if disk != request.target}
            case _:
                pass
        self.truth = truth

    def step(self) -> None:
        if self.chance.random() < 0.4:
            self.write()
        self.operate()
        self.look()
        self.settled()


def travel(kind: Callable[[int], J], variable: str, usual: str) -> Iterator[J]:
    """Journeys, one after the other, until as many operations are done as the environment's variable says."""
    left = int(os.environ.get(variable, usual))
    number = int(os.environ.get("SNAPTREE_SEED", "0") or "0") or 1
    while left > 0:
        journey = kind(number)
        try:
            for _ in range(60):
                journey.step()
        except BaseException as error:
            error.add_note(f"seed {number}, {variable}=1:\n  " + "\n  ".join(journey.story[-25:]))
            raise
        left -= sum(journey.done.values())
        number += 1
        yield journey


def test_random_plans_keep_everything_after_every_step() -> None:
    done: Counter[str] = Counter()
    for journey in travel(Journey, "SNAPTREE_PLANS", "12000"):
        done += journey.done
    print(dict(done))
    assert len(done) >= 10, done


def test_plans_are_data() -> None:
    """Every step of a random journey's plans survives being written as JSON and read again."""
    from snaptree.store.codec import dump, load

    assert load(dump(TakeName("/a", "/b"))) == TakeName("/a", "/b")
    journey = Journey(3)
    for _ in range(30):
        journey.step()
        tree = journey.runner.tree
        found = survey(journey.disk, tree, 1)
        for step in plan(tree, found, SnapshotRequest("another")).steps:
            again = load(dump(step))
            assert again == step or isinstance(step, Record)
