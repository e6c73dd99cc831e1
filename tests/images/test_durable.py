"""Files are whole or not there, have the rights of their parent, and never replace what they should not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.kit.images import MiB
from tests.kit.space import mounted

from snaptree.errors import CancelledError, ExistsError, IoError, NoSpaceError
from snaptree.images import durable, small
from snaptree.images.inode import inode_of


def no_claim(path: str, device: int, inode: int) -> None:
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_owner_mode_acl_and_label_are_those_of_the_parent(tmp_path: Path) -> None:
    like, path = tmp_path / "like", tmp_path / "new"
    like.write_bytes(b"x")
    os.chown(like, 1234, 2345)
    like.chmod(0o640)
    acl = subprocess.run(["setfacl", "-m", "u:4321:rw", like], check=False).returncode == 0
    before = os.umask(0)
    try:
        durable.make_file(str(path), [(0, b"head"), (8, b"tail")], 16, str(like), no_claim, "t")
    finally:
        os.umask(before)
    status = path.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (1234, 2345, like.stat().st_mode & 0o777)
    assert path.read_bytes() == b"head" + bytes(4) + b"tail" + bytes(4)
    if acl:
        assert os.getxattr(path, "system.posix_acl_access") == os.getxattr(like, "system.posix_acl_access")


def test_a_new_file_never_replaces_one(tmp_path: Path) -> None:
    path = tmp_path / "there"
    path.write_text("kept")
    with pytest.raises(ExistsError):
        durable.make_file(str(path), [(0, b"new")], 3, str(path), no_claim, "t")
    target = tmp_path / "link"
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExistsError):
        durable.make_file(str(target), [(0, b"new")], 3, str(path), no_claim, "t")
    assert path.read_text() == "kept" and not (tmp_path / "elsewhere").exists()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "there"], "nothing hidden is left"


def test_the_claim_comes_before_the_name(tmp_path: Path) -> None:
    path = tmp_path / "new"
    seen: list[tuple[bool, int]] = []

    def claim(temporary: str, device: int, inode: int) -> None:
        seen.append((path.exists(), inode))
        assert os.stat(temporary).st_ino == inode

    durable.make_file(str(path), [(0, b"x")], 1, str(tmp_path), claim, "t")
    assert seen == [(False, path.stat().st_ino)]


def test_only_the_file_that_is_meant_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    identity = inode_of(str(path))
    other = tmp_path / "b"
    other.write_text("new")
    os.replace(other, path)
    assert durable.remove(str(path), identity) is False
    assert path.read_text() == "new"
    assert durable.remove(str(path), inode_of(str(path))) is True
    assert durable.remove(str(path), identity) is False


def test_putting_in_place_twice_is_as_once(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("merged")
    target.write_text("old")
    for _ in range(2):
        durable.put_in_place(str(source), str(target))
    assert target.read_text() == "merged" and source.samefile(target)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["source", "target"]


def test_small_folders_are_replaced_whole(tmp_path: Path) -> None:
    for name, files in (("old", ("a", "b")), ("new", ("b", "c"))):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text(name)
    small.replace(str(tmp_path / "new"), str(tmp_path / "old"), "t")
    assert {each.name: each.read_text() for each in (tmp_path / "old").iterdir()} == {"b": "new", "c": "new"}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["new", "old"]


def test_folders_are_synced_also_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made them may have been killed before it had synced them."""
    synced = list[int]()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    (tmp_path / "a").mkdir()
    durable.make_folder(str(tmp_path / "a" / "b" / "c"))
    inodes = [folder.stat().st_ino for folder in (tmp_path, tmp_path / "a", tmp_path / "a" / "b")]
    assert synced == inodes
    durable.make_folder(str(tmp_path / "a" / "b" / "c"))
    assert synced == [*inodes, inodes[-1]]


def test_what_is_done_already_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process, perhaps, that was killed before it had synced it."""
    synced = list[int]()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("merged")
    target.hardlink_to(source)
    for again in (
        lambda: durable.put_in_place(str(source), str(target)),
        lambda: durable.remove(str(tmp_path / "gone"), (0, 1)),
        lambda: durable.remove_small(str(tmp_path / "gone")),
    ):
        again()
        assert synced == [tmp_path.stat().st_ino]
        synced.clear()
    durable.remove_small(str(tmp_path / "nowhere" / "gone"))


def test_the_old_folder_goes_when_the_new_one_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[int | str]()
    monkeypatch.setattr(os, "fsync", lambda descriptor: said.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(shutil, "rmtree", lambda path: said.append("removed"))
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state").write_text(name)
    small.replace(str(tmp_path / "new"), str(tmp_path / "old"), "t")
    assert said[said.index("removed") - 1] == tmp_path.stat().st_ino


def test_copying_keeps_holes_and_can_be_stopped(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.truncate(64 * MiB)
        file.seek(32 * MiB)
        file.write(b"data" * 1000)
    target.touch()
    durable.copy_into(str(source), str(target))
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 < MiB
    with pytest.raises(CancelledError):
        durable.copy_into(str(source), str(target), cancelled=lambda: True)


def test_errors_say_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(IoError, match="nowhere"):
        durable.make_file(str(tmp_path / "nowhere" / "x"), [], 0, str(tmp_path), no_claim, "t")


@pytest.mark.root
def test_a_full_file_system_leaves_nothing(tmp_path: Path) -> None:
    with mounted(tmp_path, "ext4", 16 * MiB) as place:
        like = place / "like"
        like.touch()
        before = sorted(each.name for each in place.iterdir())
        with pytest.raises(NoSpaceError):
            durable.make_file(str(place / "large"), [(0, bytes(32 * MiB))], 32 * MiB, str(like), no_claim, "t")
        assert sorted(each.name for each in place.iterdir()) == before
