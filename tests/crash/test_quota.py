"""A real quota, of a btrfs subvolume, that is used up in the middle of a merge: what is kept stays whole, and with more
of it the merge goes on."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.images import MiB
from tests.kit.scene import Scene
from tests.kit.space import mounted

pytestmark = pytest.mark.root
NO_SPACE = 8
DISKS = ("vda", "vdb")


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A subvolume that may take 300 MiB."""
    if shutil.which("btrfs") is None:
        pytest.skip("btrfs is not installed")
    with mounted(tmp_path, "btrfs", 600 * MiB) as place:
        subprocess.run(["btrfs", "quota", "enable", place], check=True)
        subprocess.run(["btrfs", "-q", "subvolume", "create", place / "volume"], check=True)
        allow(place / "volume", 300)
        yield place / "volume"


def allow(volume: Path, mebibytes: int) -> None:
    """Let the subvolume take so many MiB."""
    # What is still to be written has not been counted yet.
    subprocess.run(["sync", "-f", volume], check=True)
    subprocess.run(["btrfs", "qgroup", "limit", f"{mebibytes}M", volume], check=True)


@pytest.mark.parametrize(
    ("way", "compressed"),
    [
        *(("commit", False), ("pull", True)),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("commit", True), ("pull", False))),
    ],
)
def test_a_quota_is_used_up_in_a_merge(tmp_path: Path, volume: Path, way: str, *, compressed: bool) -> None:
    """What is moved comes from elsewhere, as within btrfs it would be shared. QEMU moves what is compressed."""
    scene = Scene(tmp_path)
    elsewhere, scene.disks = scene.disks, volume
    for disk in DISKS:
        images.create(volume / f"{disk}.qcow2", 64 * MiB)
        images.io(volume / f"{disk}.qcow2", "qcow2", "write -P 1 0 20M")
    scene("add web1 --disk vda=vda.qcow2 --disk vdb=vdb.qcow2")
    far = "s1" if way == "pull" else "s2"
    for number, name in enumerate(("s1", "s2"), 2):
        files = (f"--file {disk}={elsewhere}/{disk}.qcow2" for disk in DISKS)
        scene(f"snapshot web1 {name} {' '.join(files) if name == far else ''}")
        for disk in DISKS:
            lines = [f"write -P {number} {10 + 10 * number}M 20M", *(["write -c -P 5 62M 64k"] * compressed)]
            images.io(scene.path("main", disk), "qcow2", *lines)
    wanted = {(name, disk): images.read(scene.path(name, disk)) for name in ("s1", "main") for disk in DISKS}

    def whole() -> None:
        for (name, disk), content in wanted.items():
            assert images.read(scene.path(name, disk)) == content, (name, disk)

    plan = scene(f"delete web1 s2 --merge {way} --plan").out
    assert ("by QEMU" in plan) == compressed
    # Above what it has by now, 5 MiB.
    allow(volume, 87)
    said = scene(f"delete web1 s2 --merge {way}", status=NO_SPACE).err
    # There is no room either for what would undo it, as btrfs writes nothing in its place.
    assert "quota exceeded" in said and "everything kept is whole; 'snaptree " in said, said
    assert "s2" not in scene.names()
    whole()
    # It may go on the other way, where there is room.
    assert scene.any("gc web1") in (0, NO_SPACE)
    whole()
    allow(volume, 300)
    scene("gc web1")
    whole()
    assert len(scene.show()["layers"]) == 4 and scene.show()["pending"] == []
    assert [each for each in scene.findings() if each["severity"] == "error"] == []
