"""Too little memory, and clocks that jump: each operation is done or fails with a clear error, and all stays whole."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from itertools import cycle
from pathlib import Path

import pytest
from tests.crash.matrix import DONE, REFUSED, UNFORESEEN, Matrix
from tests.kit import shim
from tests.kit.programs import stand_in
from tests.kit.scene import TOOL, Scene

from snaptree.cli.main import run
from snaptree.errors import SnaptreeError
from snaptree.model.tree import Tree
from snaptree.qemu import daemon, jobs, session

try:
    import _testcapi  # type: ignore[import-not-found]
except ImportError:
    _testcapi = None

ROOT = Path(__file__).parents[2]
KiB, MiB = 1 << 10, 1 << 20
CASES = ("delete s1 of a line by commit", "delete s2 of a line by pull", "internal snapshot", "revert with firmware",
         "revert to an internal one below", "delete over layers of several sizes by commit")  # fmt: skip
SOME = [CASES[4], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != CASES[4])]
MORE = [
    0,
    *(size * KiB for size in (64, 160, 256, 512, 768)),
    *(size * MiB for size in (1, 2, 4, 8, 16, 64, 256, 2048)),
]
PROGRAMS = ("qemu-img", "qemu-io", "qemu-storage-daemon")


def in_use() -> int:
    """How much address space this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def with_memory(matrix: Matrix, more: int) -> int:
    """The operation in a process that may take so much more memory than it has, and its programs no more than that."""
    child = os.fork()
    if child == 0:
        status = UNFORESEEN
        try:
            limit = in_use() + more
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            status = attempt(matrix)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempt(matrix: Matrix) -> int:
    """The operation; how it ended."""
    try:
        matrix.world.machine.run(matrix.case.request(matrix.world))
    except SnaptreeError as error:
        return REFUSED if error.message else UNFORESEEN
    except MemoryError:
        return REFUSED  # The command line has a message for it.
    except BaseException as error:
        traceback.print_exception(error)
        return UNFORESEEN
    return DONE


def look(matrix: Matrix, before: Tree) -> None:
    """Everything is whole at once, and comes to its end when there is memory again."""
    request = matrix.case.request(matrix.world)
    matrix.world.wait_until_free(5)
    matrix.judge(0, request, before, interrupted=True)


@pytest.mark.parametrize("case", SOME)
def test_little_memory(tmp_path: Path, case: str) -> None:
    matrix = Matrix(tmp_path, case, "kill")
    statuses = []
    for more in MORE:
        matrix.restore()
        before = matrix.world.tree
        statuses.append(with_memory(matrix, more))
        try:
            assert statuses[-1] in (DONE, REFUSED), "an error that is not clear (see above)"
            look(matrix, before)
        except BaseException as error:
            error.add_note(f"{case}, with {more >> 10} KiB more than it had")
            raise
    assert statuses[-1] == DONE


def without_memory(matrix: Matrix, number: int, many: int) -> int:
    """The operation in a process of whose allocations some fail; Python itself may give up then."""
    child = os.fork()
    if child == 0:
        status = UNFORESEEN
        try:
            sys.stderr = None
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            _testcapi.set_nomemory(number, number + many)
            status = attempt(matrix)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(_testcapi is None, reason="this Python is built without its test modules")
