"""What was done to a running machine's disks by its monitor: only what it touched is blocked."""

from __future__ import annotations

import subprocess
import time

import pytest
from tests.kit.still import Still, name_in

UNHEALTHY, BUSY = 7, 5
HOW = {
    "block-stream": {"device": "vda.s2.qcow2", "base_node": "vda.qcow2"},
    "block-commit": {"top_node": "vda.s2.qcow2", "base_node": "vda.s1.qcow2"},
}


def by_hand(still: Still, command: str) -> None:
    """Merge s2's layer in the middle of the chain, behind snaptree's back."""
    with still.qmp() as qmp:
        nodes = [each for each in qmp("query-named-block-nodes", flat=True) if each["drv"] == "qcow2"]
        named = {name_in(each["file"]): each["node-name"] for each in nodes}
        words = {key: named[file] for key, file in HOW[command].items()}
        if "device" not in words:
            (disk,) = qmp("query-block")
            words["device"] = disk["inserted"]["node-name"]
        qmp(command, job_id="mine", **words)
        until = time.monotonic() + 10
        while qmp("query-jobs"):
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.mark.parametrize("command", list(HOW))
def test_b8_a_merge_by_hand(still: Still, command: str) -> None:
    for number, word in enumerate((".x", ".y", "..z"), 1):
        still(f"snapshot web1 s{number}")
        still.write(word)
    still("branch web1 other --from s1")
    still("snapshot web1 aside")
    still("delete web1 aside --merge none")
    by_hand(still, command)

    shown = still.show()
    assert shown["state"] == "paused" and "the tree knows" in shown["state_detail"]
    for line in ("snapshot web1 more", "snapshot web1 more --internal"):
        assert "(changed)" in still(line, status=UNHEALTHY).err
    found = still.findings("web1")
    (finding,) = [each for each in found if "the tree knows" in each["detail"]]
    assert "stop web1" in finding["hint"] and finding["path"] == ""
    still("delete web1 --branch other")
    said = still("delete web1 s1")
    assert "stays as it is" in said.out + said.err
    assert set(still.names()) == {"s2", "s3", "main"}
    with still.qmp() as qmp:
        assert qmp("query-status")["status"] in ("paused", "running", "prelaunch")
    assert still.shows() == "byz....."
    still("stop web1 --force")
    assert still.show()["state"] == "off"


def test_a_tip_of_another_format_is_not_known(still: Still) -> None:
    """Somebody has started QEMU on the overlay as if it were raw."""
    still("snapshot web1 s1")
    still("stop web1 --force")
    monitor = still.folder / "mine.qmp"
    words = ["qemu-system-x86_64", "-nodefaults", "-accel", "tcg", "-S", "-display", "none", "-qmp"]
    words += [f"unix:{monitor},server=on,wait=off", "-drive", f"file={still.path('main')},format=raw,if=virtio"]
    process = subprocess.Popen(words)
    try:
        still(f"set web1 --qmp {monitor}")
        until = time.monotonic() + 20
        while not monitor.exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        assert still.show()["state"] == "unknown"
        assert "may be running" in still("snapshot web1 more", status=6).err
        assert "cannot be stopped" in still("stop web1 --force", status=BUSY).err
    finally:
        process.kill()
        process.wait()
    assert still.show()["state"] == "off"


def test_one_whose_tip_is_another_can_be_stopped(still: Still) -> None:
    """snaptree has started it: it is this machine, whatever was done to its disks."""
    overlay = still.disks / "mine.qcow2"
    with still.qmp() as qmp:
        (disk,) = qmp("query-block")
        node = disk["inserted"]["node-name"]
        qmp("blockdev-snapshot-sync", node_name=node, snapshot_file=str(overlay), snapshot_node_name="mine")
    still.left.add(overlay)
    assert "may be running" in still("snapshot web1 more", status=6).err
    still("stop web1 --force")
    assert still.show()["state"] == "off"
