"""QEMU's programs that close, stall, lie or talk nonsense: each operation ends soon, and everything kept is whole.

``SNAPTREE_STRANGE=all`` tries every way at every command; without it each way is tried at some of them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.crash.matrix import Matrix
from tests.kit.programs import alive, stand_in

from snaptree.errors import SnaptreeError
from snaptree.images import child
from snaptree.qemu import daemon, jobs, session

SCRIPT = Path(__file__).parents[1] / "kit" / "strange_daemon.py"
PULL, COMMIT = "delete s2 of a line by pull of QEMU", "delete s1 of a line by commit of QEMU"
COMMANDS = ("blockdev-add", "block-commit", "block-stream", "query-jobs", "job-complete", "job-cancel", "job-dismiss",
            "blockdev-reopen", "quit")  # fmt: skip
AT_ANY = (
    "closes", "stalls", "stops", "dies", "ends", "dies but leaves the line open", "many events", "events without end",
    "answers twice", "no JSON", "an array", "nested", "binary", "no end of line", "a huge answer", "another id",
    "no id", "an error without id", "an id that is a list", "no answer in it", "an error that is a number",
    "an event that is none", "refuses everything", "is out of room",
)  # fmt: skip
AT_QUERY = (
    "a number", "a text", "nothing", "numbers", "an empty job", "a job of odd types", "job vanishes",
    "job stands still", "job in an unknown state", "job beyond all numbers", "job that never completes",
    "job that is never dismissed",
)  # fmt: skip
AT_START = ("never greets", "ends", "greets with nonsense", "greets with a number", "greets without end",
            "greets, and is silent")  # fmt: skip
ALL = os.environ.get("SNAPTREE_STRANGE") == "all"


@contextlib.contextmanager
def short_deadlines() -> Iterator[None]:
    """All that snaptree waits for has a deadline; in the block they are short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "GREETING_SECONDS", 1.0)
        patch.setattr(session, "COMMAND_SECONDS", 0.4)
        patch.setattr(jobs, "STALL_SECONDS", 0.5)
        patch.setattr(jobs, "FLUSH_SECONDS", 0.4)
        patch.setattr(jobs, "ABANDON_SECONDS", 0.3)
        patch.setattr(daemon, "QUIT_SECONDS", 0.3)
        patch.setattr(daemon, "END_SECONDS", 0.3)
        patch.setattr(daemon, "HASTE_SECONDS", 0.2)
        patch.setattr(child, "STALL_SECONDS", 0.5)
        yield


class Strange:
    """One case, tried with many strange programs."""

    def __init__(self, folder: Path, case: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.matrix = Matrix(folder, case, "kill")
        self.failed = self.tried_so_far = 0

    def daemon(self, way: str, at: str) -> SnaptreeError | None:
        """A daemon that is strange in this way from this command on."""
        told = self.folder / "told"
        told.unlink(missing_ok=True)
        real = shutil.which("qemu-storage-daemon")
        assert real is not None
        script = f'#!/bin/sh\nexec {sys.executable} -I -S {SCRIPT} "$@"\n'
        said = {"STRANGE_WAY": way, "STRANGE_AT": at, "STRANGE_REAL": real, "STRANGE_TOLD": str(told)}

        def all_gone() -> None:
            processes = [int(line) for line in told.read_text().split()]
            if way == "dies but leaves the line open":
                # What it left is nobody's child: it holds the images until it ends.
                os.kill(processes.pop(), signal.SIGKILL)
            until = time.monotonic() + 5
            while any(map(alive, processes)):
                assert time.monotonic() < until, f"{way} at {at}: still there"
                time.sleep(0.01)

        try:
            failure = self.attempt(f"{way} at {at}", "qemu-storage-daemon", script, said)
        finally:
            all_gone()
        return failure

    def tried(self, way: str, at: str) -> SnaptreeError | None:
        """A daemon that is strange, and all that must hold afterwards; how the operation failed."""
        try:
            failure = self.daemon(way, at)
            self.look()
        except BaseException as error:
            error.add_note(f"{way} at {at}")
            raise
        return failure

    def attempt(self, what: str, program: str, script: str, said: dict[str, str]) -> SnaptreeError | None:
        """The operation with a stand-in; how it failed."""
        self.matrix.restore()
        self.tried_so_far += 1
        world = self.matrix.world
        self.request, self.before = self.matrix.case.request(world), world.tree
        began, failure = time.monotonic(), None
        with short_deadlines(), stand_in(self.folder, {program: script}, **said):
            try:
                world.machine.run(self.request)
            except SnaptreeError as error:
                # Busy: what a program has left behind holds the images.
                assert error.message and error.code in ("tool", "no-space", "io", "busy"), f"{what}: {error!r}"
                failure = error
                self.failed += 1
        assert time.monotonic() - began < 20, f"{what} took {time.monotonic() - began:.1f} s"
        return failure

    def look(self) -> None:
        """Everything is whole at once, and with the real programs the operation comes to its end."""
        self.matrix.world.wait_until_free(5)
        self.matrix.judge(0, self.request, self.before, interrupted=True)


@pytest.fixture
def pull(tmp_path: Path) -> Strange:
    return Strange(tmp_path / "pull", PULL)


@pytest.fixture
def commit(tmp_path: Path) -> Strange:
    return Strange(tmp_path / "commit", COMMIT)


def some(way: str, commands: tuple[str, ...]) -> tuple[str, ...]:
    """The commands at which to try a way: all of them, or one that differs from way to way."""
    first = sum(way.encode()) % len(commands)
    return commands if ALL else (commands[first],)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 4))])
