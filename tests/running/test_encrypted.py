"""Encrypted (LUKS) disks of a machine that runs: its QEMU has their keys, and opens with them what snaptree adds.

QEMU is real, with no guest in it; the test writes to its disks as the guest would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.kit import images, luks
from tests.kit.qmp import Qmp
from tests.kit.scene import Scene
from tests.kit.still import Still, placed

from snaptree.images.facts import read_facts
from snaptree.qemu.session import QmpSession

SLOW = pytest.mark.slow


class Locked(Still):
    """The machine with encrypted disks."""

    def __init__(self, folder: Path, disks: int = 1) -> None:
        super().__init__(folder, disks, **luks.OPTIONS)

    @property
    def key(self) -> Path:
        return luks.key_file(self.folder)

    def options(self) -> str:
        return f"--key {self.key}"


@pytest.fixture
def locked() -> Iterator[Locked]:
    with placed() as folder:
        yield Locked(folder, 2)


BLOCKDEV = (
    "-object secret,id=mine,file={key} -blockdev driver=qcow2,node-name=n,encrypt.format=luks,encrypt.key-secret=mine,"
    "file.driver=file,file.filename={{vda}} -device virtio-blk-pci,drive=n,id=vda"
)
DRIVE = (
    "-object secret,id=mine,file={key} -drive file={{vda}},format=qcow2,encrypt.key-secret=mine,if=none,id=d "
    "-device virtio-blk-pci,drive=d,id=vda"
)


@pytest.fixture(params=[BLOCKDEV, DRIVE], ids=["blockdev", "drive"])
def by_hand(request: pytest.FixtureRequest) -> Iterator[Locked]:
    """It runs in a QEMU that somebody has started, and snaptree has not got the key."""
    with placed() as folder:
        scene = Locked(folder)
        scene.kill_qemu()
        scene.by_hand(request.param.format(key=scene.key))
        scene('set web1 --key ""')
        yield scene


def whole(scene: Locked, **words: str) -> None:
    assert {name: scene.shows(name) for name in scene.names()} == words
    shown = scene.show()
    assert {read_facts(each["path"], "qcow2").encrypted for each in shown["layers"]} == {True}
    assert {each for each in luks.in_the_clear(scene.folder) if not each.endswith(".memory")} == set()
    if shown["state"] != "off":
        assert scene.jobs() == {}
    scene.sound()


@pytest.mark.parametrize("way", ["auto", pytest.param("commit", marks=SLOW), pytest.param("pull", marks=SLOW)])
def test_layers_are_merged_while_it_runs(locked: Locked, way: str) -> None:
    for number, word in enumerate((".c", "..d", "...e"), 1):
        locked(f"snapshot web1 s{number}")
        locked.write(word)
    # What no guest uses is merged by the daemon, which needs the key.
    locked("branch web1 b1 --from s1")
    locked("snapshot web1 i1 --internal")
    locked("delete web1 i1")

    locked(f"delete web1 s2 --merge {way}")
    whole(locked, s1="b.......", s3="bcd.....", main="bcde....", b1="b.......")

    locked(f"delete web1 s3 --merge {way}")
    locked("delete web1 --branch b1")
    locked(f"delete web1 s1 --merge {way}")
    whole(locked, main="bcde....")
    locked.write("....f")
    locked("stop web1 --force")
    locked("gc web1")
    whole(locked, main="bcdef...")
    locked("start web1")
    whole(locked, main="bcdef...")


def test_back_to_an_instant(locked: Locked) -> None:
    """The QEMU that takes over is given the key, too."""
    assert "web1.m1.memory is not encrypted" in locked("snapshot web1 m1 --memory").out
    with locked.qmp() as qmp:
        qmp("cont")
    locked.write(".c")
    locked("snapshot web1 i1 --internal")
    locked.write("..d")

    locked("revert web1 m1 --running")
    whole(locked, m1="b.......", i1="bc......", main="b.......", **{"main.1": "bcd....."})
    locked.write("...e")
    locked("switch web1 main.1 --running")
    whole(locked, m1="b.......", i1="bc......", main="b..e....", **{"main.1": "bcd....."})
    locked("delete web1 i1 m1")
    locked("delete web1 --branch main")
    whole(locked, **{"main.1": "bcd....."})


def test_a_machine_that_could_not_be_started_again_goes_on(locked: Locked) -> None:
    """Going back starts another QEMU, with memory or without: where its key is not known nothing is touched."""
    locked("snapshot web1 s1")
    locked("snapshot web1 m1 --memory")
    locked.write(".c")
    locked("branch web1 b1 --from s1")
    locked('set web1 --key ""')
    before, shown = locked.files(), locked.show()
    for line in ("revert web1 m1 --discard", "revert web1 s1 --discard", "switch web1 b1", "revert web1 s1"):
        said = locked(line, status=6)
        assert "its key is not known" in said.err, said
        assert locked.files() == before and locked.show() == shown, line
    locked(f"set web1 --key {locked.key}")
    locked("revert web1 m1 --discard")
    whole(locked, s1="b.......", m1="b.......", main="b.......", b1="b.......")


def test_a_qemu_that_somebody_started_has_the_key(by_hand: Locked) -> None:
    """Overlays are opened with the object that the tip was opened with."""
    by_hand("snapshot web1 s1")
    by_hand.write(".c")
    by_hand("snapshot web1 s2")
    by_hand.write("..d")
    by_hand("snapshot web1 i1 --internal")
    with by_hand.qmp() as qmp:
        assert _secrets(qmp) == {"mine"}
    assert by_hand("delete web1 s1").out.count("its key") == 0
    by_hand("delete web1 i1")

    by_hand("delete web1 s2")

    assert {name: by_hand.shows(name) for name in by_hand.names()} == {"main": "bcd....."}
    assert luks.in_the_clear(by_hand.folder) == set()
    by_hand.kill_qemu()
    by_hand(f"set web1 --key {by_hand.key}")
    by_hand("gc web1")
    whole(by_hand, main="bcd.....")


def test_a_key_is_given_where_qemu_does_not_tell_which_it_has(by_hand: Locked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chain that is deep it tells only the beginning. Without a key nothing is touched."""
    monkeypatch.setattr("snaptree.qemu.graph._secret", lambda name: "")
    before = by_hand.files()

    said = by_hand("snapshot web1 s1", status=6)

    assert "its key is not known" in said.err
    assert by_hand.files() == before and by_hand.show()["pending"] == []
    by_hand(f"set web1 --key {by_hand.key}")
    by_hand("snapshot web1 s1")
    by_hand.write(".c")
    with by_hand.qmp() as qmp:
        assert len(_secrets(qmp)) == 2
    assert {name: by_hand.shows(name) for name in by_hand.names()} == {"s1": "b.......", "main": "bc......"}


