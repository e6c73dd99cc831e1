"""Scenarios beyond the rows: disks that come and go, shared points, raw roots, the root's name, adopted chains."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.scene import Scene


def test_a_disk_attached_after_a_snapshot(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.image("data.qcow2", word="d")
    web1("disk attach web1 vdb=data.qcow2")
    web1.write(".x", "vdb")
    web1("snapshot web1 s2")
    web1.write("..y", "vdb")
    web1.write(".w")

    web1("revert web1 s1")
    assert web1.shows("main", "vdb") == web1.shows("main.1", "vdb") == "dxy....."
    web1("revert web1 s2 --discard")
    assert web1.shows("main", "vdb") == "dx......"
    web1("delete web1 s1 s2")

    assert web1.shows("main", "vdb") == "dx......"
    web1.sound()


def test_a_disk_detached_comes_back_with_a_snapshot_that_has_it(web1: Scene) -> None:
    web1.image("data.qcow2", word="d")
    web1("disk attach web1 vdb=data.qcow2")
    web1("snapshot web1 s1")
    web1.write(".x", "vdb")
    tip = web1.path("main", "vdb")
    web1("disk detach web1 vdb")
    web1.left.add(tip)

    assert web1("path web1").out.strip() == str(web1.path("main"))
    web1("revert web1 s1")

    assert web1.shows("main", "vdb") == "d......."
    assert tip.exists(), "the files of a detached disk stay"
    web1.sound()


def test_two_snapshots_with_nothing_written_between_share_a_point(web1: Scene) -> None:
    web1("snapshot web1 s1")
    files = web1.files()
    web1("snapshot web1 s2")

    assert web1.files() == files, "no empty overlay is stacked"
    assert web1.path("s1") == web1.path("s2")
    web1.write(".x")
    web1("delete web1 s1")
    assert web1.shows("s2") == "b......."
    assert len(web1.chain()) == 2
    web1("delete web1 s2")
    assert web1.chain() == ["web1.qcow2"]
    assert web1.shows() == "bx......"
    web1.sound()


def test_a_raw_root_stays_raw(scene: Scene) -> None:
    scene.image("web1.img", "raw", word="r")
    scene("add web1 --disk vda=web1.img,format=raw")
    scene("snapshot web1 s1")
    scene.write(".xxxxxxx")

    assert scene("delete web1 s1 --plan --json").json["way"] == "commit"
    scene("delete web1 s1")

    assert scene.chain() == ["web1.img"]
    assert (scene.disks / "web1.img").read_bytes()[:1] == b"r"
    assert scene.shows() == "rxxxxxxx"
    scene.sound()


def test_a_raw_root_becomes_qcow2_when_the_user_says_so(scene: Scene) -> None:
    scene.image("web1.img", "raw", word="r")
    scene("add web1 --disk vda=web1.img,format=raw")
    scene("snapshot web1 s1")
    scene.write(".x")

    said = scene("delete web1 s1 --merge pull")

    assert "becomes qcow2" in said.out
    assert scene.files() == {"web1.s1.qcow2"}
    assert scene("path web1").out.strip() == str(scene.disks / "web1.s1.qcow2")
    assert scene.shows() == "rx......"
    scene.sound()


@pytest.mark.parametrize("way", ["commit", "pull", "auto"])
@pytest.mark.parametrize(("below", "above"), [("bbbbbbbb", ".x"), ("b", ".xxxxxxx")])
def test_the_root_keeps_its_name_whatever_the_way(scene: Scene, way: str, below: str, above: str) -> None:
    scene.image("my disk, the root:1.qcow2", word=below)
    scene("add web1 --disk 'vda=my disk, the root:1.qcow2'")
    scene("snapshot web1 s1")
    scene.write(above)
    wanted = scene.shows()
    plan = scene(f"delete web1 s1 --merge {way} --plan --json").json

    scene(f"delete web1 s1 --merge {way}")

    root = str(scene.disks / "my disk, the root:1.qcow2")
    assert plan["paths_after"] == {"vda": root}
    assert scene("path web1 vda").out.strip() == root
    assert scene.shows() == wanted
    scene.sound()


def test_the_cheaper_way_is_chosen(scene: Scene) -> None:
    for name, below, above, way in (("down", "bbbbbb", ".x", "commit"), ("up", "b", ".xxxxxx", "pull")):
        scene.image(f"{name}.qcow2", word=below)
        scene(f"add {name} --disk vda={name}.qcow2")
        scene(f"snapshot {name} s1")
        scene.write(above, machine=name)

        plan = scene(f"delete {name} s1 --plan --json").json

        assert plan["way"] == way
        assert plan["bytes_to_copy"] == 65536
        assert plan["cancel"] == ("pauses" if way == "commit" else "undoes")
    scene.sound("down", "up")


def test_what_grew_from_a_deleted_snapshot_moves_to_the_nearest_that_survives(web1: Scene) -> None:
    for number in range(1, 5):
        web1(f"snapshot web1 s{number}")
        web1.write("." * number + str(number))
    web1("branch web1 twig --from s3")

    web1("delete web1 s2 s3")

    names = web1.names()
    assert (names["s4"]["parent"], names["twig"]["parent"], names["main"]["parent"]) == ("s1", "s1", "s4")
    assert (web1.shows("twig"), web1.shows("s4"), web1.shows()) == ("b12.....", "b123....", "b1234...")
    web1.sound()


def test_a_chain_made_by_hand_is_adopted_with_its_siblings(scene: Scene) -> None:
    scene.image("base.qcow2", word="b")
    scene.image("mine.qcow2", backing="base.qcow2", word=".m")
    scene.image("other.qcow2", backing="base.qcow2", word="..o")

    said = scene("add web1 --disk vda=mine.qcow2 --adopt")

    assert "other.qcow2" in said.out
    assert (scene.shows("main"), scene.shows("other")) == ("bm......", "b.o.....")
    scene("delete web1 --branch other")
    assert scene.files() == {"base.qcow2"}, "the branch goes, and what was shared merges"
    assert scene.shows() == "bm......"
    scene.sound()


def test_internal_snapshots_that_are_found_become_part_of_the_tree(scene: Scene) -> None:
    path = scene.image("web1.qcow2", word="b")
    images.run("qemu-img", "snapshot", "-c", "clean", path)
    scene.fill(path, "qcow2", ".x")

    scene("add web1 --disk vda=web1.qcow2")

    assert (scene.shows("clean"), scene.shows()) == ("b.......", "bx......")
    scene("revert web1 clean")
    assert (scene.shows("main"), scene.shows("main.1")) == ("b.......", "bx......")
    scene("delete web1 clean")
    scene("delete web1 --branch main.1")
    assert images.info(path).get("snapshots") is None
    scene.sound()


def test_an_internal_point_of_a_frozen_layer_grows_a_branch(web1: Scene) -> None:
    web1("snapshot web1 inner --internal")
    web1.write(".x")
    web1("snapshot web1 outer")
    web1.write("..y")

    web1("branch web1 twig --from inner --file vda=twig.qcow2")

    assert web1.shows("twig") == "b......."
    assert web1.chain("twig") == ["twig.qcow2"]
    web1("delete web1 inner outer")
    assert (web1.shows("twig"), web1.shows()) == ("b.......", "bxy.....")
    assert web1.chain() == ["web1.qcow2"]
    web1.sound()


def test_an_internal_point_of_another_size_than_the_disk_has_now(web1: Scene) -> None:
    web1("snapshot web1 small --internal")
    images.run("qemu-img", "resize", "-q", web1.path("main"), str(1 << 20))
    web1.write(".x")
    web1("snapshot web1 large --internal")
    web1("snapshot web1 frozen")

    web1("branch web1 twig --from small")
    web1("revert web1 large")

    assert (web1.shows("twig"), web1.shows("main")) == ("b.......", "bx" + "." * 14)
    web1.sound()


@pytest.mark.parametrize("line", ["delete web1 s1 --merge commit", "squash web1"])
def test_internal_snapshots_are_made_external_where_a_merge_needs_it(web1: Scene, line: str) -> None:
    web1("snapshot web1 inner --internal")
    web1.write(".x")
    web1("snapshot web1 s1")
    images.run("qemu-img", "resize", "-q", "--shrink", web1.path("main"), str(4 << 16))
    web1.write("..y")
    if line.startswith("squash"):
        web1("delete web1 s1")
        assert len(web1.chain()) == 2, "by itself it does not copy internal snapshots out"

    web1(line)

    assert (web1.shows("inner"), web1.shows("main")) == ("b.......", "bxy.")
    assert web1.chain() == ["web1.qcow2"]
    assert web1.names()["inner"]["kind"] == "external"
    web1.sound()


def test_descriptions_and_names_of_all_kinds(web1: Scene) -> None:
    web1("snapshot web1 'Vor dem Upgrade (größer)' --description 'two words'")
    web1.write(".x")
    web1("rename web1 'Vor dem Upgrade (größer)' 'a, b: \"c\" #1'")

    assert web1.shows('a, b: "c" #1') == "b......."
    assert web1.names()['a, b: "c" #1']["description"] == "two words"
    web1("snapshot web1 'in, side=1' --internal")
    web1("branch web1 'out, side' --from 'in, side=1'")
    assert web1.shows("out, side") == web1.shows("in, side=1") == "bx......"
    web1("delete web1 'in, side=1'")
    web1("delete web1 --branch 'out, side'")
    web1("snapshot web1 1 --internal")
    web1("snapshot web1 2 --internal")
    web1.write("..y")
    web1("revert web1 1 --discard")
    assert web1.shows() == "bx......"
    web1("delete web1 1 2 'a, b: \"c\" #1'")
    assert web1.files() == {"web1.qcow2"}
    web1.sound()


def test_metadata_goes_out_as_libvirts_xml_and_comes_back(web1: Scene) -> None:
    web1("snapshot web1 s1 --description 'first <one>'")
    web1.write(".x")
    web1("snapshot web1 s2")
    web1.write("..y")
    folder = web1.folder / "xml"
    folder.mkdir()
    for name in ("s1", "s2"):
        text = web1(f"show web1 --xml {name}").out
        assert "<domainsnapshot>" in text
        (folder / f"{name}.xml").write_text(text)
    tip = web1.path("main")
    web1("remove web1")

    web1(f"add again --disk vda={tip} --from-xml {folder}")

    names = web1.names("again")
    assert (names["s1"]["parent"], names["s2"]["parent"], names["main"]["parent"]) == (None, "s1", "s2")
    assert names["s1"]["description"] == "first <one>"
    assert web1.shows("s1", machine="again") == "b......."
    assert web1.shows("s2", machine="again") == "bx......"
    web1("delete again s1")
    assert web1.shows(machine="again") == "bxy....."
    web1.sound("again")


RECORD = """<domainsnapshot><name>{name}</name><creationTime>1700000000</creationTime>{more}
<disks><disk name='{disk}' snapshot='{kind}'/></disks><domain type='qemu'><devices><disk type='file' device='disk'>
<source file='{path}'/><target dev='{disk}'/></disk></devices></domain></domainsnapshot>"""


def recorded(scene: Scene, **parts: str) -> Path:
    """A chain of two files, and a folder with one snapshot's XML: ``s1`` is what the lower file shows."""
    scene.image("web1.qcow2", word="b")
    scene.image("top.qcow2", backing="web1.qcow2", word=".t")
    folder = scene.folder / "xml"
    folder.mkdir()
    known = {"name": "s1", "more": "", "disk": "vda", "kind": "external", "path": f"{scene.disks}/web1.qcow2"}
    (folder / "s1.xml").write_text(RECORD.format(**{**known, **parts}))
    return folder


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"path": "/nowhere/moved.qcow2"}, "'s1' has vda in /nowhere/moved.qcow2, which is not beneath or beside"),
        ({"disk": "vdz"}, "'s1' has no disk that was given"),
        ({"kind": "internal"}, "has no internal snapshot 's1'"),
    ],
)
def test_a_recorded_snapshot_without_its_data_is_refused(scene: Scene, parts: dict[str, str], words: str) -> None:
    folder = recorded(scene, **parts)

    said = scene(f"add web1 --disk vda=top.qcow2 --from-xml {folder}", status=7)

    assert words in said.err and "XML" in said.err
    assert scene("list --json").json == []


