"""A sample of the crash matrix; ``scripts/reliability`` goes through all of it."""

from __future__ import annotations

import shutil

import pytest
from tests.crash.cases import CASES
from tests.kit import shim

PARTS = 6


@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))])
def test_killed_at_calls_of_every_operation(part: int) -> None:
    """Each runs to its end, too, and of all of it every call is followed (``tests/crash/audit.py``)."""
    cases = list(CASES)[part::PARTS]
    tallies = shim.rows("audit", "--stride", "127", *(word for case in cases for word in ("--exactly", case)))
    assert [tally["case"] for tally in tallies] == cases
    assert sum(tally["words"] for tally in tallies) > 1000 / PARTS
    assert sum(tally["points"] for tally in tallies) > 60 / PARTS


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("way", "stride", "cases"),
    [
        ("kill again while recovering", 41, ("delete s1 of a line by auto", "revert with firmware")),
        ("kill the tools", 13, ("delete s1 of a line by commit", "internal snapshot")),
        ("kill both", 5, ("delete s2 of a line by pull",)),
        ("EIO of the tools", 5, ("delete s2 of a line by pull", "internal snapshot")),
        ("EIO for good", 41, ("snapshot of one disk", "revert within the tip, discard")),
        pytest.param("EIO once", 41, ("delete s1 of a line by commit", "branch from here"), marks=pytest.mark.slow),
        ("EIO of every sync, for good", 3, ("internal snapshot",)),
        pytest.param(
            "EIO of the tools, for good", 7, ("delete s1 of a line by commit of QEMU",), marks=pytest.mark.slow
        ),
        pytest.param(
            "EIO of the tools while reading",
            41,
            ("delete s2 of a line by pull of QEMU", "internal snapshot"),
            marks=pytest.mark.slow,
        ),
        ("EIO while reading, for good", 41, ("internal snapshot", "delete an internal one")),
        pytest.param("EIO while reading", 41, ("switch", "delete s1 of a line by pull"), marks=pytest.mark.slow),
        ("ENOSPC for good", 41, ("snapshot with firmware", "delete s1 of a line by commit")),
    ],
)
def test_faults(way: str, stride: int, cases: tuple[str, ...]) -> None:
    chosen = [word for case in cases for word in ("--case", case)]
    tallies = shim.rows("matrix", "--way", way, "--stride", str(stride), *chosen)
    assert sum(tally["points"] for tally in tallies) > 0


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_killed_by_strace() -> None:
    """The library sees calls of the C library's only; the kernel's own are counted here."""
    (tally,) = shim.rows("traced", "--exactly", "delete s1 of a line by commit", "--stride", "9")
    assert tally["points"] > 0
