"""The pitfalls of qcow2 and QEMU that are about merging layers; ``test_pitfalls.py`` has the table of all."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.kit import images
from tests.kit.images import GiB, KiB, MiB
from tests.kit.scene import SLOT, Scene, word_of

from snaptree.errors import SnaptreeError
from snaptree.machines.connection import Connection
from snaptree.planning.delete import DeleteRequest
from snaptree.running.progress import Progress

WAYS = pytest.mark.parametrize("way", ["commit", "pull"])


def resize(path: Path, slots: int) -> None:
    images.run("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", path, str(slots * SLOT))


@WAYS
def test_what_a_sibling_stands_on_is_not_written(web1: Scene, way: str) -> None:
    """Committing into a base that a sibling stands on: neither a known nor an unknown sibling sees a change."""
    web1("snapshot web1 s1")
    web1.write(".x")
    web1("branch web1 b1 --from s1")
    web1("delete web1 s1 --merge auto")
    before = (web1.disks / "web1.qcow2").read_bytes()
    web1("gc web1")
    assert (web1.disks / "web1.qcow2").read_bytes() == before
    assert (web1.shows(), web1.shows("b1")) == ("bx......", "b.......")

    web1("delete web1 --branch b1 --merge none")
    stranger = web1.image("stranger.qcow2", backing="web1.qcow2", word="..s")
    assert "stranger.qcow2 stands on it" in web1(f"squash web1 --disk vda --merge {way}", status=6).err
    web1("gc web1")

    assert (web1.disks / "web1.qcow2").read_bytes() == before
    assert word_of(images.read(stranger)) == "b.s....." and web1.shows() == "bx......"


@WAYS
@pytest.mark.parametrize("root", ["raw", "qcow2"])
@pytest.mark.parametrize("slots", [5, 12])
def test_a_merged_layer_is_as_long_as_the_upper_one(scene: Scene, root: str, slots: int, way: str) -> None:
    """Overlay larger than base, overlay smaller than base: the merged layer has the size of the upper one."""
    path = scene.image(f"web1.{root}", root, word="bbbbbbbb")
    scene(f"add web1 --disk vda={path},format={root}")
    scene("snapshot web1 s1")
    resize(scene.path("main"), slots)
    scene.write(".x")
    wanted = "bxbbbbbb".ljust(slots, ".")[:slots]
    assert scene.shows() == wanted

    scene(f"delete web1 s1 --merge {way}")

    assert scene.shows() == wanted and len(scene.files()) == 1
    assert scene.show()["layers"][0]["virtual_size"] == slots * SLOT
    # What was cut off does not come back.
    last = scene.path("main")
    images.run("qemu-img", "resize", "-q", "-f", scene.format_of(last), last, str(16 * SLOT))
    assert scene.shows() == wanted.ljust(16, ".")
    scene.sound()


def test_a_base_is_not_cut_while_something_else_stands_on_it(web1: Scene) -> None:
    """Overlay smaller than base: a base that another line or an internal snapshot needs keeps its length."""
    web1.write("bbbbbbbb")
    web1("snapshot web1 i1 --internal")
    web1("snapshot web1 s1")
    web1("branch web1 long --from s1")
    resize(web1.path("main"), 4)
    web1.write("x")
    web1("delete web1 s1")
    assert (web1.shows(), web1.shows("long"), web1.shows("i1")) == ("xbbb", "b" * 8, "b" * 8)
    web1("delete web1 --branch long")
    assert (web1.shows(), web1.shows("i1")) == ("xbbb", "b" * 8)
    web1("delete web1 i1")
    web1("gc web1")
    assert web1.shows() == "xbbb" and len(web1.files()) == 1
    web1.sound()


@WAYS
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_what_a_short_layer_hides_stays_hidden(scene: Scene, way: str, compat: str) -> None:
    """Short layer in the middle: past its end zeroes show, not what the base has there."""
    scene.image("web1.qcow2", word="bbbbbbbb", compat=compat)
    scene("add web1 --disk vda=web1.qcow2")
    scene("snapshot web1 s1")
    resize(scene.path("main"), 3)
    scene.write(".m")
    scene("snapshot web1 s2")
    resize(scene.path("main"), 8)
    scene.write(".....t")
    assert scene.shows() == "bmb..t.."

    scene(f"delete web1 s2 --merge {way}")
    assert (scene.shows(), scene.shows("s1")) == ("bmb..t..", "b" * 8)
    scene(f"delete web1 s1 --merge {way}")
    assert scene.shows() == "bmb..t.." and len(scene.files()) == 1
    scene.sound()


@pytest.mark.parametrize("way", ["auto", "commit", "pull"])
@pytest.mark.parametrize("place", ["lower", "upper"])
def test_internal_snapshots_show_the_same_after_a_merge(web1: Scene, way: str, place: str) -> None:
    """Internal snapshots in a layer: neither a pull nor another backing file changes what they show."""
    if place == "lower":
        web1("snapshot web1 inner --internal")
    web1.write(".x")
    web1("snapshot web1 s1")
    web1.write("..y")
    if place == "upper":
        web1("snapshot web1 inner --internal")
    inner = "b......." if place == "lower" else "bxy....."
    web1.write(".z")

    web1(f"delete web1 s1 --merge {way}")

    assert (web1.shows(), web1.shows("inner")) == ("bzy.....", inner)
    web1("revert web1 inner --discard")
    assert web1.shows() == inner
    web1.sound()


@WAYS
def test_layers_between_go_with_the_merge(web1: Scene, way: str) -> None:
    """Commit over several layers: those between go in the same breath, and a cluster moves once at most."""
    for letter in "cde":
        web1(f"snapshot web1 {letter}")
        web1.write(f".{letter}")
    plan = web1(f"delete web1 c d e --merge {way} --plan --json").json
    assert plan["bytes_to_copy"] == SLOT

    web1(f"delete web1 c d e --merge {way}")

    assert web1.files() == {"web1.qcow2"} and web1.shows() == "be......"
    assert len(web1.show()["layers"]) == 1
    web1.sound()


@pytest.mark.parametrize("crashed", [False, True])
@pytest.mark.parametrize("place", ["lower", "upper"])
def test_bitmaps_are_reported_and_never_dropped(web1: Scene, place: str, crashed: bool) -> None:
    """Persistent bitmaps: a merge that would drop or spoil them is not done, and says so; so too when one is in use."""

    def mark() -> Path:
        path = web1.path("main")
        images.run("qemu-img", "bitmap", "--add", path, "backup")
        if crashed:
            words = ["-c", f"write -P {ord('c')} {3 * SLOT} {SLOT}", "-c", "flush", "-c", "sigraise 9"]
            images.run("qemu-io", "-f", "qcow2", *words, path, good=(-9,))
        return path

    marked = mark() if place == "lower" else None
    web1("snapshot web1 s1")
    marked = marked or mark()
    web1.write(".x")
    wanted = "bx.c...." if crashed else "bx......"
    assert web1.shows() == wanted
    for line in ("delete web1 s1", "gc web1", "gc web1"):
        assert "persistent bitmaps (backup)" in web1(line).out
    assert web1.shows() == wanted
    kept = images.info(marked)["format-specific"]["data"]["bitmaps"]
    assert [each["name"] for each in kept] == ["backup"]
    assert not crashed or "in-use" in kept[0]["flags"]

    if place == "upper":
        images.run("qemu-img", "bitmap", "--remove", marked, "backup")
        web1("gc web1")
        assert web1.shows() == wanted and len(web1.files()) == 1


@WAYS
def test_compressed_clusters_are_counted_as_they_will_be(web1: Scene, way: str) -> None:
    """Compressed clusters: a merge writes them out, and the plan has said how much that takes."""
    source, target = ("upper", "lower") if way == "commit" else ("lower", "upper")
    files = {"lower": web1.path("main")}
    web1("snapshot web1 s1")
    files["upper"] = web1.path("main")
    if source == "lower":
        web1("revert web1 s1 --discard --delete")
        assert files["lower"] == web1.path("main")
    squeezed = [f"write -c -P {ord('c')} {at * SLOT} {SLOT}" for at in range(1, 7)]
    images.io(files[source], "qcow2", *squeezed)
    if source == "lower":
        web1("snapshot web1 s1")
        files["upper"] = web1.path("main")
        web1.write("u")
    assert files[source].stat().st_blocks * 512 < 6 * SLOT
    plan = web1(f"delete web1 s1 --merge {way} --plan --json").json
    before = files[target].stat().st_blocks * 512

    web1(f"delete web1 s1 --merge {way}")

    grown = web1.path("main").stat().st_blocks * 512 - before
    assert plan["bytes_to_copy"] == 6 * SLOT
    # A file in many pieces takes a block or two of the file system's for the list of them.
    assert 6 * SLOT <= grown <= plan["peak_extra_bytes"] + 16 * KiB <= 8 * SLOT
    assert web1.shows() == ("b" if way == "commit" else "u") + "cccccc."


def test_a_disk_that_the_lower_file_cannot_hold_is_merged_into_the_upper_one(scene: Scene) -> None:
    """QEMU opens no image with an L1 table of more than 32 MiB: with clusters of 512 bytes that is 128 GiB."""
    base = scene.image("web1.qcow2", word="bbbb....", cluster_size=512)
    scene("add web1 --disk vda=web1.qcow2")
    scene("snapshot web1 s1")
    tip = scene.path("main")
    tip.unlink()
    images.create(tip, 200 * GiB, backing=(base, "qcow2"))
    scene.write(".x")
    assert "too small for" in scene("delete web1 s1 --merge commit --plan").out
    scene("delete web1 s1")
    images.io(scene.path("main"), "qcow2", f"read -P 0x62 0 {SLOT}", f"read -P 0x78 {SLOT} {SLOT}")
    assert len(scene.files()) == 1


@WAYS
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("golden", [False, True])
def test_zero_clusters_hide_what_is_below(scene: Scene, compat: str, way: str, golden: bool) -> None:
    """Zero clusters: they overwrite, also in a version 2 file, which has none, and above a golden image."""
    if golden:
        scene.image("golden.qcow2", word="gggggggg")
    scene.image("web1.qcow2", word="bbbb", compat=compat, backing="golden.qcow2" if golden else "")
    scene("add web1 --disk vda=web1.qcow2")
    scene("snapshot web1 s1")
    scene.write("0.0.0")
    wanted = ".b.b.ggg" if golden else ".b.b...."
    assert scene.shows() == wanted

    scene(f"delete web1 s1 --merge {way}")

    assert scene.shows() == wanted and scene.chain()[0] == "web1.qcow2"
    scene.sound()


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 4096},
        {"cluster_size": 2 * MiB},
        {"cluster_size": 128 * KiB, "extended_l2": "on"},
        {"refcount_bits": 64},
        {"compression_type": "zstd"},
        {"lazy_refcounts": "on"},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_overlays_have_the_options_of_their_base(scene: Scene, options: dict[str, Any]) -> None:
    """Extended L2, other cluster sizes: an overlay of snaptree's is made as its base was."""
    scene.image("web1.qcow2", word="b", **options)
    scene("add web1 --disk vda=web1.qcow2")
    scene("snapshot web1 s1")
    scene.write(".x")
    scene("branch web1 b1 --from s1")

    def made(path: Path) -> dict[str, Any]:
        said = images.info(path)
        data = said["format-specific"]["data"]
        return {"cluster-size": said["cluster-size"], **{key: data[key] for key in data if key not in ("corrupt",)}}

    base = made(scene.path("s1"))
    assert made(scene.path("main")) == made(scene.path("b1")) == base
    scene("delete web1 --branch b1")
    scene("delete web1 s1")
    assert made(scene.path("main")) == base and scene.shows() == "bx......"
    scene.sound()


