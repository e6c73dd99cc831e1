"""Tries every mutant of the code (``tests/kit/mutation.py``): the tests have to find it out.

A mutant that no test finds out is a line that nothing needs, or that nothing tests. ``python -m tests.crash.mutants``
goes through all of them, and goes on where it has stopped; what each was caught by stands in ``mutants.json``
beside this file, which is kept with the code. What has been tried on a file counts until the file changes.

First the code as it is goes through what may find something out, once, to learn which mutants each comes by
(``build/mutants-reached.json``, until there are others). Then each mutant goes through what comes by it, the quickest
first: the tests of its own file; whole operations, audited; other quick tests. Those that are alive then go through
the slower tests, and at last the operations killed at calls and recovered, audited too. All but the tests run in one
process, which has everything loaded and every tree built. What has found something has to find nothing in the code as
it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.crash.audit import AUDITED
from tests.kit import shim
from tests.kit.disks import SMALLEST
from tests.kit.mutation import CHOSEN, REACHED, ROOT, Mutant, Source, reached, start
from tests.kit.space import mounted

KEPT, LEARNED = ROOT / "tests" / "crash" / "mutants.json", ROOT / "build" / "mutants-reached.json"
TESTS = (
    *("tests/store", "tests/machines", "tests/running"),
    *(
        f"tests/images/test_{name}.py"
        for name in ("child", "durable", "inode", "links", "locks", "mover", "mover_order", "pitfalls")
    ),
    *("tests/images/test_pitfalls_merging.py", "tests/scenarios/test_a_what_snapshots_are_for.py"),
    "tests/scenarios/test_shared_blocks.py",
    *("tests/scenarios/test_found_by_attack.py", "tests/cli/test_bad_input.py", "tests/crash/test_many_at_once.py"),
    *(
        f"tests/live/test_{name}.py"
        for name in (
            *("snapshot", "memory", "memory_killed", "memory_going_back", "memory_back_killed", "memory_stopped"),
            *("going_over", "quiesce", "steering", "internal", "start_and_stop", "delete"),
        )
    ),
    *(
        f"tests/libvirt/test_{name}.py"
        for name in (
            *("running", "killed", "killed_within", "shared", "memory", "memory_killed", "internal_running"),
            *("locked", "rows", "on_disk", "renamed"),
        )
    ),
)
TRIED = (*AUDITED, "EIO of the tools")
FIRST_CASES, QUICK_TESTS, QUICK_SECONDS = 3, 24, 3.0
"""So many cases come before other files' tests, so many tests before the other cases, if none takes longer than so."""
ONE_SECONDS = 60.0
"""So long any one thing may take, which otherwise does not end."""
_WORDS = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "tests.kit.reached", "-m", "not slow or mutants")


