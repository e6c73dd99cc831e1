"""``kill -9`` at a random moment of a random operation: everything kept is byte-exact, nothing is left over.

``SNAPTREE_KILLS`` says how many, ``SNAPTREE_SEED`` with which seed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.images import KiB, MiB
from tests.kit.world import World, hidden_files

from snaptree.planning.create import BranchRequest, SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.revert import RevertRequest, SwitchRequest
from snaptree.planning.verbs import DeleteBranchRequest, GcRequest, RenameRequest, Request
from snaptree.store import operations

SIZE = 12 * MiB


class Killer:
    """Runs operations in a process of their own and kills it."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self.steps: Counter[str] = Counter()
        self.numbers = iter(range(1, 10_000))

    def write(self) -> None:
        """The guest writes here and there."""
        disk = self.random.choice(self.world.tree.disks)
        commands = []
        for _ in range(self.random.randint(1, 6)):
            length = self.random.choice([4, 64, 512, 2048]) * KiB
            start = self.random.randrange(0, SIZE - length) // 512 * 512
            commands.append(f"write -P {self.random.randint(1, 255)} {start} {length}")
        self.world.write(disk, *commands)

    def request(self) -> Request:
        """Something that can be done now."""
        tree, pick = self.world.tree, self.random.choice
        snapshots = sorted(tree.snapshots)
        others = sorted(set(tree.branches) - {tree.active})
        new = f"n{next(self.numbers)}"
        some: list[Request] = [SnapshotRequest(new, self.random.random() < 0.3), BranchRequest(new)]
        if len(tree.snapshots) + len(tree.branches) > 9:
            some = []
        if snapshots:
            name = pick(snapshots)
            way = pick(["auto", "auto", "commit", "pull", "none"])
            some += [DeleteRequest((name,), way)] * 3
            some += [DeleteRequest((name,), way, children=True, with_branches=True), RenameRequest(name, new)]
            some += [RevertRequest(name), RevertRequest(name, discard=True), RevertRequest(name, True, delete=True)]
            some += [BranchRequest(new, name)]
        if others:
            some += [SwitchRequest(pick(others)), DeleteBranchRequest(pick(others)), GcRequest()]
        return pick(some)

    def kill_within(self, request: Request) -> bool:
        """Begin the request and kill it at a random moment of it; whether it was still at it."""
        steps = sum(len(plan.steps) for plan in self.world.machine.plan(request).every())
        # Most steps are over in a millisecond; before the first word there is nothing to recover.
        number, moment = (
            self.random.randint(min(steps, self.random.random() > 0.1), steps),
            self.random.random() ** 4 * 0.008,
        )
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                self.world.machine.run(request, progress=lambda progress: _tell(writing))
            except BaseException as error:
                os.write(2, f"{request}: {error!r}\n".encode())
                os._exit(1)
            os._exit(0)
        os.close(writing)
        for _ in range(number):
            os.read(reading, 1)
        time.sleep(moment)
        ended = os.waitpid(child, os.WNOHANG)[0] != 0
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if operations.unfinished(self.world.connection.database):
                self.killed[type(request).__name__] += 1
        os.close(reading)
        return not ended

    def whole_before_recovery(self, request: Request) -> None:
        """What is kept is whole at every moment, before anything is put right."""
        world = self.world
        world.wait_until_free()
        for operation in operations.unfinished(world.connection.database):
            kinds = [step.kind for step in operations.steps_of(world.connection.database, operation.id)]
            self.steps[kinds[operation.step] if operation.step >= 0 else "begin"] += 1
        world.check_meanwhile(request)


def _tell(writing: int) -> None:
    os.write(writing, b".")


def run(folder: Path, kills: int, seed: int) -> Killer:
    """Kill until it has been so many times."""
    world = World(folder)
    raw, root = images.create(world.images / "vdb.img", SIZE, "raw"), images.create(world.images / "vda.qcow2", SIZE)
    images.io(root, "qcow2", "write -P 1 0 2M")
    images.io(raw, "raw", "write -P 2 1M 2M")
    world.add({"vda": (root, "qcow2"), "vdb": (raw, "raw")})
    killer = Killer(world, seed)
    while sum(killer.killed.values()) < kills:
        killer.write()
        request = killer.request()
        before = world.tree
        what = f"seed {seed}, kill {sum(killer.killed.values())}: {request}"
        try:
            if killer.kill_within(request):
                killer.whole_before_recovery(request)
                world.machine.run(GcRequest())
                assert world.machine.unfinished() == ()
            world.settle(request, before)
            world.check(leaks=True)
            assert not hidden_files(folder)
        except BaseException as error:
            error.add_note(what)
            raise
    return killer


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_many_times_and_nothing_is_lost(tmp_path: Path, kills: int) -> None:
    seed = int(os.environ.get("SNAPTREE_SEED", "0") or "0") or 1
    killer = run(tmp_path, int(os.environ.get("SNAPTREE_KILLS", str(kills))), seed)
    print(dict(killer.killed), dict(killer.steps))
    assert len(killer.steps) > 4, killer.steps
