"""Mutants: the code without one of its syncs, locks or journal writes, or with a rename at another moment.

Each is a copy of ``src`` with one statement changed; the crash suite has to find it out. One that is not found out is a
line that nothing needs, or that nothing tests. ``python -m tests.crash.mutants`` goes through all of them, and goes on
where it has stopped; what each was caught by stands in ``build/mutants.json``.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kit import shim

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "mutants.json"
SYNCS = {"fsync", "sync", "sync_file", "sync_folder", "_sync_tree", "_sync_folder", "settle"}
JOURNAL = {"take", "note", "claim", "unclaim", "end", "remember", "record", "register", "forget", "refresh"}
JOURNAL |= {"_flush", "take_step", "put_note", "put_identity", "apply_delta"}
LOCKS = {"take_steps", "extend", "acquire", "_lock", "let_inherit", "require_free", "prctl", "_exit"}
RENAMES = {"rename_new", "rename", "_renameat2", "put_in_place", "publish", "claim"}
WORDS = {"PRAGMA synchronous=FULL": "PRAGMA synchronous=OFF", "BEGIN IMMEDIATE": "BEGIN"}
ROOMS = ("images", "running", "store", "machines", "qemu")
SECONDS = 600
_TEST = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
_MATRIX = ("-m", "tests.crash.matrix", "--way")
CHECKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "audit": (("-m", "tests.crash.audit"),),
    "recovery audit": (("-m", "tests.crash.audit", "--killed"),),
    "tests": (
        (
            *_TEST,
            *(f"tests/images/test_{name}.py" for name in ("child", "durable", "locks", "inode", "links", "pitfalls")),
        ),
        (*_TEST, "tests/store", "tests/machines", "tests/crash/test_many_at_once.py"),
    ),
    "kills": (
        (*_MATRIX, "kill", "--stride", "17"),
        (*_MATRIX, "kill both", "--stride", "3"),
        (*_MATRIX, "kill again while recovering", "--stride", "61"),
    ),
    "faults": ((*_MATRIX, "EIO once", "--stride", "23"), (*_MATRIX, "EIO of the tools", "--stride", "3")),
    "scenarios": ((*_TEST, "tests/scenarios/test_found_by_attack.py", "tests/cli/test_bad_input.py"),),
    "power cuts": (
        ("-m", "tests.crash.power", "--way", "power cut of the images' disk alone on xfs", "--stride", "3"),
    ),
}
FIRST = {
    "sync": ("audit", "tests", "recovery audit", "faults", "power cuts"),
    "journal": ("kills", "audit", "tests", "recovery audit", "scenarios", "faults"),
    "lock": ("tests", "scenarios", "kills"),
    "order": ("audit", "tests", "kills", "recovery audit"),
}


@dataclass(frozen=True)
class Mutant:
    """One change: ``lines`` (from, to, counted from 1) of a file become ``text``."""

    kind: str
    path: str
    lines: tuple[int, int]
    was: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.path}: {' '.join(self.was.split())}"


def called(statement: ast.stmt) -> str:
    """What the statement calls and throws the result away of, if it does so."""
    if not isinstance(statement, ast.Expr):
        return ""
    value = statement.value.value if isinstance(statement.value, ast.Await) else statement.value
    if not isinstance(value, ast.Call):
        return ""
    return value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")


def mutants() -> Iterator[Mutant]:
    """All that can be made of the source."""
    for room in ROOMS:
        for path in sorted((ROOT / "src" / "snaptree" / room).rglob("*.py")):
            yield from mutants_of(path)


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Those of one file."""
    source = path.read_text(encoding="utf-8")
    lines, name = source.splitlines(), str(path.relative_to(ROOT / "src"))

    def cut(first: ast.stmt, last: ast.stmt) -> tuple[tuple[int, int], str]:
        assert last.end_lineno is not None
        span = (first.lineno, last.end_lineno)
        return span, "\n".join(lines[span[0] - 1 : span[1]])

    for node in ast.walk(ast.parse(source)):
        for block in (getattr(node, field, None) for field in ("body", "orelse", "finalbody")):
            for before, statement in zip([None, *block], block, strict=False) if isinstance(block, list) else ():
                span, was = cut(statement, statement)
                call, indent = called(statement), " " * statement.col_offset
                kinds = {"sync": SYNCS, "journal": JOURNAL, "lock": LOCKS}
                # "extend" is a lock's only where it is called on one; lists have it too.
                for kind in [kind for kind, names in kinds.items() if call in names and "stack." not in was]:
                    yield Mutant(kind, name, span, was, f"{indent}pass")
                if isinstance(statement, ast.With) and ".lent(" in was.splitlines()[0]:
                    first = was.splitlines()[0]
                    yield Mutant("lock", name, (span[0], span[0]), first, f"{indent}if True:")
                if call in RENAMES and before is not None and called(before):
                    both, old = cut(before, statement)
                    yield Mutant("order", name, both, old, f"{was}\n{cut(before, before)[1]}")
    for number, line in enumerate(lines, 1):
        for old, new in WORDS.items():
            if f'execute("{old}")' in line:
                yield Mutant("journal", name, (number, number), line, line.replace(old, new))


def distinct(found: Iterator[Mutant]) -> dict[str, Mutant]:
    """By name; the same statement twice in a file is numbered."""
    named: dict[str, Mutant] = {}
    for each in found:
        name, number = each.name, 2
        while name in named:
            name, number = f"{each.name} ({number})", number + 1
        named[name] = each
    return named


def caught_by(mutant: Mutant, checks: Sequence[str]) -> str:
    """The first check that finds the mutant out; empty when none does."""
    with tempfile.TemporaryDirectory(prefix="snaptree-mutant-") as folder:
        shutil.copytree(ROOT / "src", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        target = Path(folder) / mutant.path
        lines = target.read_text(encoding="utf-8").splitlines()
        lines[mutant.lines[0] - 1 : mutant.lines[1]] = mutant.text.splitlines()
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")
        for check in checks:
            for words in CHECKS[check]:
                if not passes(words, folder):
                    return check
    return ""


def passes(words: Sequence[str], source: str) -> bool:
    """Whether the check finds nothing wrong with the source. One that does not end has found something."""
    place = os.environ if "pytest" in words else shim.place()
    place = {**place, "PYTHONPATH": source, "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=place, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        out, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    if process.returncode != 0:
        return False
    return "tests.crash.audit" not in words or not any(json.loads(row)["faults"] for row in out.splitlines())


def main() -> None:
    """Go through the mutants that have not been tried yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="those whose name contains this")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--list", action="store_true", help="say which there are, and stop")
    parser.add_argument("--again", action="store_true", help="try those again that were alive")
    parser.add_argument("--part", default="0/1", help="N/M: every M-th, from the N-th on")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    until = time.monotonic() + options.minutes * 60
    wanted = {name: each for name, each in distinct(mutants()).items() if options.only in name}
    for name in list(wanted)[part::parts]:
        if options.list:
            print(name)
            continue
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        if name in kept and (kept[name] or not options.again):
            continue
        if time.monotonic() > until:
            break
        found = caught_by(wanted[name], FIRST[wanted[name].kind])
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps({**kept, name: found}, indent=1, sort_keys=True))
        print(f"{found or 'ALIVE'}: {name}", flush=True)


if __name__ == "__main__":
    main()