def large(scene: Scene) -> bytes:
    """A machine with a disk of 256 MiB that has 24 MiB above the snapshot ``s1``; what it shows."""
    path = images.create(scene.disks / "web1.qcow2", 256 * MiB)
    images.io(path, "qcow2", "write -P 1 0 24M")
    scene("add web1 --disk vda=web1.qcow2")
    scene("snapshot web1 s1")
    images.io(scene.path("main"), "qcow2", "write -P 2 100M 24M")
    return images.read(scene.path("main"))


@WAYS
def test_progress_counts_the_bytes_that_move(scene: Scene, way: str) -> None:
    """Progress counts virtual size: what is shown ends at the bytes that move, and never goes back."""
    large(scene)
    seen: list[tuple[int, int]] = []

    def watch(progress: Progress) -> None:
        if progress.total:
            seen.append((progress.done, progress.total))

    Connection(str(scene.state)).machine("web1").run(DeleteRequest(("s1",), merge=way), progress=watch)
    moved = [done for done, _ in seen]
    assert {total for _, total in seen} == {24 * MiB}
    assert max(moved) == 24 * MiB


def children() -> list[int]:
    """QEMU's programs that this process has started."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for word in (task / "children").read_text().split():
            if Path(f"/proc/{word}/comm").read_text().startswith("qemu"):
                found.append(int(word))
    return found


@WAYS
@pytest.mark.usefixtures("by_qemu")
def test_a_merge_ends_when_qemu_is_gone(scene: Scene, way: str) -> None:
    """QEMU may be gone at any message: the wait ends, with a clear error and everything whole."""
    wanted = large(scene)
    gone: list[float] = []

    def kill(progress: Progress) -> None:
        for process in children():
            os.kill(process, signal.SIGKILL)
            gone.append(time.monotonic())

    with pytest.raises(SnaptreeError) as raised:
        Connection(str(scene.state)).machine("web1").run(DeleteRequest(("s1",), merge=way), progress=kill)
    assert gone and time.monotonic() - gone[-1] < 5
    assert raised.value.message and "gc web1" in raised.value.hint
    assert images.read(scene.path("main")) == wanted
    scene("gc web1")
    assert images.read(scene.path("main")) == wanted and len(scene.files()) == 1
    scene.sound()
