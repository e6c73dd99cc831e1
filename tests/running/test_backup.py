"""A job of somebody's on a disk of a machine that runs: ``blockdev-backup``, which backup programs use, or a mirror."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from tests.kit import images
from tests.kit.qmp import Qmp
from tests.kit.scene import SLOT, SLOTS, word_of
from tests.kit.steps import at_command
from tests.kit.still import Still, name_in


def back_up(still: Still, of: str) -> None:
    """Have QEMU copy an image, to the end, and wait to be told that this is all."""
    target = images.create(still.folder / "target.qcow2", SLOTS * SLOT)
    with still.qmp() as qmp:
        told = [each for each in qmp("query-named-block-nodes", flat=True) if each["drv"] == "qcow2"]
        (node,) = [each["node-name"] for each in told if name_in(each["file"]) == of]
        file = {"driver": "file", "filename": str(target)}
        qmp("blockdev-add", driver="qcow2", node_name="target", file=file)
        words = {"device": node, "target": "target", "sync": "full"}
        qmp("blockdev-backup", job_id="mine", auto_finalize=False, **words)


@pytest.mark.parametrize(("of", "was"), [("vda.s2.qcow2", "bxy....."), ("vda.s1.qcow2", "bx......")])
def test_the_machine_is_known_and_nothing_is_merged_beside_it(still: Still, of: str, was: str) -> None:
    for name, word in (("s1", ".x"), ("s2", "..y")):
        still(f"snapshot web1 {name}")
        still.write(word)
    back_up(still, of)
    assert still.show()["state"] == "paused"
    said = still("delete web1 s2 --merge pull")
    assert "the backup job mine" in said.out + said.err and "disk detach" not in said.out + said.err
    assert set(still.jobs()) == {"mine"}
    still("snapshot web1 s3")
    still.write("...z")
    with still.qmp() as qmp:
        qmp("job-finalize", id="mine")
    still("gc web1")
    assert still.show()["pending"] == [] and still.shows() == "bxyz...." and still.jobs() == {}
    with still.qmp() as qmp:
        qmp("blockdev-del", node_name="target")
    assert word_of(images.read_unlocked([(str(still.folder / "target.qcow2"), "qcow2")], None)) == was
    still.sound()


def test_nothing_is_reopened_beside_it(still: Still) -> None:
    still("snapshot web1 i --internal")
    still("snapshot web1 s1")
    back_up(still, "vda.s1.qcow2")
    assert "backup job mine" in still("delete web1 i", status=6).err
    assert "i" in still.names() and still.opened()["vda.qcow2"] == "reading"
    still.sound()


SLOWED = "driver=throttle,node-name=slowed,throttle-group=slow,file"
ROOT = (
    "-object throttle-group,id=slow,x-bps-read=1024 -blockdev driver=qcow2,node-name=n,file.driver=file,"
    f"file.filename={{vda}} -blockdev {SLOWED}=n -device virtio-blk-pci,drive=slowed,id=vda"
)
"""The disk is read through a filter that slows it down."""


def slow_back_up(still: Still, through: str) -> None:
    """Have QEMU copy the disk more slowly than the test lasts: what it reads, or writes, goes through such a filter."""
    target = images.create(still.folder / "target.qcow2", SLOTS * SLOT)
    with still.qmp() as qmp:
        (root,) = [each["inserted"]["node-name"] for each in qmp("query-block") if "inserted" in each]
        file = {"driver": "file", "filename": str(target)}
        qmp("blockdev-add", driver="qcow2", node_name="target", file=file)
        if through == "target":
            qmp("object-add", qom_type="throttle-group", id="slow", limits={"bps-write": 1024})
            qmp("blockdev-add", driver="throttle", node_name="slowed", throttle_group="slow", file="target")
        words = {"device": root, "target": "slowed" if through == "target" else "target", "sync": "full"}
        qmp("blockdev-backup", job_id="mine", **words)


@pytest.mark.parametrize("through", ["root", "target"])
def test_one_that_goes_through_a_throttle(still: Still, through: str) -> None:
    """Nothing is merged or reopened beside it, whatever filters lie between, nor does anything wait for it."""
    still("snapshot web1 i --internal")
    for name, word in (("s1", ".x"), ("s2", "..y")):
        still(f"snapshot web1 {name}")
        still.write(word)
    still("snapshot web1 tip --internal")
    if through == "root":
        still.kill_qemu()
        still.by_hand(ROOT)
    slow_back_up(still, through)
    for name in ("i", "tip"):
        assert "job mine" in still(f"delete web1 {name}", status=6).err
    for line in ("delete web1 s1", "gc web1"):
        began, said = time.monotonic(), still.command(line).communicate(timeout=60)[0]
        assert "mine" in said and time.monotonic() - began < 20, said
    assert still.jobs() == {"mine": "running"} and len(still.show()["layers"]) == 3
    still.kill_qemu()
    for name in ("i", "tip", "s2"):
        still(f"delete web1 {name}")
    still("gc web1")
    assert still.shows() == "bxy....." and len(still.show()["layers"]) == 1
    still.sound()


# ---- a mirror ------------------------------------------------------------------------------------------------------


def mirror(still: Still, status: str) -> None:
    """Have QEMU copy the disk for somebody, who has come to so far with it."""
    with still.qmp() as qmp:
        (top,) = [each["inserted"]["node-name"] for each in qmp("query-block") if "inserted" in each]
        target = {"driver": "null-co", "node-name": "nothing", "size": SLOTS * SLOT, "read-zeroes": True}
        qmp("blockdev-add", **target)
        speed = {"speed": 4096} if status == "running" else {}
        words = {"device": top, "target": "nothing", "sync": "full", **speed}
        qmp("blockdev-mirror", job_id="mine", auto_finalize=False, **words)
        if status == "pending":
            comes_to(qmp, "ready")
            qmp("job-complete", id="mine")
        comes_to(qmp, status)


def comes_to(qmp: Qmp, *status: str) -> None:
    """Wait until the job is at that, or has gone."""
    until = time.monotonic() + 20
    while (found := [each["status"] for each in qmp("query-jobs")]) != [*status]:
        assert time.monotonic() < until, found
        time.sleep(0.01)


def end(still: Still) -> None:
    """Cancel somebody's mirror."""
    with still.qmp() as qmp:
        qmp("job-cancel", id="mine")
        comes_to(qmp)


