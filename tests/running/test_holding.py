"""What is held while an operation works on its images, and who else may have it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.images import MiB
from tests.kit.space import held

from snaptree.errors import BusyError
from snaptree.images.locks import probe
from snaptree.planning.steps import Cover
from snaptree.running.holding import Holding


@pytest.fixture
def row(tmp_path: Path) -> tuple[tuple[str, str], ...]:
    base = images.create(tmp_path / "base.qcow2", MiB)
    top = images.create(tmp_path / "top.qcow2", MiB, backing=(base, "qcow2"))
    return (str(base), "qcow2"), (str(top), "qcow2")


def inheritable() -> set[str]:
    """The files that a program would inherit which is started now."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.get_inheritable(int(name)):
                found.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return found


def test_locks_are_lent_for_the_block_only(row: tuple[tuple[str, str], ...]) -> None:
    """A program that is started later and lives on must not keep them."""
    base, top = (path for path, _ in row)
    holding = Holding()
    holding.take_steps([Cover(row, ())])
    try:
        assert not {base, top} & inheritable()
        with holding.lent([top]):
            assert {base, top} & inheritable() == {top}
        assert not {base, top} & inheritable()
    finally:
        holding.release()


def test_all_or_none(row: tuple[tuple[str, str], ...]) -> None:
    base, top = (path for path, _ in row)
    holding = Holding(patience=0.0)
    with held(Path(base)), pytest.raises(BusyError, match="base"):
        holding.take_steps([Cover(row, ())])
    assert probe(top) is None
    holding.take_steps([Cover(row, ())])
    found = probe(top)
    assert found is not None and found.writing
    holding.release()
    assert probe(top) is None


def test_what_the_machine_had_open_is_locked_when_it_has_closed_it(row: tuple[tuple[str, str], ...]) -> None:
    top = row[1][0]
    status = os.stat(top)
    holding = Holding(patience=0.0, spared=[(status.st_dev, status.st_ino)])
    with held(Path(top)), pytest.raises(BusyError, match="top"):
        holding.take_over(top)
    holding.take_over(top)
    found = probe(top)
    assert found is not None and found.writing
    holding.release()
