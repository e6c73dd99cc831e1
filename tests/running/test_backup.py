"""A backup job of somebody's (``blockdev-backup``, as backup programs run) on a disk of a machine that runs."""

from __future__ import annotations

import pytest
from tests.kit import images
from tests.kit.scene import SLOT, SLOTS, word_of
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