def test_two_files_of_one_recorded_snapshot_are_refused(scene: Scene) -> None:
    folder = recorded(scene)
    (folder / "copy.xml").write_text((folder / "s1.xml").read_text())
    said = scene(f"add web1 --disk vda=top.qcow2 --from-xml {folder}", status=7)
    assert "two files of the snapshot 's1'" in said.err


def test_what_is_left_out_of_recorded_snapshots_is_said(scene: Scene) -> None:
    more = "<parent><name>gone</name></parent><memory snapshot='external' file='/ram'/>"
    folder = recorded(scene, more=more)

    said = scene(f"add web1 --disk vda=top.qcow2 --from-xml {folder}")

    assert "'s1' grew from 'gone', of which there is no XML" in said.out
    assert "'s1' has memory, which is left where it is" in said.out
    assert (scene.shows("s1"), scene.shows()) == ("b.......", "bt......")
    scene.sound()


@pytest.mark.timeout(30)
def test_a_pipe_among_the_xml_is_not_waited_for(scene: Scene) -> None:
    folder = recorded(scene)
    os.mkfifo(folder / "pipe.xml")
    said = scene(f"add web1 --disk vda=top.qcow2 --from-xml {folder}", status=7)
    assert "pipe.xml is not a regular file" in said.err


def test_a_relative_path_and_a_later_run_from_another_folder(scene: Scene, tmp_path: Path) -> None:
    scene.image("web1.qcow2", word="b")
    scene("add web1 --disk web1.qcow2")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    disks, scene.disks = scene.disks, elsewhere

    scene("snapshot web1 s1")
    scene.write(".x")

    assert scene("path web1").out.strip() == str(disks / "web1.s1.qcow2")
    assert list(elsewhere.iterdir()) == []
    scene.disks = disks
    scene.sound()


def test_set_remembers_and_plans_touch_nothing(web1: Scene) -> None:
    nvram = web1.folder / "vars.fd"
    nvram.write_text("v1")
    web1(f"set web1 --nvram {nvram}")
    web1("snapshot web1 s1")
    web1.write(".x")
    before = web1.files(), web1.show(), web1("log web1").out
    for line in (
        "snapshot web1 s2",
        "snapshot web1 s2 --internal",
        "delete web1 s1",
        "delete web1 s1 --merge pull",
        "revert web1 s1",
        "revert web1 s1 --discard --delete",
        "branch web1 b --from s1",
        "rename web1 s1 s3",
        "gc web1",
        "remove web1 --delete-files",
        "set web1 --nvram ''",
    ):
        plan = web1(f"{line} --plan --json").json
        assert set(plan) >= {
            "operation", "steps", "way", "bytes_to_copy", "peak_extra_bytes", "frees_bytes", "seconds",
            "guest_pause", "cancel", "paths_after", "point_of_no_return", "estimate",
        }  # fmt: skip
        assert web1(f"{line} --plan").out
    assert (web1.files(), web1.show(), web1("log web1").out) == before
    web1.sound()
