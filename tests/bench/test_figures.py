"""What the bench makes of its figures."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bench.figures import Figures, Results, Space, report, table, targets
from bench.rows import BARE, COMMIT, DD, MIB, ROWS, SAME_EXTENTS, SNAPTREE, VIRSH

from bench import picture


def made_up(divisor: int = 1) -> Results:
    """Every row, with snaptree half as long beyond its start as dd takes."""
    results = Results(divisor, {"Linux": "0"})
    for row in ROWS:
        seconds = row.delta / (1024 * MIB)
        times = {SNAPTREE: [0.2 + seconds / 2] * 3, BARE: [0.2] * 3, COMMIT: [seconds, 9.0, seconds], DD: [seconds]}
        results.rows[row.name] = Figures(times, [Space(-5, 1)], {VIRSH: "it is not there"})
    return results


def test_targets_say_what_was_reached_and_what_was_not_measured() -> None:
    found = {each.what: each for each in targets(made_up())}
    assert found["ext4, 1 GiB: qemu-img commit / snaptree"].reached
    beyond = found["ext4, 1 GiB: snaptree without Python's start / dd"]
    assert beyond.value is not None and abs(beyond.value - 0.5) < 1e-9 and beyond.reached
    assert found["xfs, 1 GiB: qemu-img commit / snaptree"].reached is False
    assert found["ext4, 1 GiB: virsh / snaptree"].reached is None
    assert found["xfs, 1 GiB: MiB of room taken beyond the metadata"].reached
    assert str(found["ext4, 1 GiB: virsh / snaptree"]).startswith("not measured")
    assert len(found) == len(targets(made_up()))


def test_the_table_has_every_row_and_the_report_what_was_left_out() -> None:
    results = made_up(divisor=8)
    assert len(table(results).splitlines()) == 2 + len(ROWS)
    assert "left out in xfs: 1 GiB: virsh: it is not there" in report(results)
    assert "divided by 8" in report(results)


def test_figures_are_kept(tmp_path: Path) -> None:
    made_up().save(tmp_path / "figures.json")
    assert Results.load(tmp_path / "figures.json") == made_up()


def test_the_picture_is_drawn_when_all_is_there() -> None:
    assert picture.complete(made_up()) and not picture.complete(made_up(divisor=2))
    ElementTree.fromstring(picture.draw(made_up()))
    ElementTree.fromstring(picture.draw(Results(1, {})))


def test_a_row_that_is_a_number_of_extents_keeps_it() -> None:
    (row,) = (row for row in ROWS if row.what == SAME_EXTENTS and row.system == "xfs")
    assert row.divided(16).delta // row.divided(16).extent == row.delta // row.extent == 1024
