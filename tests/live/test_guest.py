"""The guest itself: what it says it has flushed is there, and a disk that is no prefix of its records is found out."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.kit import guest, images
from tests.kit.guest import DISKS, Boot
from tests.kit.qmp import Qmp
from tests.kit.records import SIZE, read_records, slot


def test_what_the_guest_has_flushed_is_on_its_disks(boot: Boot, place: Path) -> None:
    words = guest.with_disks(boot.words(place), place)
    running = guest.launch([*words, "-qmp", f"unix:{place}/qmp,server=on,wait=off"], place)
    assert running.process is not None
    try:
        running.go()
        flushed = running.writes_on()
        with Qmp(place / "qmp") as qmp:
            qmp("system_powerdown")
        running.process.wait(guest.SECONDS)
        assert any(line.startswith("D ") for line in running.lines())
    finally:
        guest.end(running.process)
    last = [read_records(images.read(place / f"{disk}.qcow2"), number).prefix for number, disk in enumerate(DISKS)]
    assert last[0] == last[1] == running.flushed() >= flushed > 0
    assert running.stall() > 0


@pytest.mark.parametrize("fault", ["lost", "torn", "old", "of the other disk", "elsewhere"])
def test_a_disk_that_holds_no_prefix_is_found_out(boot: Boot, place: Path, fault: str) -> None:
    content = bytearray(_written(boot, place))
    assert read_records(bytes(content), 0).prefix > 8
    at = slot(5) * SIZE
    match fault:
        case "lost":
            content[at : at + SIZE] = bytes(SIZE)
        case "torn":
            content[at + 512 : at + SIZE] = bytes(SIZE - 512)
        case "old":
            content[at : at + SIZE] = content[slot(4) * SIZE :][:SIZE]
        case "elsewhere":
            content[slot(4000) * SIZE : slot(4000) * SIZE + SIZE] = content[at : at + SIZE]
    with pytest.raises(AssertionError):
        _ = read_records(bytes(content), 1 if fault == "of the other disk" else 0).prefix


_CONTENT: dict[Path, bytes] = {}


def _written(boot: Boot, place: Path) -> bytes:
    """The first disk after the guest has written a little to it."""
    if boot.memory not in _CONTENT:
        running = guest.launch(guest.with_disks(boot.words(place), place, "raw"), place)
        assert running.process is not None
        try:
            running.go()
            running.hold()
        finally:
            guest.end(running.process)
        _CONTENT[boot.memory] = (place / "vda.raw").read_bytes()
    return _CONTENT[boot.memory]