@pytest.mark.parametrize("case", SOME)
def test_an_allocation_fails(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for an answer that could not be read ends at its deadline."""
    for name in ("GREETING_SECONDS", "COMMAND_SECONDS"):
        monkeypatch.setattr(session, name, 1.0)
    for name in ("QUIT_SECONDS", "END_SECONDS"):
        monkeypatch.setattr(daemon, name, 1.0)
    monkeypatch.setattr(jobs, "FLUSH_SECONDS", 1.0)
    matrix = Matrix(tmp_path, case, "kill")
    statuses: Counter[int] = Counter()
    chance = random.Random(case)
    for number in range(int(os.environ.get("SNAPTREE_ALLOCATIONS", "12"))):
        matrix.restore()
        before, at = matrix.world.tree, int(10 ** chance.uniform(1, 5))
        many = (1, 1, 5, 100)[number % 4]
        status = without_memory(matrix, at, many)
        # Many at once can take asyncio its own timers away; who kills it then loses nothing.
        assert status != -signal.SIGALRM or many > 1, f"{case} hangs without memory at allocation {at}"
        statuses[status] += 1
        try:
            look(matrix, before)
        except BaseException as error:
            error.add_note(f"{case}, without memory at allocation {at}")
            raise
    assert statuses[DONE] < sum(statuses.values())


@pytest.mark.parametrize("case", SOME)
def test_little_memory_for_the_programs(tmp_path: Path, case: str) -> None:
    matrix = Matrix(tmp_path, case, "kill")
    statuses = []
    for size in (1, 16, 32, 64, 96, 128, 160, 192, 256, 384, 4096):
        scripts = {name: f'#!/bin/sh\nulimit -v {size * KiB}\nexec {shutil.which(name)} "$@"\n' for name in PROGRAMS}
        matrix.restore()
        before = matrix.world.tree
        with stand_in(tmp_path, scripts):
            statuses.append(attempt(matrix))
        try:
            assert statuses[-1] in (DONE, REFUSED)
            look(matrix, before)
        except BaseException as error:
            error.add_note(f"{case}, with {size} MiB for its programs")
            raise
    assert statuses[-1] == DONE


def test_little_memory_from_the_start(web1: Scene) -> None:
    """A process that cannot even begin says nothing that is wrong and changes nothing that is kept."""
    web1("snapshot web1 s1")
    web1.write(".n")
    place = {**os.environ, "SNAPTREE_STATE": str(web1.state), "OPENBLAS_NUM_THREADS": "1"}
    for size in (*range(16, 128, 16), 160, 256, 4096):
        for line in ("delete web1 s1", "tree web1"):
            words = ["/bin/sh", "-c", f'ulimit -v {size * KiB}; exec "$@"', "sh", *TOOL]
            done = subprocess.run([*words, *line.split()], env=place, capture_output=True, text=True, check=False)
            assert "unforeseen" not in done.stderr, f"{line}, {size} MiB: {done.stderr}"
        web1("recover")
        web1("gc web1")
        assert web1.shows() == "bn......"
        if "s1" not in web1.names():
            web1("snapshot web1 s1")
    web1.sound()


# ---- clocks -------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_clocks_that_jump_while_all_is_killed() -> None:
    """The crash matrix, with the clock of the day jumping at every look, for QEMU's programs too."""
    place = shim.place(shim.build(shim.CLOCKS))
    words = [word for case in CASES[:4] for word in ("--exactly", case)]
    for seed in ("1", "2"):
        line = ("--way", "kill", "--stride", "37", *words)
        assert len(shim.rows("matrix", *line, environment={**place, "CLOCKS_SEED": seed})) == 4


def test_clocks_from_the_first_to_the_last_day(web1: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments are for people; no operation rests on them."""
    days = cycle([0.0, 9.2e9, 1.0, 4102444800.5, -1.0, 1.7e9, 2.0**31, 2.0**32])
    monkeypatch.setattr(time, "time", lambda: next(days))
    for number in range(6):
        web1(f"snapshot web1 s{number}")
        web1.write("." * number + "uvwxyz"[number])
    web1("revert web1 s2")
    web1("branch web1 other --from s1 --switch")
    web1("delete web1 s0 s3 s4")
    for line in ("tree web1", "show web1", "show web1 s2", "log web1", "verify web1", "show web1 --xml s1"):
        web1(line)
    assert (web1.shows("s1"), web1.shows("s5"), web1.shows("main")) == ("u.......", "uvwxy...", "uv......")
    web1.sound()


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_waiting_does_not_look_at_the_day(web1: Scene, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    """A wait for another operation ends after its seconds, wherever the clock of the day goes meanwhile."""
    from snaptree.images.locks import MachineLock

    lock, real = MachineLock(), time.time
    lock.acquire([str(web1.path("main"))])
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(time, "time", lambda: real() + jump * (time.monotonic() % 0.2 > 0.1))
        os.environ["SNAPTREE_STATE"] = str(web1.state)
        began = time.monotonic()
        status = run(["snapshot", "web1", "s1", "--wait", "0.5"])
        os.write(writing, f"{status} {time.monotonic() - began}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    how, seconds = map(float, os.read(reading, 100).split())
    os.close(reading)
    os.close(writing)
    lock.release()
    assert how == 5 and 0.4 < seconds < 5