def apart(work: Callable[[], None], seconds: float, *, chosen: int) -> bool:
    """Do the work in a process of its own with a mutant in force; whether it comes to its end and finds nothing."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.environ[CHOSEN] = str(chosen)
            work()
            status = 0
        finally:
            os._exit(status)
    until = time.monotonic() + seconds
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.002)
    if ended == (0, 0):
        os.killpg(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
    return ended[1] == 0


class Trials:
    """All that may find a mutant out, and which mutants each comes by."""

    def __init__(self, folder: Path, sharing: Path, stride: int, most: int, state: str) -> None:
        from tests.crash.audit import Audited
        from tests.crash.cases import CASES
        from tests.crash.matrix import Matrix

        self.folder, self.sharing, self.stride, self.most, self.cases = folder, sharing, stride, most, CASES
        self.state = state
        self._audited, self._matrix = Audited, Matrix
        self._built: dict[tuple[str, str], Matrix] = {}
        self.whole: dict[str, list[int]] = {}
        """By case: which mutants the operation by itself comes by."""
        self.points: dict[str, dict[str, list[int]]] = {}
        """By case and call: which ones it comes by when it is killed there, with its recovery."""
        self.tests: dict[str, tuple[float, list[int]]] = {}
        """By test: how long it takes, and which ones it comes by."""
        self.files: dict[str, str] = {}
        """By file of tests: what it held when they were learned."""

    def built(self, case: str, way: str = "kill") -> Any:
        """The case with its tree."""
        if (case, way) not in self._built:
            place = self.folder / f"case{len(self._built)}"
            place.mkdir()
            kind = self._audited if way in AUDITED else self._matrix
            shared = self.sharing / place.name if self.cases[case].shares else None
            self._built[case, way] = kind(place, case, way, shared)
        return self._built[case, way]

    # ---- learning -------------------------------------------------------------------------------------------------

    def learn(self) -> None:
        """Which mutants whole operations and tests come by; the code as it is has to go through all of it."""
        kept = json.loads(LEARNED.read_text()) if LEARNED.exists() else {}
        files = {str(path): digest([ROOT / path]) for path in test_files()}
        if kept.get("state") == self.state:
            self.whole, self.points = kept["whole"], kept["points"]
            same = {path for path in files if kept["files"].get(path) == files[path]}
            self.tests = {test: each for test, each in kept["tests"].items() if test.partition("::")[0] in same}
            self.files = {path: files[path] for path in same}
        for case in self.cases:
            if case not in self.whole:
                self.whole[case] = self._reached(self.built(case).whole)
        self._keep()
        print(f"learned: {len(self.whole)} whole operations", flush=True)
        if changed := [path for path in files if path not in self.files]:
            self._learn_tests(changed)
            self.files = files
            self._keep()

    def learn_points(self) -> None:
        """Which mutants operations come by that are killed, and their recoveries."""
        for case in self.cases:
            for way in TRIED:
                if not any(place.startswith(f"{way} at") for place in self.points.get(case, {})):
                    self._learn_case(case, way)
                    self._keep()

    def _keep(self) -> None:
        LEARNED.parent.mkdir(exist_ok=True)
        kept = {
            "state": self.state, "whole": self.whole, "points": self.points, "tests": self.tests, "files": self.files,
        }  # fmt: skip
        LEARNED.write_text(json.dumps(kept))

    def _learn_case(self, case: str, way: str) -> None:
        began, found = time.monotonic(), dict[str, list[int]]()
        matrix, interrupted = self.built(case, way), list[bool]()
        # QEMU's programs make few calls.
        stride = self.stride if way == "kill" else max(1, self.stride // 2)
        number = random.Random(case).randint(1, stride)
        while not interrupted or interrupted[-1]:
            found[f"{way} at call {number}"] = self._reached(lambda at=number: interrupted.append(matrix.point(at)))  # type: ignore[misc]
            number += stride
        self.points.setdefault(case, {}).update(found)
        print(f"learned: {way}, {case}, {len(found)} points in {time.monotonic() - began:.1f} s", flush=True)

    def _reached(self, work: Callable[[], None]) -> list[int]:
        told = self.folder / "reached"
        start(told)
        work()
        return reached(told)

    def _learn_tests(self, files: list[str]) -> None:
        told = self.folder / "tests"
        place = {**plain(), "SNAPTREE_REACHED_BY_TEST": str(told)}
        subprocess.run([sys.executable, *_WORDS, *files], cwd=ROOT, env=place, check=True)
        for line in told.read_text().splitlines():
            test, seconds, numbers = json.loads(line)
            self.tests[test] = (seconds, numbers)

    # ---- trying ---------------------------------------------------------------------------------------------------

    def caught_by(self, mutant: Mutant) -> str:
        """What finds the mutant out first, of what is quick; empty when nothing does."""
        number = mutant.number
        # What comes by few of the mutants is about them.
        cases = sorted((len(numbers), case) for case, numbers in self.whole.items() if number in numbers)
        own, others = self._quick(mutant)
        return (
            self.failing(own, number)
            or self._wrong(cases[:FIRST_CASES], number)
            or self.failing(others, number)
            or self._wrong(cases[FIRST_CASES:], number)
        )

    def caught_late_by(self, mutant: Mutant) -> str:
        """Which of the other tests finds the mutant out."""
        quick = [test for tests in self._quick(mutant) for test in tests]
        return self.failing([test for _, test in self._tests_of(mutant) if test not in quick], mutant.number)

    def by_these(self, tests: list[str], cases: list[str], number: int) -> str:
        """Which of these tests and cases finds the mutant out."""
        return self.failing(tests, number) or self._wrong([(0, case) for case in cases], number)

    def killed_by(self, mutant: Mutant) -> str:
        """Which kill of an operation, with its recovery, finds out a mutant that nothing else does."""
        self.learn_points()
        return self._killed(self._places(mutant.number)[: self.most], mutant.number)

    def _tests_of(self, mutant: Mutant) -> list[tuple[int, str]]:
        """The tests that come by the mutant, with their distance from it."""
        found = sorted(
            (distance(mutant, test), seconds * len(numbers), test)
            for test, (seconds, numbers) in self.tests.items()
            if mutant.number in numbers
        )
        return [(far, test) for far, _, test in found]

    def _quick(self, mutant: Mutant) -> tuple[list[str], list[str]]:
        """The tests of the mutant's own file, and others that are quick."""
        tests = self._tests_of(mutant)
        others = [test for far, test in tests if far and self.tests[test][0] < QUICK_SECONDS]
        return [test for far, test in tests if not far], others[:QUICK_TESTS]

    def _wrong(self, cases: list[tuple[int, str]], number: int) -> str:
        for _, case in cases:
            if self._finds(self.built(case).whole, number):
                return f"audit: {case}"
        return ""

    @staticmethod
    def _finds(work: Callable[[], None], number: int) -> bool:
        """Whether the work finds the mutant, and nothing in the code as it is."""
        return not apart(work, ONE_SECONDS, chosen=number) and apart(work, ONE_SECONDS, chosen=0)

    def failing(self, tests: list[str], number: int) -> str:
        """Which of these tests finds the mutant out, and nothing in the code as it is."""
        failed = self._first_failing(tests, number)
        return f"test: {failed}" if failed and not self._first_failing([failed], 0) else ""

    def _first_failing(self, tests: list[str], number: int) -> str:
        """Which of the tests fails first, or does not end; empty when none does."""
        if not tests:
            return ""
        told = self.folder / "running"
        told.unlink(missing_ok=True)
        place = {**plain(), CHOSEN: str(number), "SNAPTREE_RUNNING_TEST": str(told)}
        process = subprocess.Popen(
            [sys.executable, *_WORDS, *tests],
            cwd=ROOT,
            env=place,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(ONE_SECONDS + 4 * sum(self.tests.get(test, (ONE_SECONDS, []))[0] for test in tests))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return told.read_text() if process.returncode != 0 and told.exists() else ""

    def _places(self, number: int) -> list[tuple[str, str]]:
        """Where operations are killed and come by the mutant, in any order."""
        places = [
            (case, place)
            for case, points in self.points.items()
            for place, numbers in points.items()
            if number in numbers
        ]
        random.Random(number).shuffle(places)
        return places

    def _killed(self, places: list[tuple[str, str]], number: int) -> str:
        for case, place in places:
            way, _, at = place.partition(" at call ")
            matrix = self.built(case, way)
            if self._finds(lambda on=matrix, at=at: on.point(int(at)), number):  # type: ignore[misc]
                return f"{place}: {case}"
        return ""


def plain() -> dict[str, str]:
    """The environment for pytest: without the library, whose tests start processes with it themselves."""
    found = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "TMPDIR", CHOSEN, REACHED)}
    return {**found, "PYTHONDONTWRITEBYTECODE": "1"}


