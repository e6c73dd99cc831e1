"""Merging by shared blocks under a QEMU that was started with ``-drive``, whose nodes have names that it has made up.

QEMU is real, with no guest in it; the test writes to its disk as the guest would.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from tests.kit.points import tried
from tests.kit.programs import dies
from tests.kit.stage import processes_of
from tests.kit.still import Still, name_in, standing
from tests.running.test_live_internals import Places, right

FAILED = 12
DRIVE = (
    "-drive file={vda},format=qcow2,if=none,id=d,cache=none,aio=native,discard=unmap,detect-zeroes=unmap,"
    "l2-cache-size=256k -device virtio-blk-pci,drive=d,id=vda"
)
HEADER = "-blockdev driver=qcow2,node-name=n,file.driver=file,file.filename={vda} -device virtio-blk-pci,drive=n,id=vda"
KEPT = {"s1": "b.......", "s2": "bc......", "s3": "bcd.....", "main": "bcde...."}


@pytest.fixture
def driven() -> Iterator[Still]:
    """s1, s2 and s3, on a file system that can share blocks; QEMU has all that the tip stands on by its headers."""
    with standing(on="xfs") as still:
        _take(still, "c", ".d", "..e")
        _restart(still, DRIVE)
        yield still


def _take(still: Still, *words: str) -> None:
    for number, word in enumerate(words, 1):
        still(f"snapshot web1 s{number}")
        still.write("." + word)


def _restart(still: Still, words: str) -> None:
    still.kill_qemu()
    still.by_hand(words)


def whole(still: Still, *gone: str, **more: str) -> None:
    wanted = {name: word for name, word in {**KEPT, **more}.items() if name not in gone}
    assert {name: still.shows(name) for name in still.names()} == wanted
    right(still)


Looks: TypeAlias = dict[str, tuple[Any, Any, bool]]


def looks(still: Still) -> Looks:
    """How QEMU has each image open: its cache, whether it looks for zeroes, and whether past the host's cache."""
    (process,) = processes_of(still.folder)
    with still.qmp() as qmp:
        nodes = [each for each in qmp("query-named-block-nodes", flat=True) if each["drv"] == "qcow2"]
    direct = dict[str, bool]()
    for number in os.listdir(f"/proc/{process}/fd"):
        with suppress(OSError):
            name = os.path.basename(os.readlink(f"/proc/{process}/fd/{number}"))
            flags = Path(f"/proc/{process}/fdinfo/{number}").read_text().split("flags:")[1].split()[0]
            direct[name] = bool(int(flags, 8) & os.O_DIRECT) and direct.get(name, True)
    names = [name_in(each["file"]) for each in nodes]
    assert len(set(names)) == len(names)
    return {name: (each["cache"], each["detect_zeroes"], direct[name]) for name, each in zip(names, nodes, strict=True)}


@pytest.mark.parametrize("name", [pytest.param("s1", marks=pytest.mark.slow), "s2", "s3"])
@pytest.mark.parametrize("words", [DRIVE, pytest.param(HEADER, marks=pytest.mark.slow)], ids=["drive", "headers"])
def test_blocks_are_shared_and_options_kept(name: str, words: str) -> None:
    with standing(on="xfs") as still:
        _take(still, "c", ".d", "..e")
        _restart(still, words)
        before = looks(still)
        plan = still(f"delete web1 {name} --merge reflink --plan --json").json
        assert "reflink" in (plan["way"] or ""), plan["notes"]
        still(f"delete web1 {name} --merge reflink")
        still.write(".....x")
        whole(still, name, main="bcde.x..")
        assert len(still.show()["layers"]) == 3
        assert looks(still).items() <= before.items()
        # What has taken another's place is known when its turn comes.
        for other in sorted(set(KEPT) - {name, "main"}):
            plan = still(f"delete web1 {other} --merge reflink --plan --json").json
            assert "reflink" in (plan["way"] or ""), plan["notes"]
            still(f"delete web1 {other} --merge reflink")
        still.write("......y")
        whole(still, "s1", "s2", "s3", main="bcde.xy.")
        assert len(still.show()["layers"]) == 1 and looks(still).items() <= before.items()
        still.kill_qemu()
        whole(still, "s1", "s2", "s3", main="bcde.xy.")