def test_an_object_that_somebody_has_deleted(by_hand: Locked) -> None:
    """QEMU needs it only to open an image: the key that is known is given to it, if any is."""
    with by_hand.qmp() as qmp:
        qmp("object-del", id="mine")
    before = by_hand.files()
    assert "its key is not known" in by_hand("snapshot web1 s1", status=6).err
    assert by_hand.files() == before
    wrong = by_hand.folder / "wrong"
    wrong.write_text(luks.PASSPHRASE)
    by_hand(f"set web1 --key {wrong}")
    wrong.write_text("sesam")

    said = by_hand("snapshot web1 s1", status=6)

    assert "does not open it" in said.err and by_hand.files() == before, said
    with by_hand.qmp() as qmp:
        assert _secrets(qmp) == set()
    wrong.write_text(luks.PASSPHRASE)
    by_hand("snapshot web1 s1")
    by_hand.write(".c")
    by_hand("delete web1 s1")
    assert by_hand.shows() == "bc......"


@pytest.mark.parametrize("line", ["delete web1 s1 --merge commit", "snapshot web1 i1 --internal"])
def test_qemu_is_killed_and_nobody_has_given_the_key(by_hand: Locked, line: str) -> None:
    """What it left between takes the key to be put right; that can be given then."""
    by_hand("snapshot web1 s1")
    by_hand.write(".c")
    by_hand("snapshot web1 s2")
    by_hand.write("..d")

    def arrange(kill: Callable[[], None]) -> None:
        execute = QmpSession.execute

        async def executing(self: QmpSession, command: str, **words: Any) -> Any:
            if command in ("job-finalize", "transaction"):
                by_hand.kill_every_qemu()
                kill()
            return await execute(self, command, **words)

        setattr(QmpSession, "execute", executing)  # noqa: B010

    by_hand.killed(line, arrange)
    said = by_hand("recover web1", status=6)
    assert "its key is not known" in said.err, said

    by_hand(f"set web1 --key {by_hand.key}")

    by_hand("gc web1")
    words = {"s1": "b.......", "s2": "bc......", "main": "bcd....."}
    whole(by_hand, **{name: word for name, word in words.items() if f"delete web1 {name} " not in line})


def _secrets(qmp: Qmp) -> set[str]:
    return {each["name"] for each in qmp("qom-list", path="/objects") if "secret" in each["type"]}


class Mixed(Locked):
    """A machine whose disks the test makes."""

    def __init__(self, folder: Path) -> None:
        Scene.__init__(self, folder)


def test_plain_layers_under_an_encrypted_one_are_shared() -> None:
    """The guest's encrypted layer is reopened on what was built, with its key."""
    with placed("xfs") as folder:
        scene = Mixed(folder)
        scene.image("base.qcow2", word="b")
        scene.image("middle.qcow2", word=".c", backing="base.qcow2")
        scene.image("web1.qcow2", word="..d", backing="middle.qcow2", **luks.OPTIONS)
        scene.look_after(["vda=web1.qcow2"], "--adopt")
        said = scene("squash web1 --top middle.qcow2 --merge reflink")

        assert "shar" in said.out, said
        assert scene.chain() == ["web1.qcow2", "middle.qcow2"]
        scene.write("...e")
        assert scene.shows() == "bcde...."
        assert images.problems(scene.disks / "middle.qcow2") == {}
        scene("stop web1 --force")
        assert scene.shows() == "bcde...."
        scene.sound()
