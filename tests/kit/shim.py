"""The library that kills a process, or lets its calls fail, at the n-th call that changes files (``faults.c``)."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).with_name("faults.c")
CLOCKS = Path(__file__).with_name("clocks.c")
DATA, SYNC, NAMES, RIGHTS, READS = 1, 2, 4, 8, 16
CHANGES = DATA | SYNC | NAMES | RIGHTS


def build(source: Path = SOURCE) -> Path:
    """The library (or another one), compiled once; skips the test where there is no compiler."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    target = (
        Path(__file__).parents[2] / "build" / f"{source.stem}-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}.so"
    )
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        made = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", made, source, "-ldl"], check=True)
        made.rename(target)
    return target


def place(*others: Path, memory: bool = True) -> dict[str, str]:
    """The environment of a process that has the library, after these, and makes its files in memory if told so."""
    found = {**os.environ, "LD_PRELOAD": ":".join(map(str, (*others, build())))}
    if memory and os.access("/dev/shm", os.W_OK):
        found["TMPDIR"] = "/dev/shm"
    return found


def rows(module: str, *words: str, environment: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Run a module of ``tests/crash`` in a process of its own; the lines of JSON that it prints."""
    line = [sys.executable, "-m", f"tests.crash.{module}", *words]
    done = subprocess.run(
        line, cwd=SOURCE.parents[2], env=environment or place(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads(row) for row in done.stdout.splitlines()]


def loaded() -> ctypes.CDLL:
    """The library as it is in this process, which was started with it."""
    library = ctypes.CDLL(None)
    library.faults_arm.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int)
    library.faults_cut.argtypes = (ctypes.c_char_p,)
    library.faults_log.argtypes = (ctypes.c_char_p,)
    library.faults_count.restype = ctypes.c_long
    return library


def arm(when: int, *, error: int = 0, once: bool = True, kinds: int = CHANGES, cut: Path | None = None) -> None:
    """Kill this process at its n-th call from now on, or (with an error number) let the call fail.

    :param cut: the power of the disk that this folder is on fails at the same moment.
    """
    loaded().faults_cut(os.fsencode(cut) if cut is not None else None)
    loaded().faults_arm(when, error, int(once), kinds)


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """While in the block, the calls that change files stand in the log, also those of the programs that are started."""
    loaded().faults_log(os.fsencode(path))
    os.environ["FAULTS_LOG"] = str(path)
    try:
        yield
    finally:
        del os.environ["FAULTS_LOG"]
        loaded().faults_log(None)


def environment(
    when: int,
    tell: Path,
    *,
    error: int = 0,
    once: bool = True,
    kinds: int = CHANGES,
    parent: bool = False,
    cut: Path | None = None,
) -> dict[str, str]:
    """What the programs that this process starts find in their environment, to do the same to themselves.

    :param tell: a file that they make when it has come so far.
    :param parent: this process is killed at the same moment.
    :param cut: the power of the disk that this folder is on fails at the same moment.
    """
    return {
        **({"FAULTS_PARENT": "1"} if parent else {}),
        **({"FAULTS_CUT": str(cut)} if cut is not None else {}),
        "FAULTS_TELL": str(tell),
        "FAULTS_WHEN": str(when),
        "FAULTS_ERROR": str(error),
        "FAULTS_ONCE": str(int(once)),
        "FAULTS_KINDS": str(kinds),
    }
