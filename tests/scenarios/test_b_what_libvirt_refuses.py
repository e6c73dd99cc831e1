"""What libvirt 11.3 refuses (rows B), with the machine off: all of it works."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.scene import TOOL, Scene


def forked(web1: Scene) -> None:
    """fork <- (s1 <- main), (other)."""
    web1("snapshot web1 fork")
    web1.write(".1")
    web1("snapshot web1 s1")
    web1.write("..m")
    web1("branch web1 other --from fork")


@pytest.mark.parametrize("way", ["auto", "none", "commit", "pull"])
def test_b1_a_fork_point_with_several_children_goes(web1: Scene, way: str) -> None:
    forked(web1)
    web1("switch web1 other")
    web1.write("...o")

    web1(f"delete web1 fork --merge {way}")

    assert web1.names()["s1"]["parent"] is None and web1.names()["other"]["parent"] is None
    assert (web1.shows("s1"), web1.shows("main"), web1.shows("other")) == ("b1......", "b1m.....", "b..o....")
    web1.sound()


def test_b2_gone_back_to_a_snapshot_in_the_middle_then_deleting_it(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.write(".1")
    web1("snapshot web1 s2")
    web1.write("..2")
    web1("revert web1 s1")
    web1.write("...n")

    web1("delete web1 s1")

    assert web1.shows("main") == "b..n...."
    assert web1.shows("s2") == "b1......"
    assert web1.shows("main.1") == "b12....."
    web1.sound()


def test_b3_the_middle_of_another_branch_goes(web1: Scene) -> None:
    web1("snapshot web1 root")
    web1("branch web1 other --from root --switch")
    web1.write("o")
    web1("snapshot web1 o1")
    web1.write(".p")
    web1("snapshot web1 o2")
    web1.write("..q")
    web1("switch web1 main")

    web1("delete web1 o1")

    assert web1.names()["o2"]["parent"] == "root"
    assert (web1.shows("o2"), web1.shows("other"), web1.shows("main")) == ("op......", "opq.....", "b.......")
    web1.sound()


def test_b4_a_snapshot_and_all_that_grew_from_it(web1: Scene) -> None:
    web1("snapshot web1 s1")
    for name in ("s2", "s3"):
        web1.write(f".{name[1]}")
        web1(f"snapshot web1 {name}")
    web1.write("..m")

    web1("delete web1 s1 --children")

    assert list(web1.names()) == ["main"]
    assert web1.chain() == ["web1.qcow2"]
    assert web1.shows() == "b3m....."
    web1.sound()


def test_b4_only_what_grew_from_it(web1: Scene) -> None:
    web1("snapshot web1 s1")
    for name in ("s2", "s3"):
        web1.write(f".{name[1]}")
        web1(f"snapshot web1 {name}")
    web1.write("..m")

    web1("delete web1 s1 --children-only")

    assert set(web1.names()) == {"s1", "main"}
    assert len(web1.chain()) == 2
    assert (web1.shows("s1"), web1.shows("main")) == ("b.......", "b3m.....")
    web1.sound()


def test_b4_with_its_branches(web1: Scene) -> None:
    forked(web1)

    web1("delete web1 fork --children --with-branches")

    assert list(web1.names()) == ["main"]
    assert web1.files() == {"web1.qcow2"}
    assert web1.shows() == "b1m....."
    web1.sound()


def test_b5_a_mixed_subtree_goes(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.write(".1")
    web1("snapshot web1 i1 --internal")
    web1.write("..i")
    web1("snapshot web1 s2")
    web1.write("...2")
    assert web1.shows("i1") == "b1......"

    web1("delete web1 s1 --children")

    assert list(web1.names()) == ["main"]
    assert web1.chain() == ["web1.qcow2"]
    assert web1.shows() == "b1i2...."
    web1.sound()


def test_b6_an_external_one_that_has_an_internal_parent(web1: Scene) -> None:
    web1("snapshot web1 i1 --internal")
    web1.write(".x")
    web1("snapshot web1 s1")
    web1.write("..y")

    web1("delete web1 s1")

    assert web1.chain() == ["web1.qcow2"]
    assert (web1.shows("i1"), web1.shows()) == ("b.......", "bxy.....")
    web1.sound()


def test_b7_an_internal_one_below_an_overlay(web1: Scene) -> None:
    web1("snapshot web1 i1 --internal")
    web1.write(".x")
    web1("snapshot web1 i2 --internal")
    web1.write("..y")
    web1("snapshot web1 s1")
    web1.write("...z")

    web1("delete web1 i1")

    assert [each["name"] for each in images.info(web1.path("s1"))["snapshots"]] == ["i2"]
    assert (web1.shows("i2"), web1.shows("s1"), web1.shows()) == ("bx......", "bxy.....", "bxyz....")
    web1.sound()


def test_b8_after_names_were_deleted_without_their_files(web1: Scene) -> None:
    for number in "123":
        web1(f"snapshot web1 s{number}")
        web1.write("." * int(number) + number)
    web1("delete web1 s2 --merge none")

    web1("delete web1 s3")

    assert web1.shows("s1") == "b......."
    assert web1.shows() == "b123...."
    web1("gc web1")
    assert len(web1.chain()) == 2
    web1.sound()


def test_b8_beside_a_branch_made_by_hand(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.write(".x")
    web1.left.add(web1.image("byhand.qcow2", backing="web1.qcow2", word="..h"))

    web1("delete web1 s1")

    assert web1.shows() == "bx......"
    assert web1.chain()[-1] == "web1.qcow2", "somebody else's overlay stands on it"
    assert images.read(web1.disks / "byhand.qcow2")[2 * 65536] == ord("h")
    assert "byhand.qcow2" in web1("gc web1").out
    web1.sound()


def test_b8_after_a_merge_by_hand_only_what_it_touched_is_blocked(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.write(".x")
    web1("snapshot web1 s2")
    web1.write("..y")
    web1("branch web1 other --from s1")
    images.run("qemu-img", "rebase", "-b", "", web1.path("s2"))

    said = web1("snapshot web1 more", status=7)
    assert "web1.s1.qcow2" in said.err and "changed" in said.err
    web1("switch web1 other")
    web1.write("...o")
    web1("snapshot web1 fine")
    assert web1.shows("fine") == "b..o...."


def test_b9_an_interrupted_delete_is_resumed(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.image("web1.qcow2", word="b")
    big = scene.disks / "big.qcow2"
    images.create(big, 256 << 20)
    images.io(big, "qcow2", "write -P 1 0 8M")
    scene("add web1 --disk vda=web1.qcow2 --disk vdb=big.qcow2")
    scene("snapshot web1 s1")
    scene.write(".1")
    images.io(scene.path("main", "vdb"), "qcow2", "write -P 2 4M 200M")
    wanted = images.read(scene.path("main", "vdb"))
    words = [*TOOL, "delete", "web1", "s1", "--merge", "commit", "--limit", "50MiB/s"]
    process = subprocess.Popen(words, env={"SNAPTREE_STATE": str(scene.state), "PATH": "/usr/bin:/bin"})
    while not (half := "half-merged" in scene("show web1").out) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert half, "the merge was over too soon"

    assert scene.shows() == "b1......"
    assert images.read(scene.path("main", "vdb")) == wanted
    assert "recover" in scene("tree web1").out
    scene("recover web1")
    scene("gc web1")

    assert "s1" not in scene.names()
    assert scene.files() == {"web1.qcow2", "big.qcow2"}
    assert scene.shows() == "b1......"
    assert images.read(scene.path("main", "vdb")) == wanted
    scene.sound()


def test_b10_a_disk_that_is_no_longer_there(web1: Scene) -> None:
    web1.image("data.qcow2", word="d")
    web1("disk attach web1 vdb=data.qcow2")
    web1("snapshot web1 s1")
    web1.write(".x")
    web1.write(".y", "vdb")
    web1("disk detach web1 vdb --delete-files")
    assert web1.shows("s1", "vdb") == "d......."

    web1("delete web1 s1")

    assert web1.shows() == "bx......"
    assert web1.files() == {"web1.qcow2"}
    web1.sound()


def test_b11_internal_and_external_in_one_snapshot(scene: Scene) -> None:
    scene.image("web1.qcow2", word="a")
    scene.image("data.img", "raw", word="r")
    scene("add web1 --disk vda=web1.qcow2 --disk vdb=data.img,format=raw")

    scene("snapshot web1 both --internal")
    scene.write(".x")
    scene.write(".y", "vdb")

    assert scene.names()["both"]["kind"] == "mixed"
    assert (scene.shows("both"), scene.shows("both", "vdb")) == ("a.......", "r.......")
    scene("revert web1 both --discard")
    assert (scene.shows(), scene.shows("main", "vdb")) == ("a.......", "r.......")
    scene("delete web1 both")
    assert scene.files() == {"web1.qcow2", "data.img"}
    scene.sound()


def test_b12_going_back_twice_within_a_second(web1: Scene) -> None:
    web1("snapshot web1 s1")
    for letter in "xyz":
        web1.write(f".{letter}")
        web1("revert web1 s1")

    assert [web1.shows(f"main.{number}") for number in (1, 2, 3)] == ["bx......", "by......", "bz......"]
    assert web1.shows() == "b......."
    web1.sound()


def test_b13_a_disk_that_was_left_out_stays_as_it_is(web1: Scene) -> None:
    web1.image("data.qcow2", word="d")
    web1("disk attach web1 vdb=data.qcow2")
    web1("snapshot web1 s1 --exclude vdb")
    web1.write(".x")
    web1.write(".y", "vdb")
    before = web1.path("main", "vdb")

    web1("revert web1 s1 --discard")

    assert web1.path("main", "vdb") == before, "no overlay is made for it"
    assert (web1.shows(), web1.shows("main", "vdb")) == ("b.......", "dy......")
    web1.sound()


def test_b13_parking_forks_it_where_it_stands(web1: Scene) -> None:
    web1.image("data.qcow2", word="d")
    web1("disk attach web1 vdb=data.qcow2")
    web1("snapshot web1 s1 --exclude vdb")
    web1.write(".x")
    web1.write(".y", "vdb")

    web1("revert web1 s1")
    web1.write("..z", "vdb")

    assert (web1.shows("main"), web1.shows("main", "vdb")) == ("b.......", "dyz.....")
    assert (web1.shows("main.1"), web1.shows("main.1", "vdb")) == ("bx......", "dy......")
    web1.sound()


def test_b14_a_machine_with_snapshots_is_forgotten(web1: Scene) -> None:
    forked(web1)
    files = web1.files()

    web1("remove web1")

    assert web1.files() == files
    assert web1("list --json").json == []
    web1("show web1", status=3)


def test_b14_and_removed_with_all_its_files(web1: Scene) -> None:
    forked(web1)
    web1("snapshot web1 inner --internal")

    web1("remove web1 --delete-files --yes")

    assert web1.files() == set()
