"""A block device goes by the name that it was given, a link such as ``/dev/vg/lv``: its number is another one's after
the next boot."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.disks import loop_device
from tests.kit.scene import SLOT, SLOTS, Scene

pytestmark = pytest.mark.root
REFUSED = 6


@pytest.fixture
def volume(scene: Scene, device: Path) -> Path:
    """A link to the device, as ``/dev/vg/lv`` is one to ``/dev/dm-3``."""
    link = scene.folder / "vg-lv"
    link.symlink_to(device)
    return link


def booted(volume: Path, other: Path) -> None:
    """As after a boot: the volume has another number, and a stranger's has the one that it had."""
    device = volume.readlink()
    other.write_bytes(device.read_bytes())
    device.write_bytes(b"x" * SLOTS * SLOT)
    volume.unlink()
    volume.symlink_to(other)


def test_a_volume_has_another_number_after_a_boot(scene: Scene, volume: Path) -> None:
    other = scene.image("other.raw", "raw")
    scene.left.add(other)
    with loop_device(other) as second:
        scene(f"add web1 --disk vda={volume},format=raw")
        scene(f"snapshot web1 s1 --file vda={scene.disks}/first.qcow2")
        scene.write(".1")
        scene("snapshot web1 s2")
        assert images.info(scene.path("s2"))["backing-filename"] == str(volume)
        assert scene.path("s1") == volume
        booted(volume, second)
        assert [scene.shows(name) for name in ("s1", "s2", "main")] == ["b.......", "b1......", "b1......"]
        scene.sound()
        scene("revert web1 s1")
        scene.write("..2")
        scene("delete web1 s2")
        assert scene.shows() == "b.2....."
        scene.sound()
        scene("revert web1 s1 --discard --delete")
        assert scene.path("main") == volume and scene.shows() == "b......."
        assert scene.files() == {"disk.raw", "other.raw"}
        scene.sound()


def test_a_header_may_name_a_volume_by_any_of_its_links(scene: Scene, volume: Path) -> None:
    """Such as the one of its number, until that is another's."""
    other = scene.image("other.raw", "raw")
    scene.left.add(other)
    scene(f"add web1 --disk vda={volume},format=raw")
    scene(f"snapshot web1 s1 --file vda={scene.disks}/first.qcow2")
    images.run("qemu-img", "rebase", "-q", "-u", "-b", volume.resolve(), "-F", "raw", scene.path("main"))
    scene("snapshot web1 s2")
    scene.sound()
    with loop_device(other) as second:
        volume.unlink()
        volume.symlink_to(second)
        assert "as its backing file, not" in scene("verify web1", status=10).out


def test_a_device_is_not_removed_with_the_machine(scene: Scene, volume: Path) -> None:
    scene(f"add web1 --disk vda={volume},format=raw")
    assert f"{volume} stays: it is a block device" in scene("remove web1 --delete-files --yes").out
    assert volume.is_symlink() and volume.is_block_device()


def test_a_link_in_the_folder_is_no_way_to_a_device(scene: Scene, device: Path) -> None:
    """What a header names is looked for where it leads to: a guest's overlay is not to show the host's disks."""
    link = scene.disks / "link"
    link.symlink_to(device)
    images.create(scene.disks / "web1.qcow2", SLOTS * SLOT, backing=(link, "raw"))
    assert "which is in another folder" in scene("add web1 --disk vda=web1.qcow2", status=REFUSED).err
    scene(f"add web1 --disk vda=web1.qcow2 --base {device}")
    assert scene.shows() == "b......."
