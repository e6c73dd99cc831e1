"""Merging by shared blocks in a QEMU that runs, attacked: killed at its calls, and again while it is recovered, twice;
QEMU dead at any command; stopped at any; no room; very deep chains; on XFS and on btrfs.

QEMU is real, with no guest in it; the test writes to its disk as the guest would.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.points import tried
from tests.kit.scene import SLOT, SLOTS, Scene
from tests.kit.space import filled, mounted
from tests.kit.stage import kill_and_wait, killed_at
from tests.kit.steps import at_command, hanging_up
from tests.kit.still import Still, placed

from snaptree.errors import SnaptreeError
from snaptree.machines.connection import Connection
from snaptree.model.tree import MAX_CHAIN
from snaptree.planning.delete import DeleteRequest

NO_SPACE, NO_STATE = 8, 11
LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]
MIDDLE, TIP = "in the middle", "into the running tip"


class Line:
    """A machine that runs, with a first snapshot, a middle one and a last, and what each shows.

    Each turn deletes one and takes another, so that all begin alike.
    """

    def __init__(self, still: Still, where: str = MIDDLE) -> None:
        self.still, self.where = still, where
        self.number = 0
        self.shown = "b......."
        self.held: dict[str, str] = {}
        for _ in range(2):
            self.grow()

    def write(self) -> None:
        """Write another letter to the next place, on every disk."""
        at, letter = self.number % SLOTS, "cdefghijklmnopqrstuvwxyz"[self.number % 24]
        self.number += 1
        for disk in self.still.targets:
            self.still.write("." * at + letter, disk)
        self.shown = self.shown[:at] + letter + self.shown[at + 1 :]

    def grow(self) -> None:
        """Take a snapshot, and write."""
        name = f"n{self.number}"
        self.still(f"snapshot web1 {name}")
        self.held[name] = self.shown
        self.write()

    def begin(self) -> str:
        """The snapshot that is to go in this turn."""
        while len(self.held) < (3 if self.where == MIDDLE else 2):
            self.grow()
        return sorted(self.held, key=lambda name: int(name[1:]))[1]

    @property
    def line(self) -> str:
        """The command that is attacked."""
        return f"delete web1 {self.begin()} --merge reflink"

    def right(self) -> None:
        """Everything kept shows what it showed; QEMU can write, and has open what the tree says."""
        still = self.still
        names = still.names()
        for gone in self.held.keys() - names.keys():
            del self.held[gone]
        assert self.held.keys() | {"main"} == names.keys()
        if still.show()["state"] == "off":
            still("start web1")
        self.write()
        for disk in still.targets:
            for name, word in {**self.held, "main": self.shown}.items():
                assert still.shows(name, disk) == word, (name, disk)
        assert opened(still) == {each["path"] for each in still.show()["layers"]}

    def settled(self) -> bool:
        """Bring what has begun to its end, and see that all is right then; whether the snapshot has gone."""
        before = len(self.held)
        self.still("recover web1")
        self.right()
        self.still("gc web1")
        self.right()
        assert not [each for each in self.still.show()["pending"] if "has stopped" not in each]
        self.still.sound()
        return len(self.held) < before


def opened(still: Still) -> set[str]:
    """The images that QEMU has open."""
    with still.qmp() as qmp:
        nodes = qmp("query-named-block-nodes", flat=True)
    return {each["file"] for each in nodes if each["drv"] == "file"}


@pytest.fixture
def place(kind: str) -> Iterator[Path]:
    """A folder on a file system that shares blocks."""
    with placed() as folder, mounted(folder, kind, 1 << 30) as found:
        yield found
        kill_and_wait(found)


def cases(*quick: tuple[object, ...], more: Iterable[tuple[object, ...]] = ((),)) -> list[object]:
    """On which file system, where, and what more: these by default, and all the others."""
    every = [(kind, where, *each) for kind in ("xfs", "btrfs") for where in (MIDDLE, TIP) for each in more]
    return [*quick, *(pytest.param(*each, marks=LONG) for each in every if each not in quick)]


@pytest.mark.root
@pytest.mark.parametrize(("kind", "where", "stride"), cases(("btrfs", MIDDLE, 67), more=[(1,)]))
def test_killed_at_its_calls_and_again_in_recovery(place: Path, where: str, stride: int) -> None:
    """Recovery is killed twice as well, at other calls each time; every second time QEMU dies with the first."""
    line, when, gone, again = Line(Still(place), where), 1, 0, 0
    while killed_at(line.still, when, line.line):
        both = bool(when // stride % 2)
        if both:
            line.still.kill_every_qemu()
        for call in (1 + when * 7 % 23, 1 + when * 5 % 17):
            again += killed_at(line.still, call, "recover web1")
        gone += line.settled()
        tried("reflink", "both are killed" if both else "snaptree is killed")
        when += stride
    assert gone > 0 and when > 40
    print(f"killed at {when // stride} calls, {again} times again, done all the same {gone} times")


@pytest.mark.root
@pytest.mark.parametrize(
    ("kind", "where", "stride", "how", "after"),
    cases(
        ("btrfs", TIP, 41, "dies", True),
        more=[(1, how, after) for how in ("dies", "hangs up") for after in (False, True)],
    ),
)
def test_qemu_dies_or_hangs_up_at_a_command(
    place: Path, where: str, stride: int, how: str, monkeypatch: pytest.MonkeyPatch, *, after: bool
) -> None:
    """When it has died the files are believed; what it had flushed is there."""
    line, number = Line(Still(place), where), 1 + stride // 2
    while True:
        words = line.line
        with monkeypatch.context() as patched:
            work = line.still.kill_every_qemu if how == "dies" else hanging_up(patched)
            came = at_command(patched, number, work, after=after)
            status = line.still.any(words)
        if not came():
            assert status == 0
            break
        assert status != 1, "unforeseen"
        line.settled()
        tried("reflink", "QEMU is killed" if how == "dies" else "it hangs up")
        number += stride
    assert number > stride


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs"])
def test_qemu_hangs_up_when_it_is_to_close_what_was_merged(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep the room of files that are gone until it ends."""
    line = Line(Still(place))
    words = line.line
    with monkeypatch.context() as patched:
        came = at_command(patched, "blockdev-del", hanging_up(patched))
        status = line.still.any(words)
    assert came() and status != 1
    assert line.settled()