def distance(mutant: Mutant, test: str) -> int:
    """How far a test is from the mutant's file: tests mirror the house."""
    file, place = Path(mutant.path), Path(test.partition("::")[0])
    own = place.stem == f"test_{file.stem}" or place.stem.startswith(f"test_{file.parent.name}")
    return 0 if own else 1 if place.parts[1] in file.parts else 2


def test_files() -> list[str]:
    """The files of tests that may find a mutant out."""
    paths = (ROOT / each for each in TESTS)
    found = (file for path in paths for file in (sorted(path.glob("test_*.py")) if path.is_dir() else [path]))
    return [str(path.relative_to(ROOT)) for path in found]


def digest(paths: Iterable[Path]) -> str:
    """What the files hold, in short."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def try_all(options: argparse.Namespace, folder: Path) -> None:
    """Go through the mutants that have not been tried yet."""
    found = [Mutant(**each) for each in json.loads((folder / "mutants.json").read_text())]
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    names = json.loads((folder / "names.json").read_text())
    wanted = []
    for name, mutant in zip(names, found, strict=True):
        if mutant.kind == "mend" and not options.mends:
            kept.pop(name, None)
            continue
        of = digest([ROOT / "src" / mutant.path])
        known = kept.get(name, {})
        if options.only in name and (known.get("of") != of or (options.again and not known["by"])):
            wanted.append((name, mutant, of))
    for name in [name for name in kept if name not in names]:
        del kept[name]
    if not wanted:
        return
    until = time.monotonic() + options.minutes * 60

    def tried(name: str, mutant: Mutant, of: str, find: Callable[[Mutant], str], *, last: bool) -> bool:
        """Try one; whether it was found out."""
        began = time.monotonic()
        by = find(mutant)
        if by or last:
            kept[name] = {"by": by, "of": of}
            KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True))
        how = by or ("ALIVE" if last else "not yet")
        print(f"{how}, {time.monotonic() - began:.1f} s: {mutant.line}: {name}", flush=True)
        return bool(by)

    with mounted(folder, "xfs", 4 * SMALLEST["xfs"]) as sharing:
        state = f"{digest([folder / 'names.json'])} {options.stride}"
        trials = Trials(folder, sharing, options.stride, options.points, state)
        if options.test or options.case:
            for each in wanted:
                tried(*each, lambda mutant: trials.by_these(options.test, options.case, mutant.number), last=False)
            return
        trials.learn()
        left = wanted
        ways = (trials.caught_by, trials.caught_late_by, trials.killed_by)
        for way in ways:
            left = [each for each in left if time.monotonic() < until and not tried(*each, way, last=way == ways[-1])]


def main() -> None:
    """Make the mutants, and go on in a process that has them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those whose name contains this")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--test", action="append", default=[], help="try just this test, and learn nothing before")
    parser.add_argument("--case", action="append", default=[], help="try just this case, and learn nothing before")
    parser.add_argument("--list", action="store_true", help="say which there are, and stop")
    parser.add_argument("--again", action="store_true", help="try those again that were alive")
    parser.add_argument("--stride", type=int, default=5, help="kill at every so manieth call")
    parser.add_argument("--mends", action="store_true", help="also those without a repair of what a kill has left")
    parser.add_argument("--points", type=int, default=400, help="so many kills are tried at most on each")
    options = parser.parse_args()
    if "SNAPTREE_MUTANTS" in os.environ:
        try_all(options, Path(os.environ["SNAPTREE_MUTANTS"]))
        return
    place = shim.place()
    with tempfile.TemporaryDirectory(
        prefix="snaptree-mutants-", dir=place.get("TMPDIR"), ignore_cleanup_errors=True
    ) as name:
        source = Source()
        source.write(Path(name))
        if options.list:
            print("\n".join(source.found))
            return
        (Path(name) / "mutants.json").write_text(json.dumps([asdict(each) for each in source.found.values()]))
        (Path(name) / "names.json").write_text(json.dumps(list(source.found)))
        place = {**place, "PYTHONPATH": name, "SNAPTREE_MUTANTS": name, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.crash.mutants", *sys.argv[1:]], cwd=ROOT, env=place, check=False
        )
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
