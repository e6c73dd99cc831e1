"""A sample of the crash matrix; ``scripts/reliability`` goes through all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.kit import shim

ROOT = Path(__file__).parents[2]


def matrix(*words: str) -> list[dict[str, Any]]:
    """Run a part of the matrix in a process of its own; a tally for each case and way."""
    memory = {"TMPDIR": "/dev/shm"} if os.access("/dev/shm", os.W_OK) else {}
    place = {**os.environ, **memory, "LD_PRELOAD": str(shim.build())}
    line = [sys.executable, "-m", "tests.crash.matrix", *words]
    done = subprocess.run(line, cwd=ROOT, env=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads(row) for row in done.stdout.splitlines()]


@pytest.mark.timeout(900)
def test_killed_at_calls_of_every_operation() -> None:
    tallies = matrix("--way", "kill", "--stride", "29")
    assert sum(tally["points"] for tally in tallies) > 60
    assert len(tallies) > 45


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("way", "stride", "cases"),
    [
        ("kill again while recovering", 17, ("delete s1 of a line by auto", "revert with firmware")),
        ("kill the tools", 5, ("delete s1 of a line by commit", "internal snapshot")),
        ("kill both", 1, ("delete s2 of a line by pull",)),
        ("EIO of the tools", 1, ("delete s2 of a line by pull", "internal snapshot")),
        ("EIO for good", 17, ("snapshot of one disk", "revert within the tip, discard")),
        ("EIO once", 17, ("delete s1 of a line by commit", "branch from here")),
        ("EIO while reading", 17, ("switch", "delete s1 of a line by pull")),
        ("ENOSPC for good", 17, ("snapshot with firmware", "delete s1 of a line by commit")),
    ],
)
def test_faults(way: str, stride: int, cases: tuple[str, ...]) -> None:
    tallies = matrix("--way", way, "--stride", str(stride), *(word for case in cases for word in ("--case", case)))
    assert sum(tally["points"] for tally in tallies) > 0
