"""Images that are encrypted in qcow2's old way are refused before anything is touched, and stay as they are."""

from __future__ import annotations

import pytest
from tests.kit import images, luks
from tests.kit.rights import picture
from tests.kit.scene import SLOT, Scene


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Such an image, with an internal snapshot ``i1``."""
    path = tmp_path_factory.mktemp("old") / "old.qcow2"
    options = "encrypt.format=aes,encrypt.key-secret=key"
    images.run("qemu-img", "create", "-q", "-f", "qcow2", *luks.KEY, "-o", options, path, str(8 * SLOT))
    graph = f"driver=qcow2,encrypt.key-secret=key,file.filename={path}"
    images.run("qemu-img", "snapshot", *luks.KEY, "--image-opts", "-c", "i1", graph)
    images.run("qemu-io", *luks.KEY, "-c", f"write -P 65 0 {SLOT}", "--image-opts", graph)
    return path.read_bytes()


def test_they_are_refused(web1: Scene, old: bytes) -> None:
    (web1.disks / "old.qcow2").write_bytes(old)
    plain = web1.image("plain.qcow2")
    images.run("qemu-img", "rebase", "-u", "-b", "old.qcow2", "-F", "qcow2", plain)
    before = picture(web1.folder)
    for line in (
        "add web2 --disk vda=old.qcow2",
        "add web2 --disk vda=plain.qcow2",
        "add web2 --disk vda=plain.qcow2 --adopt",
        "add web2 --disk vda=old.qcow2 --adopt",
        "disk attach web1 vdb=old.qcow2",
        "disk attach web1 vdb=plain.qcow2 --adopt",
    ):
        said = web1(line, status=6)
        assert f"{web1.disks / 'old.qcow2'} is encrypted in qcow2's old way (AES)" in said.err, said
    assert {key: value for key, value in picture(web1.folder).items() if "state" not in key} == {
        key: value for key, value in before.items() if "state" not in key
    }
    assert [each["machine"] for each in web1("list --json").json] == ["web1"]


@pytest.mark.parametrize("place", ["tip", "base"])
def test_an_image_that_was_encrypted_later_gets_no_plain_overlay(scene: Scene, old: bytes, place: str) -> None:
    """A machine that was added before is refused every verb that would need the key, and loses nothing."""
    if place == "base":
        scene.image("base.qcow2")
    tip = scene.image("web1.qcow2", backing="base.qcow2" if place == "base" else "")
    images.run("qemu-img", "snapshot", "-c", "i1", tip)
    scene("add web1 --disk vda=web1.qcow2")
    (tip if place == "tip" else scene.disks / "base.qcow2").write_bytes(old)
    before, tree = picture(scene.disks), scene("tree web1").out
    lines = (
        "snapshot web1 s1", "branch web1 b1", "branch web1 b1 --from i1",
        "revert web1 i1", "revert web1 i1 --discard", "revert web1 i1 --delete", "revert web1 i1 --keep-as old",
        "branch web1 b1 --switch",
    )  # fmt: skip
    of_the_tip = ("snapshot web1 s1 --internal", "delete web1 i1")
    for line in (*lines, *(of_the_tip if place == "tip" else ())):
        said = scene(line, status=6)
        assert "is encrypted" in said.err, said
        assert picture(scene.disks) == before, line
    for line in ("gc web1", "recover web1", "verify web1"):
        scene(line)
    assert picture(scene.disks) == before
    assert scene("tree web1").out == tree
    scene("remove web1")
    assert picture(scene.disks) == before


@pytest.mark.parametrize("way", ["auto", "commit", "pull"])
def test_none_is_merged_in_the_clear(scene: Scene, old: bytes, way: str) -> None:
    """A merge across one is not done, and says why; the name goes all the same."""
    scene.image("base.qcow2")
    scene.image("web1.qcow2", backing="base.qcow2")
    scene("add web1 --disk vda=web1.qcow2")
    scene("snapshot web1 s1")
    scene.write(".x")
    (scene.disks / "base.qcow2").write_bytes(old)
    before = picture(scene.disks)

    assert "encrypted" in scene(f"delete web1 s1 --merge {way}").out
    assert "encrypted" in scene("gc web1").out

    assert picture(scene.disks) == before
