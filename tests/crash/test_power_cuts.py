"""A sample of the power cuts; ``scripts/reliability power`` goes through all of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tests.kit import shim
from tests.kit.disks import SMALLEST, Disk
from tests.kit.write_log import LoggedDisk, Replay, Request, State, states


def power_cuts(tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    """Run a part of it in a process of its own; skips where nothing can be mounted."""
    disk = Disk(tmp_path, "ext4", SMALLEST["ext4"])
    try:
        disk.mount()
    finally:
        disk.remove()
    return shim.rows("power", *words)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("way", "case", "stride"),
    [
        ("power cut at a sync on ext4", "revert, discard, with firmware", 7),
        ("power cut at a sync on xfs", "delete s1 of a line by commit", 9),
        ("power cut of the images' disk alone on xfs", "delete an internal one", 4),
        ("power cut at a sync of the tools on ext4", "delete s2 of a line by pull of QEMU", 1),
        ("power cut at a sync on xfs", "delete s1 of a line by reflink", 5),
        ("power cut of the images' disk alone on xfs", "delete a fork by reflink", 5),
        ("power cut, replayed on xfs", "delete s1 of a line by commit", 9),
        ("power cut, replayed on ext4", "snapshot", 5),
    ],
)
def test_the_power_fails(way: str, case: str, stride: int, tmp_path: Path) -> None:
    found = power_cuts(tmp_path, "--way", way, "--exactly", case, "--stride", str(stride))
    assert sum(tally["points"] for tally in found) > 0


def test_a_cut_takes_back_what_was_not_synced(tmp_path: Path) -> None:
    """The disk does what it says: otherwise the tests above would say nothing."""
    disk = Disk(tmp_path, "ext4", SMALLEST["ext4"])
    try:
        place = disk.mount()
        (place / "kept").write_text("kept")
        disk.sync()
        (place / "lost").write_text("lost")
        disk.shut_down()
        disk.unmount()
        disk.mount()
        assert [path.name for path in place.iterdir() if path.name != "lost+found"] == ["kept"]
    finally:
        disk.remove()


def test_a_replayed_disk_is_what_it_was(tmp_path: Path) -> None:
    disk = LoggedDisk(tmp_path, "ext4", SMALLEST["ext4"])
    try:
        place = disk.mount()
        for number in range(10):
            (place / str(number)).write_bytes(random.Random(number).randbytes(100_000))
            if number % 3 == 0:
                disk.sync()
        disk.stop()
        requests, end = disk.requests(), disk.path.read_bytes()
        assert sum(each.flush for each in requests) >= 4
        replay = Replay(disk, requests)
        replay.make(State(0))
        assert disk.path.read_bytes() != end
        replay.make(State(len(requests)))
        assert disk.path.read_bytes() == end
        replay.close()
    finally:
        disk.stop()
        disk.remove()


def test_every_flush_and_some_of_what_came_after_it() -> None:
    requests = [Request(at * 4096, 8192, 0, False) for at in range(6)]
    flush = Request(0, 0, None, True)
    row = [*requests[:2], flush, *requests[2:5], flush, requests[5]]
    found = list(states(row, 2, random.Random(1), 3))
    assert [state.flushed for state in found] == [2, *[2] * 4, *[6] * 4]
    assert [number for number, state in enumerate(found) if not state.parts][:2] == [0, 1]
    assert all(part[0] in row[state.flushed :] for state in found for part in state.parts)
    assert any(end - start < 8192 for state in found for _, start, end in state.parts)
