"""A disk that is a block device: what stands on it are files elsewhere, and it is never written to by a merge."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.kit.scene import Scene

pytestmark = pytest.mark.root
REFUSED = 6


def test_a_disk_that_is_a_block_device(scene: Scene, device: Path) -> None:
    scene(f"add web1 --disk vda={device},format=raw")
    said = scene("snapshot web1 s1", status=REFUSED)
    assert f"{device} is a block device" in said.err and "--file vda=" in said.err
    scene(f"snapshot web1 s1 --file vda={scene.disks}/first.qcow2")
    scene.write(".1")
    scene("snapshot web1 s2")
    scene.write("..2")
    assert scene.path("main") == scene.disks / f"{device.name}.s2.qcow2", "later ones are put beside the first"
    scene("snapshot web1 s3")
    scene.write("...3")
    scene("delete web1 s2")
    assert len(scene.chain()) == 3
    scene("revert web1 s1")
    assert [scene.shows(name) for name in ("s1", "s3", "main", "main.1")] == [
        "b.......", "b12.....", "b.......", "b123....",
    ]  # fmt: skip
    scene.sound()

    scene("delete web1 --branch main.1")
    scene("delete web1 s3")
    scene.write(".......x")
    said = scene("delete web1 s1")
    assert f"{device} stays as it is" in said.out or f"{device} is a block device" in said.out
    assert scene.shows() == "b......x" and len(scene.chain()) == 2
    scene.sound()
    assert not list(Path("/dev").glob(f"{device.name}.*")), "nothing is kept in /dev"


def test_it_is_the_disk_again_when_what_was_done_is_thrown_away(scene: Scene, device: Path) -> None:
    scene(f"add web1 --disk vda={device},format=raw")
    scene(f"snapshot web1 s1 --file vda={scene.disks}/first.qcow2")
    scene.write("xxxx")
    scene("revert web1 s1 --discard --delete")
    assert scene.path("main") == device and scene.shows() == "b......."
    scene.write(".y")
    assert scene.shows() == "by......"
    assert scene.files() == {"disk.raw"}
    scene.sound()
