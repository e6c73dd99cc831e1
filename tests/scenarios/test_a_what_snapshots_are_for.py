"""What external snapshots were meant for (rows A), with the machine off."""

from __future__ import annotations

import pytest
from tests.kit.scene import Scene


def test_a1_the_name_goes_and_the_files_stay_until_gc(web1: Scene) -> None:
    web1("snapshot web1 before")
    web1.write(".n")
    files = web1.files()

    plan = web1("delete web1 before --merge none --plan --json").json
    assert plan["bytes_to_copy"] == 0 and plan["way"] is None
    web1("delete web1 before --merge none")

    assert web1.files() == files
    assert web1.shows() == "bn......"
    assert "before" not in web1.names()
    assert "web1.qcow2 waits to be merged" in web1("tree web1").out
    web1("gc web1")
    assert web1.chain() == ["web1.qcow2"]
    assert web1.shows() == "bn......"
    web1.sound()


def test_a1_gc_names_what_others_left_behind(web1: Scene) -> None:
    web1("snapshot web1 before")
    left = web1.image("left.qcow2", backing="web1.qcow2", word="..x")
    web1.left.add(left)

    assert str(left) in web1("gc web1").out
    web1("gc web1 --delete")

    assert left.exists(), "what snaptree did not make, it does not remove"
    web1.sound()


@pytest.mark.parametrize("way", ["auto", "commit", "pull"])
def test_a2_the_chain_is_as_short_as_before_and_nothing_is_lost(web1: Scene, way: str) -> None:
    web1("snapshot web1 before")
    web1.write(".new")

    web1(f"delete web1 before --merge {way}")

    assert web1.chain() == ["web1.qcow2"]
    assert web1.shows() == "bnew...."
    assert web1("path web1").out.strip() == str(web1.disks / "web1.qcow2")
    web1.sound()


def test_a2_what_stood_on_the_files_is_pointed_anew(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.write(".1")
    web1("snapshot web1 s2")
    web1.write("..2")
    web1("branch web1 other --from s2")

    web1("delete web1 s1")

    assert web1.shows("s2") == web1.shows("other") == "b1......"
    assert web1.shows() == "b12....."
    assert len(web1.chain("other")) == len(web1.chain("main")) == 2
    web1.sound()


def test_a4_the_experiments_are_thrown_away_with_the_snapshot(web1: Scene) -> None:
    web1("snapshot web1 before")
    web1.write("bad")

    web1("revert web1 before --discard --delete")

    assert web1.files() == {"web1.qcow2"}
    assert web1.shows() == "b......."
    assert list(web1.names()) == ["main"]
    web1.sound()


def test_a6_two_lines_from_one_point_each_with_its_own_tip(web1: Scene) -> None:
    web1("snapshot web1 fork")
    web1.write(".m")
    web1("branch web1 feature --from fork --file vda=feature-1.qcow2")
    assert web1.path("feature").name == "feature-1.qcow2"

    web1("switch web1 feature")
    web1.write("..f")
    assert web1("path web1 vda").out.strip() == str(web1.disks / "feature-1.qcow2")
    web1("switch web1 main")
    web1.write("...m")
    web1("switch web1 feature")
    web1.write("....f")

    assert web1.shows("main") == "bm.m...."
    assert web1.shows("feature") == "b.f.f..."
    assert web1.shows("fork") == "b......."
    web1.sound()


def test_a7_the_fork_goes_when_the_last_line_goes(web1: Scene) -> None:
    web1("snapshot web1 fork")
    web1.write(".m")
    web1("branch web1 other --from fork")

    web1("delete web1 fork")
    assert web1.path("main") != web1.path("other")
    assert len(web1.chain("main")) == len(web1.chain("other")) == 2, "a shared layer is never committed into"
    assert (web1.shows("main"), web1.shows("other")) == ("bm......", "b.......")

    web1("delete web1 --branch other")
    assert web1.chain() == ["web1.qcow2"]
    assert web1.shows() == "bm......"
    web1.sound()


def test_a7_pull_gives_each_its_own_copy(web1: Scene) -> None:
    web1("snapshot web1 fork")
    web1.write(".m")
    web1("branch web1 other --from fork")

    web1("delete web1 fork --merge pull")

    assert len(web1.chain("main")) == len(web1.chain("other")) == 1
    assert web1.chain("main") == ["web1.qcow2"], "the line of now keeps the root's name"
    assert (web1.shows("main"), web1.shows("other")) == ("bm......", "b.......")
    web1.sound()


@pytest.mark.parametrize("way", ["auto", "commit", "pull"])
def test_a8_the_middle_goes(web1: Scene, way: str) -> None:
    web1("snapshot web1 snap1")
    web1.write("1.1")
    web1("snapshot web1 snap2")
    web1.write("22")

    web1(f"delete web1 snap1 --merge {way}")

    assert web1.shows("snap2") == "1.1....."
    assert web1.shows() == "221....."
    assert len(web1.chain()) == 2 and web1.chain()[-1] == "web1.qcow2"
    web1.sound()


def test_a8_a_chain_without_snapshots_is_squashed(scene: Scene) -> None:
    scene.image("web1.qcow2", word="a")
    scene.image("middle.qcow2", backing="web1.qcow2", word=".b")
    scene.image("top.qcow2", backing="middle.qcow2", word="..c")
    scene("add web1 --disk vda=top.qcow2 --adopt")

    scene("squash web1 --disk vda --top middle.qcow2 --base web1.qcow2")
    assert scene.chain() == ["top.qcow2", "web1.qcow2"]
    scene("squash web1")

    assert scene.chain() == ["web1.qcow2"]
    assert scene.shows() == "abc....."
    scene.sound()


def test_a8_squash_across_a_kept_point_is_refused(web1: Scene) -> None:
    web1("snapshot web1 kept")
    web1.write(".x")

    said = web1("squash web1 --base web1.qcow2", status=6)

    assert "'kept' needs it" in said.err
    web1.sound()
