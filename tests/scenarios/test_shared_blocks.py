"""Merges that copy nothing, on file systems whose files can share blocks."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.images import MiB
from tests.kit.scene import SLOT, Scene
from tests.kit.space import held, mounted
from tests.scenarios.test_found_by_attack import killed_at

from snaptree.errors import CancelledError, RefusedError
from snaptree.images import durable
from snaptree.machines.connection import Connection
from snaptree.planning.delete import DeleteRequest
from snaptree.running.control import Control
from snaptree.running.progress import Progress

KINDS = ("xfs", "btrfs")


@pytest.fixture(params=KINDS)
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    """An empty folder on a file system of that kind."""
    with mounted(tmp_path, request.param, 512 * MiB) as folder:
        yield Scene(folder)


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Scene]:
    """An empty folder on XFS."""
    with mounted(tmp_path, "xfs", 512 * MiB) as folder:
        yield Scene(folder)


def line(scene: Scene, root: str = "qcow2") -> None:
    """base <- s1 <- s2 <- now, the root in that format."""
    scene.image(f"web1.{root}", root, word="bbbb....")
    scene(f"add web1 --disk vda=web1.{root},format={root}")
    scene("snapshot web1 s1")
    scene.write(".x0x")
    scene("snapshot web1 s2")
    scene.write("y...y")


@pytest.mark.parametrize("root", ["qcow2", "raw"])
def test_a8_the_middle_goes_without_copying(shared: Scene, root: str) -> None:
    line(shared, root)
    path = shared.path("s1")
    before = path.stat().st_ino
    plan = shared("delete web1 s1 --plan --json").json
    assert (plan["way"], plan["bytes_to_copy"], plan["cancel"]) == ("reflink", 0, "undoes")
    assert plan["bytes_to_share"] == 2 * SLOT
    assert [step["kind"] for step in plan["steps"]][1:3] == ["build-merged", "put-in-place"]

    said = shared("delete web1 s1")

    assert "shared 128.0 KiB" in said.out
    assert (shared.shows("s2"), shared.shows()) == ("bx.x....", "yx.xy...")
    assert shared.path("s2") == path and path.stat().st_ino != before, "the root keeps its name, and is a new file"
    assert shared.format_of(path) == root and len(shared.files()) == 2
    shared.sound()


def test_a_fork_gives_each_child_a_copy_that_takes_no_room(shared: Scene) -> None:
    """A7: the shared layer goes, and its blocks belong to all."""
    shared.image("web1.qcow2", word="bbbb")
    shared("add web1 --disk vda=web1.qcow2")
    shared("snapshot web1 s1")
    shared.write(".x")
    shared("branch web1 b1 --from s1")
    shared("switch web1 b1")
    shared.write("..y")
    root = shared.disks / "web1.qcow2"
    shared("delete web1 s1 --merge none")
    assert len(shared.files()) == 3

    shared("switch web1 main")
    shared("snapshot web1 again")
    shared("delete web1 again")
    shared("gc web1")
    assert len(shared.files()) == 3, "what two things stand on stays"
    first = shared.show()["layers"]
    assert {each["role"] for each in first} == {"shared", "tip"}

    shared("snapshot web1 s3")
    shared("delete web1 s3 --merge reflink")
    assert (shared.shows(), shared.shows("b1")) == ("bxbb....", "bbyb....")
    assert root.exists()
    shared.sound()


def test_deleting_at_a_fork_by_reflink(shared: Scene) -> None:
    shared.image("web1.qcow2", word="bbbb")
    shared("add web1 --disk vda=web1.qcow2")
    shared("snapshot web1 s1")
    shared.write(".x")
    shared("branch web1 b1 --from s1")
    shared("switch web1 b1")
    shared.write("..y")
    os.setxattr(shared.path("s1"), "user.note", b"golden")

    shared("delete web1 s1 --merge reflink")

    assert (shared.shows(), shared.shows("b1")) == ("bxbb....", "bbyb....")
    assert len(shared.files()) == 2 and all(images.info(each).get("backing-filename") is None for each in tips(shared))
    # The line that was worked on has the root's name, and what was noted on that.
    assert shared.path("b1").name == "web1.qcow2"
    assert os.getxattr(shared.path("b1"), "user.note") == b"golden"
    shared.sound()


def test_what_is_noted_on_the_root_stays_with_its_name(xfs: Scene) -> None:
    line(xfs)
    root = xfs.path("s1")
    os.setxattr(root, "user.note", b"golden")
    before = root.stat().st_ino
    xfs("delete web1 s1 --merge pull")
    assert root.stat().st_ino != before and os.getxattr(root, "user.note") == b"golden"
    xfs.sound()


def tips(scene: Scene) -> list[Path]:
    return [scene.path(name) for name in ("main", "b1")]


def test_rights_and_flags_are_kept(xfs: Scene) -> None:
    line(xfs)
    path = xfs.path("s1")
    os.chown(path, 12, 34)
    path.chmod(0o640)
    subprocess.run(["chattr", "+dA", path], check=True)
    os.setxattr(path, "user.note", b"golden")
    for other in (xfs.path("s2"), xfs.path("main")):
        os.chown(other, 12, 34)
        other.chmod(0o640)

    xfs("delete web1 s1")

    status = path.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (12, 34, 0o640)
    said = subprocess.run(["lsattr", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert "d" in said and "A" in said
    assert os.getxattr(path, "user.note") == b"golden"
    xfs.sound()


@pytest.mark.parametrize("known", [True, False])
def test_no_file_takes_the_place_of_one_whose_owner_it_cannot_have(
    xfs: Scene, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Whoever used the file could not open it any more."""
    line(xfs)
    path = xfs.path("s1")
    os.chown(path, 12, 34)
    path.chmod(0o666)
    before = path.stat()

    def refused(descriptor: int, owner: int, group: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fchown", refused)
    if known:
        monkeypatch.setattr(os, "geteuid", lambda: 4567)
        assert "belongs to another user" in xfs("delete web1 s1 --merge reflink --plan").out
        assert xfs("delete web1 s1 --plan --json").json["way"] == "pull"
        return

    said = xfs("delete web1 s1 --merge reflink", status=RefusedError.status)

    assert "owner" in said.err
    now = path.stat()
    assert (now.st_ino, now.st_uid, now.st_mode) == (before.st_ino, before.st_uid, before.st_mode)
    assert (xfs.shows("s2"), xfs.shows()) == ("bx.x....", "yx.xy...")
    assert len(xfs.files()) == 3


def test_files_that_are_not_copied_on_write_share_among_themselves_only(tmp_path: Path) -> None:
    """btrfs shares no blocks between a file with ``chattr +C`` and one without."""
    with mounted(tmp_path, "btrfs", 512 * MiB) as folder:
        scene = Scene(folder)
        special = scene.disks / "special"
        special.mkdir()
        subprocess.run(["chattr", "+C", special], check=True)
        scene.image("special/web1.qcow2", word="bbbb")
        scene("add web1 --disk vda=special/web1.qcow2")
        scene(f"snapshot web1 s1 --file vda={scene.disks}/plain.qcow2")
        scene.write(".x")
        plan = scene("delete web1 s1 --plan --json").json
        assert plan["way"] in ("commit", "pull")
        assert "copied on write" in scene("delete web1 s1 --merge reflink").out
        scene("gc web1")
        assert scene.shows() == "bxbb...."

        scene("snapshot web1 s2")
        scene.write("..y")
        assert scene("delete web1 s2 --plan --json").json["way"] == "reflink"
        scene("delete web1 s2")
        assert scene.shows() == "bxyb...."
        assert "C" in subprocess.run(["lsattr", scene.path("main")], capture_output=True, text=True).stdout.split()[0]
        scene.sound()


def test_no_other_file_takes_the_place_of_one_that_is_known_by_its_inode(xfs: Scene) -> None:
    """Hard links, and programs that have it open, would go on with the file of before."""
    line(xfs)
    path = xfs.path("s1")
    other = xfs.folder / "other-name"
    os.link(path, other)
    said = xfs("delete web1 s1 --merge reflink")
    assert "2 names (hard links)" in said.out
    other.unlink()

    with path.open("rb"):
        child = subprocess.Popen(["sleep", "60"], stdin=path.open("rb"))
        try:
            said = xfs("gc web1", status=5)
            assert "is open by sleep" in said.err and "gc web1" in said.err
        finally:
            child.kill()
            child.wait()
    with held(path, read_only=True):
        assert "is open by" in xfs("gc web1", status=5).err
    xfs("gc web1")
    assert (xfs.shows("s2"), xfs.shows()) == ("bx.x....", "yx.xy...")
    assert len(xfs.files()) == 2
    xfs.sound()


def test_small_clusters_are_copied(xfs: Scene) -> None:
    images.create(xfs.disks / "web1.qcow2", 8 * SLOT, cluster_size=1024)
    xfs("add web1 --disk vda=web1.qcow2")
    xfs.write("bb")
    xfs("snapshot web1 s1")
    xfs.write(".x")
    said = xfs("delete web1 s1 --merge reflink")
    assert "clusters of 1024 bytes, and the file system blocks of 4096" in said.out
    xfs("gc web1")
    assert xfs.shows() == "bx......" and len(xfs.files()) == 1
    xfs.sound()


def test_reflink_where_blocks_cannot_be_shared_says_so(tmp_path: Path) -> None:
    with mounted(tmp_path, "ext4", 64 * MiB) as folder:
        scene = Scene(folder)
        line(scene)
        said = scene("delete web1 s1 --merge reflink")
        assert "cannot share blocks between files" in said.out
        assert len(scene.files()) == 3 and scene("show web1 --json").json["pending"]
        scene("gc web1")
        assert (scene.shows("s2"), scene.shows()) == ("bx.x....", "yx.xy...")
        scene.sound()


def test_an_internal_snapshot_is_made_external_of_shared_blocks(shared: Scene) -> None:
    shared.image("web1.qcow2", word="bbbb")
    shared("add web1 --disk vda=web1.qcow2")
    shared("snapshot web1 i1 --internal")
    shared.write(".x")
    shared("snapshot web1 s1")
    plan = shared("branch web1 b1 --from i1 --plan --json").json
    assert (plan["bytes_to_copy"], plan["bytes_to_share"]) == (0, 4 * SLOT)
    shared("branch web1 b1 --from i1")
    assert (shared.shows("b1"), shared.shows("i1"), shared.shows()) == ("bbbb....", "bbbb....", "bxbb....")
    shared.sound()


def test_internal_snapshots_in_the_lower_file_come_along(shared: Scene) -> None:
    shared.image("web1.qcow2", word="bbbb")
    shared("add web1 --disk vda=web1.qcow2")
    shared("snapshot web1 i1 --internal")
    shared.write(".x")
    shared("snapshot web1 s1")
    shared.write("..y")
    shared("delete web1 s1")
    assert len(shared.files()) == 1
    assert (shared.shows("i1"), shared.shows()) == ("bbbb....", "bxyb....")
    shared.sound()


@pytest.mark.parametrize("kind", ["build-merged", "put-in-place", "repoint", "record", "unlink"])
def test_killed_at_each_step(xfs: Scene, kind: str) -> None:
    line(xfs)
    killed_at(xfs, DeleteRequest(("s1",)), kind, "merged layers" if kind == "record" else "")
    assert (xfs.shows("s2"), xfs.shows()) == ("bx.x....", "yx.xy...")
    xfs("recover web1")
    xfs("gc web1")
    assert (xfs.shows("s2"), xfs.shows()) == ("bx.x....", "yx.xy...")
    assert len(xfs.files()) == 2
    xfs.sound()


def test_what_was_built_and_removed_by_hand_is_built_again(xfs: Scene) -> None:
    line(xfs)
    killed_at(xfs, DeleteRequest(("s1",)), "put-in-place")
    (built,) = [path for path in xfs.disks.iterdir() if path.name.startswith(durable.temporary_path("/", "")[1:10])]
    built.unlink()
    xfs("recover web1")
    assert (xfs.shows("s2"), xfs.shows()) == ("bx.x....", "yx.xy...")
    assert len(xfs.files()) == 2
    xfs.sound()


def test_a_tip_that_was_written_to_after_a_kill_keeps_it(xfs: Scene) -> None:
    """Until the tree says otherwise a machine starts from the file whose blocks were shared downwards."""
    line(xfs)
    xfs("delete web1 s2 --merge none")
    tip = xfs.path("main")
    killed_at(xfs, DeleteRequest(("s1",)), "record", "merged layers")
    xfs.fill(tip, "qcow2", "......zz")
    xfs("recover web1")
    xfs("gc web1")
    assert xfs.shows() == "yx.xy.zz" and len(xfs.files()) == 1
    xfs.sound()


def test_what_is_merged_takes_no_more_room_than_its_tables(shared: Scene) -> None:
    path = images.create(shared.disks / "web1.qcow2", 256 * MiB)
    images.io(path, "qcow2", "write -P 1 0 48M")
    shared("add web1 --disk vda=web1.qcow2")
    shared("snapshot web1 s1")
    images.io(shared.path("main"), "qcow2", "write -P 2 32M 48M")
    used = room(shared.disks)
    shared("delete web1 s1")
    assert room(shared.disks) - used < MiB
    images.io(shared.path("main"), "qcow2", "read -P 1 0 32M", "read -P 2 32M 48M")
    shared.sound()


def room(folder: Path) -> int:
    """How many bytes of the file system are in use."""
    images.run("sync", "-f", folder)
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def test_what_was_not_closed_cleanly_is_counted_before_it_is_built_upon(xfs: Scene) -> None:
    """QEMU makes new reference counts, elsewhere in the file, where many are missing: the copy has other tables."""
    path = xfs.image("web1.qcow2", word="bbbb....", lazy_refcounts="on")
    killed = ["qemu-io", "-f", "qcow2", "-c", f"write -P 0x6b {4 * SLOT} {2 * SLOT}", "-c", "flush", "-c", "abort"]
    subprocess.run([*killed, str(path)], capture_output=True, check=False)
    assert images.problems(path)
    xfs("add web1 --disk vda=web1.qcow2")
    xfs("snapshot web1 s1")
    xfs.write(".x...yz.")

    assert xfs("delete web1 s1 --plan --json").json["way"] == "reflink"
    xfs("delete web1 s1")

    assert xfs.shows() == "bxbbkyz."
    xfs.sound()


@pytest.mark.parametrize("ending", ["resumed", "cancelled"])
def test_sharing_is_paused(xfs: Scene, ending: str) -> None:
    """No more blocks are shared until it is resumed; cancelled, what was built aside goes."""
    line(xfs)
    before = xfs.files()
    control = Control("web1")
    seen: list[str] = []

    def steer() -> None:
        until = time.monotonic() + 20
        while control.state != "paused" and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.3)
        seen.append(control.state)
        if ending == "cancelled":
            control.cancel()
        control.resume()

    def watch(progress: Progress) -> None:
        if progress.summary.startswith("build") and not seen and not control.limiter.held:
            control.pause()
            threading.Thread(target=steer).start()

    machine = Connection(str(xfs.state)).machine("web1")
    if ending == "cancelled":
        with pytest.raises(CancelledError):
            machine.run(DeleteRequest(("s1",), "reflink"), progress=watch, control=control)
        assert xfs.files() == before and "s1" not in xfs.names()
        xfs("gc web1")
    else:
        machine.run(DeleteRequest(("s1",), "reflink"), progress=watch, control=control)
    assert seen == ["paused"]
    assert (xfs.shows("s2"), xfs.shows()) == ("bx.x....", "yx.xy...")
    xfs.sound()
