"""Mutants: the code without one of its syncs, locks, guards or journal writes, or with two writes in the other order.

All of them are in one copy of the source, each behind a question; an environment variable says which of them is in
force, so that a process that has everything loaded tries one after the other.
"""

from __future__ import annotations

import ast
import copy
import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHOSEN, REACHED = "SNAPTREE_MUTANT", "SNAPTREE_REACHED"
"""The variables that say which mutant is in force, and into which file goes which ones a process comes by."""

SYNCS = {"fsync", "sync", "sync_file", "sync_folder", "_sync_tree", "_sync_folder", "_sync_gone", "settle", "_sync"}
SYNCS |= {"flush", "_flush"}
JOURNAL = {"take", "note", "claim", "unclaim", "end", "remember", "record", "register", "forget", "refresh"}
JOURNAL |= {"take_step", "turn_back", "put_note", "put_identity", "apply_delta", "note_sources", "_claimer"}
LOCKS = {"take_steps", "extend", "acquire", "_lock", "flock", "let_inherit", "require_free", "prctl", "_exit"}
LOCKS |= {"take_new", "require_closed", "_require_dead", "_require_replaceable", "_wait_until_free", "require_known"}
# What would go on in QEMU when snaptree has failed.
JOBS = {"abandon"}
MENDS = {"mend", "require_counted"}
KINDS = {"sync": SYNCS, "journal": JOURNAL, "lock": LOCKS, "job": JOBS, "mend": MENDS}
RENAMES = {"rename_new", "rename", "_renameat2", "put_in_place", "publish", "claim", "replace"}
# The mover's: what refers to something comes after it, the counts of what is given up after what referred to it.
RENAMES |= {"refer", "_write_references", "give_up", "write_in_place"}
RENAMES |= {"punch_free"}
LATE = {"take"}
"""What the journal is told before something of the same name is done; a mutant tells it afterwards."""
ASKED = {"_held", "_take", "_is_still", "is_still"}
"""Questions whose answer keeps somebody out; a mutant does not ask."""
WITHIN = (".lent(", "._locked(", "with StandBy(", "with guard:")
"""What holds for the length of a ``with`` block."""
GUARDED = "guarded("
"""What an ``async with`` block has somebody stand by for; in a mutant the block has a guard that is none."""
WORDS = {"PRAGMA synchronous=FULL": "PRAGMA synchronous=OFF", "BEGIN IMMEDIATE": "BEGIN"}
ROOMS = ("images", "running", "store", "machines", "qemu")
NONE = (
    *("stack.", "selector.", "steering.", "control.take(", "source.extend(", "await end(", "agent.sync("),
    *("self.sync(min(", "abandon(qmp, [job.id"),
)
"""Others have methods of these names, too; and what runs in a storage daemon ends with it."""

SWITCH = '''"""Which mutant is in force."""

import contextlib
import mmap
import os
import types

_MAPS = {{}}


def on(number):
    told = os.environ.get("{reached}")
    if told is not None:
        # Memory, so that no call is counted that changes files, and nothing is lost when the process is killed.
        if told not in _MAPS:
            descriptor = os.open(told, os.O_RDWR)
            _MAPS[told] = mmap.mmap(descriptor, {most})
            os.close(descriptor)
        _MAPS[told][number] = 1
    return os.environ.get("{chosen}") == str(number)


def nobody():
    return contextlib.nullcontext(types.SimpleNamespace())
'''
_MOST = 4096


def start(told: Path) -> None:
    """From now on this process, and those that it starts, tell there by which mutants they come."""
    told.touch()
    with told.open("r+b") as file:
        file.write(bytes(_MOST))
    os.environ[REACHED] = str(told)


def reached(told: Path) -> list[int]:
    """The numbers of the mutants by which something has come; from now on nothing is told."""
    del os.environ[REACHED]
    return [number for number, byte in enumerate(told.read_bytes()) if byte]


@dataclass(frozen=True)
class Mutant:
    """One change of a file (its path within ``src``): the statement ``was`` is taken out or changed."""

    number: int
    kind: str
    path: str
    line: int
    was: str

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.path}: {' '.join(self.was.split())}"