@pytest.mark.root
@pytest.mark.parametrize(("kind", "where", "stride"), cases(("xfs", MIDDLE, 17), more=[(1,)]))
def test_stopped_by_its_user_at_a_command(
    place: Path, where: str, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done, or undone and waits."""
    line, number, stopped = Line(Still(place), where), 1 + stride // 2, 0
    while True:
        target, stop = line.begin(), threading.Event()
        with monkeypatch.context() as patched:
            came = at_command(patched, number, stop.set, after=False)
            connection = Connection(str(line.still.state))
            machine = connection.machine("web1")
            try:
                machine.run(DeleteRequest((target,), merge="reflink"), cancelled=stop)
            except SnaptreeError as error:
                assert error.code == "cancelled", error
                stopped += 1
        connection.database.close()
        if not came():
            break
        assert not any("interrupted" in each for each in line.still.show()["pending"])
        line.right()
        line.settled()
        number += stride
    assert stopped > 0


@pytest.mark.root
@pytest.mark.parametrize(("kind", "where"), cases())
def test_no_room(place: Path, kind: str, where: str) -> None:
    """Nothing is begun, or it is undone; with room it is done."""
    line, statuses = Line(Still(place), where), set[int]()
    for kibibytes in (0, 16, 64, 200, 1000):
        words = line.line
        with filled(place, kibibytes << 10):
            statuses.add(status := line.still.any(words))
        if status == NO_STATE:
            # What could not be written down is as after a kill.
            line.still("recover web1")
        # What the machine writes needs room as well.
        line.right()
        line.settled()
    # What snaptree keeps is on the same disk.
    assert statuses <= {0, NO_SPACE, NO_STATE}
    # btrfs has kept some for itself, which is enough for shared blocks.
    assert kind == "btrfs" or NO_SPACE in statuses


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kind", "depth"), [("xfs", 100), ("xfs", MAX_CHAIN)])
def test_a_very_deep_chain(place: Path, depth: int) -> None:
    """Layers are merged in the middle, many at once, and in another way where the tip cannot be frozen.

    So deep, QEMU takes seconds to say what it has open: as deep as may be, only the plans are looked at.
    """
    still = Deep(place, depth)
    middle = f"--base {still.disks}/layer{depth // 2}.qcow2 --top {still.disks}/layer{depth // 2 + 10}.qcow2"
    plan = still(f"squash web1 --disk vda {middle} --merge reflink --plan --json").json
    assert plan["way"] == "reflink", plan
    if depth == MAX_CHAIN:
        # No overlay can be put on the tip.
        plan = still(f"squash web1 --disk vda --base {still.disks}/layer{depth - 10}.qcow2 --plan --json").json
        assert plan["way"] and "reflink" not in plan["way"], plan
        return
    still.write("x")
    still(f"squash web1 --disk vda {middle} --merge reflink")
    assert len(still.show()["layers"]) == depth - 10 and still.shows() == "x" + still.word[1:]
    still("snapshot web1 s1")
    still.write(".y")
    for line in ("gc web1", "delete web1 s1 --merge reflink"):
        still(line)
        still.write("..z")
        assert still.shows() == "xyz" + still.word[3:]
        assert opened(still) == {each["path"] for each in still.show()["layers"]}
    assert len(still.show()["layers"]) == 1
    still.sound()


class Deep(Still):
    """A chain of so many layers, made by hand, with a letter in each of them."""

    def __init__(self, folder: Path, depth: int) -> None:
        Scene.__init__(self, folder)
        below: Path | None = None
        self.word = "." * SLOTS
        for number in range(depth):
            path, at, letter = self.disks / f"layer{number}.qcow2", number % SLOTS, chr(ord("a") + number % 26)
            words = ["-u", "-b", below.name, "-F", "qcow2"] if below is not None else []
            # What is below is opened by neither: it takes a while with so many.
            images.run("qemu-img", "create", "-q", "-f", "qcow2", *words, path, str(SLOTS * SLOT))
            alone = json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "backing": None})
            images.run("qemu-io", "-c", f"write -P {ord(letter)} {at * SLOT} {SLOT}", f"json:{alone}")
            below = path
            self.word = self.word[:at] + letter + self.word[at + 1 :]
        self.look_after([f"vda={path}"], "--adopt")