@pytest.mark.parametrize("status", ["running", "ready", "pending"])
def test_an_internal_snapshot_of_the_tip_keeps_its_name_beside_it(still: Still, status: str) -> None:
    """QEMU would refuse, and only when the name has gone; that of a layer beneath goes."""
    still("snapshot web1 below --internal")
    still("snapshot web1 s1")
    still.write(".x")
    still("snapshot web1 i --internal")
    still.write("..y")
    mirror(still, status)
    before = still.tags()
    for words in ("i --plan", "i", "s1 --children"):
        said = still(f"delete web1 {words}", status=6).err
        assert "job mine" in said and "'i'" in said and "vda.s1.qcow2" in said
    assert still.tags() == before and still.show()["pending"] == [] and {"i", "s1"} <= set(still.names())
    still("delete web1 below")
    assert set(still.jobs()) == {"mine"}
    end(still)
    assert (still.shows("s1"), still.shows("i"), still.shows()) == ("b.......", "bx......", "bxy.....")
    still("delete web1 i")
    assert still.tags() == {} and still.shows() == "bxy....." and still.show()["pending"] == []
    still.sound()


@pytest.mark.parametrize("status", ["running", "ready"])
def test_nothing_is_merged_into_the_tip_beside_it(still: Still, status: str) -> None:
    """QEMU would refuse with words that nobody understands; the name goes, and the merge is told to wait."""
    still("snapshot web1 s1")
    still.write(".x")
    mirror(still, status)
    for way in ("commit", "pull", "reflink", "auto"):
        assert "job mine" in str(still(f"delete web1 s1 --merge {way} --plan --json").json["notes"])
    assert "job mine" in (said := still("delete web1 s1")).out + said.err
    assert set(still.jobs()) == {"mine"} and set(still.names()) == {"main"} and len(still.show()["layers"]) == 2
    end(still)
    still("gc web1")
    assert len(still.show()["layers"]) == 1 and still.shows() == "bx......"
    still.sound()


DELETE = "blockdev-snapshot-delete-internal-sync"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("status", ["running", "ready", "pending"])
def test_one_that_was_begun_since_a_kill_is_waited_for(still: Still, status: str, *, after: bool) -> None:
    """Told to flush a disk whose requests wait until a mirror is finalized, QEMU would never answer again."""
    still("snapshot web1 i --internal")
    still.write(".x")

    def deleting(kill: Callable[[], None]) -> None:
        at_command(pytest.MonkeyPatch(), DELETE, kill, after=after)

    still.killed("delete web1 i", deleting)
    mirror(still, status)
    harmless = after and status != "pending"
    said = still("recover web1", status=0 if harmless else 5)
    assert harmless or "job mine" in said.err
    assert set(still.jobs()) == {"mine"}, "it answers"
    end(still)
    still("recover web1")
    assert "i" not in still.names() and still.tags() == {} and still.show()["pending"] == []
    assert still.shows() == "bx......"
    still.sound()