@pytest.mark.parametrize("name", ["s2", "s3"])
def test_qemu_refuses_and_all_is_as_before(driven: Still, name: str) -> None:
    """A job of somebody's holds the links of the chain; what was made for it is closed again, or waits for its end."""
    with driven.qmp() as qmp:
        qmp("block-stream", job_id="mine", device="d", speed=1)
    before = driven.opened()
    said = driven(f"delete web1 {name} --merge reflink", status=FAILED if name == "s2" else 0)
    assert name == "s2" or "the job mine of its QEMU" in said.out
    with driven.qmp() as qmp:
        assert [each["id"] for each in qmp("query-jobs")] == ["mine"]
        ours = [each["node-name"] for each in qmp("query-named-block-nodes") if not each["node-name"].startswith("#")]
        qmp("block-job-cancel", device="mine", force=True)
    assert driven.opened() == before and not [each for each in ours if each.startswith("s")]
    driven.write(".....x")
    driven("gc web1")
    whole(driven, name, main="bcde.x..")


def test_options_that_are_not_understood_are_left_as_they_are() -> None:
    """What the guest writes to is not opened anew without them; what it only reads has none."""
    with standing(on="xfs") as still:
        _take(still, "c", ".d", "..e")
        _restart(still, DRIVE.replace("aio=native", "aio=native,throttling.bps-write=100000000"))
        notes = still("delete web1 s3 --merge reflink --plan --json").json["notes"]
        assert any("is not known" in each for each in notes)
        still("delete web1 s2 --merge reflink")
        whole(still, "s2")
        assert len(still.show()["layers"]) == 3


LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("place", "also", "every"),
    [
        ("tip", "qemu", 127),
        *(pytest.param(place, also, 2, marks=LONG) for place in ("middle", "tip") for also in ("", "qemu")),
    ],
)
def test_killed_while_it_goes_over(driven: Still, place: str, also: str, every: int) -> None:
    wanted, lost = KEPT, 0
    places = Places(every)
    for number, arrange in enumerate(places):
        letter, names = "klmnopqr"[number % 8], (f"a{number}", f"b{number}")
        for at, name in enumerate(names):
            driven(f"snapshot web1 {name}")
            driven.write("." * (4 + at) + letter)
        wanted = {each: driven.shows(each) for each in driven.names()}
        _restart(driven, DRIVE)
        gone = names[0 if place == "middle" else 1]
        died = places.died = dies(partial(driven, f"delete web1 {gone} --merge reflink"), arrange)
        driven.write(f".......{letter}")
        wanted["main"] = f"{wanted['main'][:7]}{letter}"
        if also:
            driven.kill_qemu()
        driven("recover web1")
        there = gone in driven.names()
        assert died or not there
        lost += not there
        if not there:
            del wanted[gone]
        assert {each: driven.shows(each) for each in driven.names()} == wanted
        driven("gc web1")
        assert {each: driven.shows(each) for each in driven.names()} == wanted
        right(driven)
        tried("reflink", "both are killed" if also else "snaptree is killed", int(died))
        if not also:
            with driven.qmp() as qmp:
                nodes = [each["node-name"] for each in qmp("query-named-block-nodes")]
            assert not [each for each in nodes if each.startswith(("sv", "sh"))]
        left = sorted(set(driven.names()) & set(names))
        if also:
            driven.by_hand(DRIVE)
        driven(f"delete web1 {' '.join(left)}") if left else None
        wanted = {each: word for each, word in wanted.items() if each not in left}
    assert lost
