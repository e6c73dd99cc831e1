"""Encrypted images are refused before anything is touched, and nothing of theirs comes to lie in the clear."""

from __future__ import annotations

import pytest
from tests.kit import images
from tests.kit.rights import picture
from tests.kit.scene import SLOT, Scene

KEY = ("--object", "secret,id=key,data=secret")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Encrypted images by kind, each with an internal snapshot ``i1``."""
    folder, found = tmp_path_factory.mktemp("locked"), {}
    for kind, more in (("luks", ",encrypt.iter-time=10"), ("aes", "")):
        path = folder / f"{kind}.qcow2"
        options = f"encrypt.format={kind},encrypt.key-secret=key{more}"
        images.run("qemu-img", "create", "-q", "-f", "qcow2", *KEY, "-o", options, path, str(8 * SLOT))
        graph = f"driver=qcow2,encrypt.key-secret=key,file.filename={path}"
        images.run("qemu-img", "snapshot", *KEY, "--image-opts", "-c", "i1", graph)
        images.run("qemu-io", *KEY, "-c", f"write -P 65 0 {SLOT}", "--image-opts", graph)
        found[kind] = path.read_bytes()
    return found


@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_no_plain_overlay_on_an_encrypted_image(web1: Scene, locked: dict[str, bytes], kind: str) -> None:
    """LUKS: an encrypted image, or one that stands on one, is refused before anything is touched."""
    (web1.disks / "locked.qcow2").write_bytes(locked[kind])
    plain = web1.image("plain.qcow2")
    images.run("qemu-img", "rebase", "-u", "-b", "locked.qcow2", "-F", "qcow2", plain)
    before = picture(web1.folder)
    for line in (
        "add web2 --disk vda=locked.qcow2",
        "add web2 --disk vda=plain.qcow2",
        "add web2 --disk vda=plain.qcow2 --adopt",
        "add web2 --disk vda=locked.qcow2 --adopt",
        "disk attach web1 vdb=locked.qcow2",
        "disk attach web1 vdb=plain.qcow2 --adopt",
    ):
        said = web1(line, status=6)
        assert f"{web1.disks / 'locked.qcow2'} is encrypted" in said.err, said
    assert "not handled" in web1("add web2 --disk vda=locked.qcow2,format=luks", status=2).err
    assert {key: value for key, value in picture(web1.folder).items() if "state" not in key} == {
        key: value for key, value in before.items() if "state" not in key
    }
    assert [each["machine"] for each in web1("list --json").json] == ["web1"]


@pytest.mark.parametrize("place", ["tip", "base"])
def test_an_image_that_was_encrypted_later_gets_no_plain_overlay(
    scene: Scene, locked: dict[str, bytes], place: str
) -> None:
    """LUKS: a machine that was added before is refused every verb that would need the key, and loses nothing."""
    if place == "base":
        scene.image("base.qcow2")
    tip = scene.image("web1.qcow2", backing="base.qcow2" if place == "base" else "")
    images.run("qemu-img", "snapshot", "-c", "i1", tip)
    scene("add web1 --disk vda=web1.qcow2")
    (tip if place == "tip" else scene.disks / "base.qcow2").write_bytes(locked["luks"])
    before, tree = picture(scene.disks), scene("tree web1").out
    lines = (
        "snapshot web1 s1", "snapshot web1 s1 --internal", "branch web1 b1", "branch web1 b1 --from i1",
        "revert web1 i1", "revert web1 i1 --discard", "revert web1 i1 --delete", "revert web1 i1 --keep-as old",
        "branch web1 b1 --switch",
    )  # fmt: skip
    for line in (*lines, *(["delete web1 i1"] if place == "tip" else [])):
        said = scene(line, status=6)
        assert "is encrypted" in said.err or "it is encrypted" in said.err, said
        assert picture(scene.disks) == before, line
    for line in ("gc web1", "recover web1", "verify web1"):
        scene(line)
    assert picture(scene.disks) == before
    assert scene("tree web1").out == tree
    scene("remove web1")
    assert picture(scene.disks) == before


@pytest.mark.parametrize("way", ["auto", "commit", "pull"])
def test_an_encrypted_layer_is_not_merged_in_the_clear(scene: Scene, locked: dict[str, bytes], way: str) -> None:
    """LUKS: a merge across an encrypted layer is not done, and says why; the name goes all the same."""
    scene.image("base.qcow2")
    scene.image("web1.qcow2", backing="base.qcow2")
    scene("add web1 --disk vda=web1.qcow2")
    scene("snapshot web1 s1")
    scene.write(".x")
    (scene.disks / "base.qcow2").write_bytes(locked["aes"])
    before = picture(scene.disks)

    assert "encrypted" in scene(f"delete web1 s1 --merge {way}").out
    assert "encrypted" in scene("gc web1").out

    assert picture(scene.disks) == before
