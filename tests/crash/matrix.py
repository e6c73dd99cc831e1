"""The crash matrix: every operation is interrupted at every call that changes files, recovered, and looked at.

This runs in a process of its own, started with the library of ``tests/kit/faults.c``; it tells what it did as JSON, one
line for each case. ``tests/crash/test_matrix.py`` runs a sample, ``scripts/reliability`` all of it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import errno
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.cases import CASES
from tests.kit import shim
from tests.kit.disks import SMALLEST
from tests.kit.space import mounted
from tests.kit.world import World, hidden_files

from snaptree.errors import NotFoundError, SnaptreeError
from snaptree.images.facts import read_facts
from snaptree.model.tree import Tree
from snaptree.planning.verbs import GcRequest, RemoveRequest, Request
from snaptree.store import operations, trees
from snaptree.store.database import Database

DONE, REFUSED, UNFORESEEN, DONE_ALL_THE_SAME, NOT_HERE = 0, 3, 4, 5, 6
LIMIT = 5000
"""No operation makes so many calls; a loop that does not end is a fault."""


class NotHereError(Exception):
    """The operation is refused, with nothing in its way: this file system cannot do it."""


@dataclass(frozen=True)
class Way:
    """How the operation is interrupted.

    ``who`` is ``snaptree``, ``tools`` (QEMU's programs that it starts) or ``both`` at once; ``error`` 0 kills,
    otherwise the calls fail with it, once or from then on. ``again``: recovery is killed too, twice. ``apart``: the
    state folder is on another disk.
    """

    who: str = "snaptree"
    error: int = 0
    once: bool = True
    kinds: int = shim.CHANGES
    again: bool = False
    apart: bool = False


WAYS = {
    "kill": Way(),
    "kill again while recovering": Way(again=True),
    "kill the tools": Way("tools"),
    "kill both": Way("both"),
    "EIO once": Way(error=errno.EIO),
    "EIO for good": Way(error=errno.EIO, once=False),
    "EIO of every sync": Way(error=errno.EIO, kinds=shim.SYNC),
    "EIO of every sync, for good": Way(error=errno.EIO, once=False, kinds=shim.SYNC),
    "EIO while reading": Way(error=errno.EIO, kinds=shim.READS),
    "EIO while reading, for good": Way(error=errno.EIO, once=False, kinds=shim.READS),
    "ENOSPC once": Way(error=errno.ENOSPC, kinds=shim.DATA | shim.NAMES),
    "ENOSPC for good": Way(error=errno.ENOSPC, once=False, kinds=shim.DATA | shim.NAMES),
    "EDQUOT once": Way(error=errno.EDQUOT, kinds=shim.DATA | shim.NAMES),
    "EDQUOT for good": Way(error=errno.EDQUOT, once=False, kinds=shim.DATA | shim.NAMES),
    "EIO of the tools": Way("tools", error=errno.EIO),
    "EIO of the tools, for good": Way("tools", error=errno.EIO, once=False),
    "EIO of the tools while reading": Way("tools", error=errno.EIO, kinds=shim.READS),
    "ENOSPC of the tools, once": Way("tools", error=errno.ENOSPC, kinds=shim.DATA),
    "ENOSPC of the tools": Way("tools", error=errno.ENOSPC, once=False, kinds=shim.DATA),
}


@dataclass
class Tally:
    """What was tried on one case in one way; ``looked``: so many of the points were not the same as another one."""

    case: str
    way: str
    points: int = 0
    done: int = 0
    recoveries: list[float] = field(default_factory=list)
    bytes: int = 0
    looked: int = 0


class Matrix:
    """One case in one way: the tree is built once, and put back for every point."""

    def __init__(self, folder: Path, case: str, way: str, place: Path | None = None) -> None:
        self.folder = folder
        self.case, self.way = CASES[case], WAYS[way]
        self.choose_mover()
        self.world = World((place or folder) / "world", elsewhere=folder / "state" if self.way.apart else None)
        self.cut: Path | None = None
        self.case.build(self.world)
        self.world.reread_firmware()
        self.truth = copy.deepcopy((self.world.truth, self.world.firmware, self.world.live, self.world.extra))
        self.places = [self.world.folder, *([self.world.state] if self.way.apart else [])]
        for number, each in enumerate(self.places):
            shutil.copytree(each, folder / f"kept{number}")
        self.tally = Tally(case, way)
        self.told = folder / "told"
        self.bidden = True

    def choose_mover(self) -> None:
        """From now on this process has data moved as the case wants it."""
        os.environ["SNAPTREE_MOVER"] = "qemu" if self.case.by_qemu else ""

    def restore(self) -> None:
        """Everything as it was built; the files are others, so what is kept of their looks is read anew."""
        self.choose_mover()
        for number, each in enumerate(self.places):
            shutil.rmtree(each)
            shutil.copytree(self.folder / f"kept{number}", each)
        world = self.world
        self.restore_truth()
        database = Database(str(world.state))
        tree = trees.load_tree(database, world.name)
        with database.transaction() as connection:
            for layer in tree.layers.values():
                identity = read_facts(layer.path, layer.format).identity
                if layer.identity is not None and identity is not None:
                    trees.put_identity(connection, world.name, layer.id, identity)
        database.close()

    def restore_truth(self) -> None:
        """What must hold, as it was when the tree was built."""
        world = self.world
        world.truth, world.firmware, world.live, world.extra = copy.deepcopy(self.truth)

    def points(self, stride: int, start: int) -> None:
        """Interrupt at the calls ``start``, ``start + stride`` …, until the operation comes to its end."""
        for number in range(start, LIMIT, stride):
            if not self.point(number):
                return
        raise AssertionError(f"{self.tally.case} has not ended after {LIMIT} calls")

    def point(self, number: int) -> bool:
        """Interrupt at one call, recover, look; whether the operation was interrupted there."""
        self.restore()
        world = self.world
        request = self.case.request(world)
        before = world.tree
        try:
            interrupted = self.interrupted(number, request)
            self.tally.points += interrupted
            self.afterwards(interrupted=interrupted)
            self.judge(number, request, before, interrupted=interrupted)
        except BaseException as error:
            error.add_note(f"{self.tally.case}, {self.tally.way}, at call {number}")
            raise
        return interrupted

    def judge(self, number: int, request: Request, before: Tree, *, interrupted: bool) -> None:
        """All is well before recovery and after it."""
        if self.world.name in self.world.connection.names():
            self.world.check_meanwhile(request)
            # Nobody is to take what has been begun for a layer that is missing, or was changed from outside.
            ailments = self.world.machine.view().ailments.values()
            assert not [each for each in ailments if each.blocks], ailments
        self.recover(number)
        self.look(request, before, interrupted=interrupted)

    def afterwards(self, *, interrupted: bool) -> None:
        """What comes before the first look: QEMU's programs whose snaptree was killed have gone."""
        self.world.wait_until_free()

    def interrupted(self, number: int, request: Request) -> bool:
        """Run the operation in a process of its own; whether the n-th call came."""
        way = self.way
        self.told.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            status = UNFORESEEN
            try:
                if way.who == "snaptree":
                    shim.arm(number, error=way.error, once=way.once, kinds=way.kinds, cut=self.cut)
                else:
                    both = way.who == "both"
                    told = shim.environment(
                        number, self.told, error=way.error, once=way.once, kinds=way.kinds, parent=both, cut=self.cut
                    )
                    os.environ.update(told)
                status = self.attempt(number, request)
            finally:
                os._exit(status)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, f"ended by signal {os.WTERMSIG(status)}"
            return True
        code = os.WEXITSTATUS(status)
        if code == NOT_HERE:
            raise NotHereError
        assert code in (DONE, REFUSED, DONE_ALL_THE_SAME), f"an unforeseen error (see above), {code}"
        self.tally.done += code != REFUSED
        return code != DONE

    def attempt(self, number: int, request: Request) -> int:
        """The operation; how it ended."""
        try:
            if self.case.perform is not None:
                self.case.perform(self.world)
            else:
                self.world.machine.run(request)
        except SnaptreeError as error:
            assert error.message
            return REFUSED if self.came(number) else NOT_HERE
        except BaseException as error:
            traceback.print_exception(error)
            return UNFORESEEN
        return DONE_ALL_THE_SAME if self.came(number) else DONE

    def came(self, number: int) -> bool:
        """Whether the n-th call came."""
        return shim.loaded().faults_count() >= number if self.way.who == "snaptree" else self.told.exists()

    def recover(self, number: int) -> None:
        """As the next command does it; killed on the way, twice, when that is wanted."""
        chance = random.Random(number)
        self.bidden = number % 2 == 0
        for _ in range(2 if self.way.again else 0):
            child = os.fork()
            if child == 0:
                # Early, or where data moves; what is not reached ends by itself.
                shim.arm(chance.randint(1, chance.choice((20, 80, 320))))
                self.put_right()
                os._exit(0)
            os.waitpid(child, 0)
        began = time.monotonic()
        self.put_right()
        self.tally.recoveries.append(round(time.monotonic() - began, 3))

    def put_right(self) -> None:
        """``recover``, then ``gc``, which does by itself what ``recover`` does."""
        connection = self.world.connection
        if self.bidden or self.world.name not in connection.names():
            connection.recover()
        if self.world.name in connection.names():
            try:
                self.world.machine.run(GcRequest())
            except NotFoundError:
                # What has been recovered was its removal.
                assert self.world.name not in connection.names()

    def look(self, request: Request, before: Tree, *, interrupted: bool) -> None:
        """Everything that is kept is byte-exact, nothing is over or missing; what has come to its end is done."""
        world = self.world
        assert not hidden_files(world.folder), hidden_files(world.folder)
        if isinstance(request, RemoveRequest) and world.name not in world.connection.names():
            left = {str(path) for path in world.images.rglob("*") if path.is_file()}
            assert left <= world.extra | {str(path) for path in world.foreign}, left
            assert not list((world.state / "firmware").glob("*"))
            return
        assert world.machine.unfinished() == ()
        done = self.case.done(world) if self.case.done is not None else world.settle(request, before)
        assert done or interrupted, f"{request} has come to its end, and is not done"
        world.check(leaks=True)
        ailments = world.machine.view().ailments
        assert not ailments, ailments
        claimed = [each.path for each in operations.claims_left(world.connection.database)]
        assert all(map(os.path.exists, claimed)), f"claimed, and gone: {claimed}"
        self.tally.bytes += sum(len(content) for disks in world.truth.values() for content in disks.values())


def tell(tally: Tally, **more: object) -> None:
    """Print what was tried as a line of JSON, and how much of a processor's time this process has taken so far."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = round(sum(each.ru_utime + each.ru_stime for each in spent), 1)
    print(json.dumps({**vars(tally), "seconds": seconds, **more}), flush=True)


@contextlib.contextmanager
def staged(case: str) -> Iterator[tuple[Path, Path | None]]:
    """A folder for a case, in memory where that can be, and the file system for it whose files can share blocks."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="snaptree-crash-", dir=memory, ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(temporary))
        yield folder, stack.enter_context(mounted(folder, "xfs", SMALLEST["xfs"])) if CASES[case].shares else None


def run(cases: list[str], ways: list[str], stride: int, seed: int) -> Iterator[Tally]:
    """All the cases in all the ways."""
    chance = random.Random(seed)
    for case in cases:
        for way in ways:
            with staged(case) as (folder, place):
                matrix = Matrix(folder, case, way, place)
                matrix.points(stride, chance.randint(1, stride))
                yield matrix.tally


def main() -> None:
    """Run what the arguments name and print a line of JSON for each case and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", default=[], help="cases that contain this; all without it")
    parser.add_argument("--exactly", action="append", default=[], help="this very case")
    parser.add_argument("--way", action="append", default=[])
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", default="0/1", help="N/M: every M-th case, from the N-th on")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    cases = [case for case in CASES if not options.case or any(word in case for word in options.case)]
    cases = options.exactly or cases
    for tally in run(cases[part::parts], options.way or list(WAYS), options.stride, options.seed):
        tell(tally)


if __name__ == "__main__":
    main()