@dataclass
class Source:
    """The mutants of the code, by name."""

    found: dict[str, Mutant] = field(default_factory=dict)
    _path: str = ""
    _text: str = ""

    def write(self, folder: Path) -> None:
        """Find all mutants, and put the copy of the source into the folder that has them."""
        shutil.copytree(ROOT / "src", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        for room in ROOMS:
            for path in sorted((ROOT / "src" / "snaptree" / room).rglob("*.py")):
                self._path, self._text = str(path.relative_to(ROOT / "src")), path.read_text(encoding="utf-8")
                module = ast.parse(self._text)
                before = len(self.found)
                self._within(module)
                if len(self.found) > before:
                    place = next(at for at, each in enumerate(module.body) if not _first(each))
                    module.body.insert(
                        place, ast.parse("from snaptree_mutants import nobody as _nobody, on as _on").body[0]
                    )
                    (folder / self._path).write_text(ast.unparse(ast.fix_missing_locations(module)), encoding="utf-8")
        (folder / "snaptree_mutants.py").write_text(
            SWITCH.format(reached=REACHED, chosen=CHOSEN, most=_MOST), encoding="utf-8"
        )

    def _mutant(self, kind: str, *statements: ast.AST) -> int:
        was = " ".join(ast.get_source_segment(self._text, each) or "" for each in statements)
        if isinstance(statements[0], ast.With | ast.AsyncWith):
            was = was.splitlines()[0]
        line: int = getattr(statements[0], "lineno")  # noqa: B009
        mutant = Mutant(len(self.found) + 1, kind, self._path, line, was)
        name, number = mutant.name, 2
        while name in self.found:
            name, number = f"{mutant.name} ({number})", number + 1
        self.found[name] = mutant
        return mutant.number

    def _within(self, node: ast.AST) -> None:
        """Change every block in the node."""
        for child in ast.iter_child_nodes(node):
            self._within(child)
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                setattr(node, name, self._block(block))

    def _block(self, block: list[ast.stmt]) -> list[ast.stmt]:
        wrapped = [self._statement(each) for each in block]
        for at, (before, statement) in enumerate(itertools.pairwise(block)):
            if _done_by(statement) in RENAMES and _done_by(before):
                swapped = [*block[:at], statement, before, *block[at + 2 :]]
                wrapped = [_either(self._mutant("order", before, statement), swapped, wrapped)]
        for at, statement in enumerate(block):
            done = [place for place in range(at + 1, len(block)) if _called(block[place]) == _called(statement)]
            if _called(statement) in LATE and done:
                late = [*block[:at], *block[at + 1 : done[0] + 1], statement, *block[done[0] + 1 :]]
                wrapped = [_either(self._mutant("order", statement, block[done[0]]), late, wrapped)]
        return wrapped

    def _statement(self, statement: ast.stmt) -> ast.stmt:
        """The statement, or what each mutant makes of it."""
        found, call = statement, _called(statement)
        was = ast.get_source_segment(self._text, statement) or ""
        for kind, names in KINDS.items():
            if call in names and not any(each in was for each in NONE):
                found = _either(self._mutant(kind, statement), [ast.Pass()], [found])
        if isinstance(statement, ast.If) and _asked(statement) in ASKED and not statement.orelse:
            found = _either(self._mutant("lock", statement), [ast.Pass()], [found])
        if isinstance(statement, ast.With) and len(statement.items) == 1 and statement.items[0].optional_vars is None:
            first = was.splitlines()[0]
            if any(each in first for each in WITHIN):
                found = _either(self._mutant("lock", statement), statement.body, [found])
        if isinstance(statement, ast.AsyncWith) and GUARDED in was.splitlines()[0]:
            found = _either(self._mutant("lock", statement), [_unguarded(statement)], [found])
        for old, new in WORDS.items():
            if isinstance(statement, ast.Expr) and f'execute("{old}")' in was:
                other = ast.parse(was.replace(old, new)).body
                found = _either(self._mutant("journal", statement), other, [found])
        return found


def _either(number: int, mutated: Sequence[ast.stmt], as_it_is: Sequence[ast.stmt]) -> ast.If:
    question = ast.parse(f"_on({number})", mode="eval").body
    return ast.If(question, copy.deepcopy(list(mutated)), list(as_it_is))


def _unguarded(statement: ast.AsyncWith) -> ast.AsyncWith:
    """The block without whoever stands by, by the same name."""
    (item,) = statement.items
    nobody = ast.parse("_nobody()", mode="eval").body
    return ast.AsyncWith([ast.withitem(nobody, item.optional_vars)], statement.body)


def _first(statement: ast.stmt) -> bool:
    """Whether the statement has to be at the top of a file."""
    if isinstance(statement, ast.ImportFrom):
        return statement.module == "__future__"
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _called(statement: ast.stmt) -> str:
    """What the statement calls and throws the result away of, if it does so."""
    if not isinstance(statement, ast.Expr):
        return ""
    value = statement.value.value if isinstance(statement.value, ast.Await) else statement.value
    return _name_of(value)


def _name_of(value: ast.expr) -> str:
    """What is called, if the expression is a call; of ``made(by)(this)`` it is ``made``."""
    if not isinstance(value, ast.Call):
        return ""
    if isinstance(value.func, ast.Call):
        return _name_of(value.func)
    return value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")


def _asked(statement: ast.If) -> str:
    """What is asked, or asked whether it is not so, or together with something else."""
    test = statement.test
    test = test.values[-1] if isinstance(test, ast.BoolOp) else test
    return _name_of(test.operand if isinstance(test, ast.UnaryOp) else test)


def _done_by(statement: ast.stmt) -> str:
    """What the statement calls; of an ``if``, what it asks, or the one thing that it does."""
    if isinstance(statement, ast.If):
        return _name_of(statement.test) or (_called(statement.body[0]) if len(statement.body) == 1 else "")
    return _called(statement)