def test_strange_at_any_command(pull: Strange, commit: Strange, part: int) -> None:
    for way in AT_ANY[part::4]:
        for at in some(way, COMMANDS):
            for strange in (pull, commit) if ALL else (commit if at in ("block-commit", "job-complete") else pull,):
                strange.tried(way, at)
    print(f"{pull.failed + commit.failed} of {pull.tried_so_far + commit.tried_so_far} failed")
    assert pull.failed + commit.failed > 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 3))])
def test_strange_jobs(pull: Strange, commit: Strange, part: int) -> None:
    for number, way in enumerate(AT_QUERY[part::3]):
        for strange in (pull, commit) if ALL else ((pull, commit)[number % 2],):
            failure = strange.tried(way, "query-jobs")
            assert failure is not None and failure.code == "tool", f"{way}: {failure!r}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 3))])
def test_strange_from_the_start(pull: Strange, part: int) -> None:
    for way in AT_START[part::3]:
        failure = pull.tried(way, "start")
        assert failure is not None and failure.code == "tool", f"{way}: {failure!r}"


@pytest.mark.parametrize("script", ["#!/nowhere\n", "neither a script nor a program", "#!/bin/sh\nexit 0\n", ""])
def test_a_daemon_that_cannot_be_started(pull: Strange, script: str) -> None:
    failure = pull.attempt("no daemon", "qemu-storage-daemon", script, {})
    assert failure is not None
    pull.look()


@pytest.mark.parametrize("case", [PULL, COMMIT])
def test_a_daemon_that_lies_loses_nothing(tmp_path: Path, case: str) -> None:
    """It says that all data has moved, and has moved none: what it was to be copied from stays."""
    strange = Strange(tmp_path, case)
    for at in ("block-stream", "block-commit"):
        failure = strange.tried("job that lies", at)
        assert (failure is not None) == (at == f"block-{'stream' if case == PULL else 'commit'}"), failure


# ---- qemu-img and qemu-io -----------------------------------------------------------------------------------------

TOOL = """#!/bin/sh
n=$(cat $STRANGE_COUNT); n=$((n + 1)); echo $n > $STRANGE_COUNT
if [ $n -ne $STRANGE_WHEN ]; then exec {real} "$@"; fi
{does}
"""
WRONG = {
    "does nothing": "exit 0",
    "does nothing, and says so": "echo '{}'; exit 0",
    "prints a list": "echo '[]'; exit 0",
    "prints nonsense": "head -c 3000 /dev/urandom; head -c 300 /dev/urandom >&2; exit 0",
    "prints without end": "exec cat /dev/zero",
    "fails without a word": "exit 1",
    "fails with nonsense": "head -c 3000 /dev/urandom >&2; exit 99",
    "kills itself": "kill -9 $$",
    "stalls": "exec sleep 1000",
    "stops": "kill -STOP $$",
    "closes its output and stalls": "exec sleep 1000 >&- 2>&-",
}
RIGHT = {
    "leaves its output open": 'sleep 2 & exec {real} "$@"',
    "does it and says nonsense": '{real} "$@" >/dev/null && head -c 3000 /dev/urandom',
    "does it and fails": '{real} "$@"; exit 1',
    "does it and dies": '{real} "$@"; kill -9 $$',
}
CASES = (
    ("internal snapshot", "qemu-img"),
    ("delete an internal one", "qemu-img"),
    ("revert within the tip, discard", "qemu-img"),
    ("revert within the tip, discard, delete", "qemu-img"),
    ("revert to an internal one below, by QEMU", "qemu-img"),
    ("branch from an internal one, by QEMU", "qemu-img"),
    ("switch to an internal one", "qemu-img"),
    ("delete internal and external ones", "qemu-img"),
    ("delete under a shorter layer by commit", "qemu-img"),
    ("delete over layers of several sizes by commit of QEMU", "qemu-io"),
)
REST = [*CASES[:3], *CASES[5:]]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("case", "tool"), [*CASES[3:5], *(pytest.param(*each, marks=pytest.mark.slow) for each in REST)]
)
def test_strange_tools(tmp_path: Path, case: str, tool: str) -> None:
    """Whatever the tool does at its n-th start: no success is believed that has not come to pass."""
    strange = Strange(tmp_path, case)
    real, count = shutil.which(tool), tmp_path / "count"
    ways = {**WRONG, **RIGHT}
    chosen = list(ways) if ALL else ["does nothing", *list(ways)[CASES.index((case, tool)) % 4 + 1 :: 4]]
    for way in chosen:
        for when in range(1, 30):
            count.write_text("0")
            script = TOOL.format(real=real, does=ways[way].format(real=real) if way in RIGHT else ways[way])
            what = f"{case}: {tool} {way} at its start {when}"
            try:
                strange.attempt(what, tool, script, {"STRANGE_COUNT": str(count), "STRANGE_WHEN": str(when)})
                strange.look()
            except BaseException as error:
                error.add_note(what)
                raise
            if int(count.read_text()) < when:
                break
            if not ALL and when == 2:
                break
        assert when > 1, f"{tool} was not started"
