"""Bad input: one clear message on stderr, its documented exit status, nothing touched."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.images import MiB
from tests.kit.scene import TOOL, Scene, command
from tests.kit.space import filled, held, mounted


def untouched(scene: Scene) -> dict[str, tuple[int, int, int]]:
    """What the files look like, to compare."""
    found = {}
    for path in sorted(scene.disks.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def refused(scene: Scene, line: str, status: int, *words: str) -> None:
    """The command fails with the status and a message with these words; no file changes, nothing is begun."""
    before = untouched(scene)
    said = scene(line, status=status)
    assert said.err.startswith("snaptree: "), said.err
    assert len([row for row in said.err.splitlines() if row.startswith("snaptree: ")]) == 1
    for word in words:
        assert word in said.err, f"{word!r} is not in {said.err!r}"
    assert "Traceback" not in said.err and "unforeseen" not in said.err
    assert untouched(scene) == before


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "..",
        ".hidden",
        "-dash",
        "x" * 300,
        "new\nline",
        "tab\t",
        "bell\a",
        "",
        " ",
        " lead",
        "é" * 95,
        "esc\x1b[2J",
    ],
)
@pytest.mark.parametrize(
    "line", ["snapshot web1 -- {}", "branch web1 -- {}", "rename web1 -- s1 {}", "add --disk new.qcow2 -- {}"]
)
def test_names_that_cannot_be(web1: Scene, name: str, line: str) -> None:
    web1("snapshot web1 s1")
    web1.image("new.qcow2")
    refused(web1, line.format(f"'{name}'"), 2, "name")


def test_names_that_are_taken_or_unknown(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1("branch web1 b1 --from s1")
    for line, status, word in (
        ("snapshot web1 s1", 4, "already"),
        ("snapshot web1 b1", 4, "already"),
        ("snapshot web1 main", 4, "already"),
        ("branch web1 s1", 4, "already"),
        ("rename web1 s1 b1", 4, "already"),
        ("rename web1 nothing n", 3, "'nothing'"),
        ("add web1 --disk web1.qcow2", 4, "web1"),
        ("snapshot web9 s1", 3, "web9"),
        ("tree web9", 3, "web9"),
        ("delete web1 nothing", 3, "nothing"),
        ("delete web1 b1", 3, "--branch b1"),
        ("delete web1 --branch s1", 3, "leave out --branch"),
        ("delete web1 --branch main", 6, "main"),
        ("delete web1", 2, "no snapshot is named"),
        ("delete web1 s1 --children --children-only", 2, "exclude"),
        ("delete web1 s1 --memory-only", 6, "no memory"),
        ("revert web1 nothing", 3, "nothing"),
        ("revert web1 b1", 3, "switch"),
        ("revert web1 s1 --discard --keep-as x", 2, "exclude"),
        ("revert web1 s1 --children", 2, "--discard"),
        ("revert web1 s1 --keep-as s1", 4, "already"),
        ("switch web1 nothing", 3, "nothing"),
        ("switch web1 s1", 3, "revert"),
        ("switch web1 main", 6, "already"),
        ("branch web1 new --from nothing", 3, "nothing"),
        ("branch web1 new --from b1", 6, "branch"),
        ("path web1 vdz", 3, "vdz"),
        ("snapshot web1 s2 --exclude vdz", 3, "vdz"),
        ("snapshot web1 s2 --exclude vda", 2, "every disk"),
        ("snapshot web1 s2 --file vdz=x.qcow2", 3, "vdz"),
        ("snapshot web1 s2 --file vda=web1.qcow2", 4, "exists"),
        ("snapshot web1 s2 --file vda=nowhere/x.qcow2", 3, "folder"),
        ("snapshot web1 s2 --file vda=x.img", 6, ".qcow2"),
        ("snapshot web1 s2 --file x.qcow2", 2, "TARGET=PATH"),
        ("disk detach web1 vdz", 3, "vdz"),
        ("disk detach web1 vda", 6, "only disk"),
        ("squash web1 --disk vdz", 3, "vdz"),
        ("squash web1 --top nothing.qcow2", 6, "not a layer"),
        ("set web1", 2, "nothing to set"),
        ("set web1 --nvram nowhere.fd", 3, "nowhere.fd"),
        ("show web1 nothing", 3, "nothing"),
        ("show web1 --xml nothing", 3, "nothing"),
    ):
        if "s2" in line and "--file" in line:
            web1.write("x")
        refused(web1, line, status, word)


def test_what_click_refuses_has_the_status_for_usage(web1: Scene) -> None:
    for line in (
        "",
        "nonsense",
        "tree",
        "delete web1 s1 --merge sideways",
        "snapshot web1 s1 --wait soon",
        "tree web1 --bad",
    ):
        said = command(*line.split(), state=web1.state)
        assert said.status == (0 if not line and said.out else 2), (line, said)


def test_what_click_refuses_is_json_too(web1: Scene) -> None:
    for line in ("delete web1 s1 --merge sideways --json", "nonsense --json", "snapshot --json"):
        said = command(*line.split(), state=web1.state)
        error = said.json["error"]
        assert (said.status, error["code"], error["status"]) == (2, "usage", 2)
        assert error["message"] and "Traceback" not in said.err


@pytest.mark.parametrize(
    ("disks", "status", "word"),
    [
        ("--disk vda=a.qcow2 --disk vda=b.qcow2", 4, "twice"),
        ("--disk vda=a.qcow2 --disk vdb=a.qcow2", 4, "two disks"),
        ("--disk vda=web1.qcow2", 4, "belongs to machine 'web1'"),
        ("--disk VDA=a.qcow2", 2, "target"),
        ("--disk vda=", 2, "no path"),
        ("--disk vda=a.qcow2,format=vmdk", 2, "vmdk"),
        ("--disk vda=missing.qcow2", 3, "missing.qcow2"),
        ("--disk vda=.", 7, "neither a regular file"),
        ("", 2, "--disk"),
    ],
)
def test_disks_that_cannot_be_added(web1: Scene, disks: str, status: int, word: str) -> None:
    web1.image("a.qcow2")
    web1.image("b.qcow2")
    refused(web1, f"add web2 {disks}", status, word)
    assert [each["machine"] for each in web1("list --json").json] == ["web1"]


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def truncated(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(70_000)


def rebased(path: Path, backing: str, image_format: str) -> None:
    images.run("qemu-img", "rebase", "-u", "-b", backing, "-F", image_format, path)


def on_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    rebased(path, "pipe", "raw")


def not_qcow2(path: Path) -> None:
    path.write_bytes(b"something else altogether" * 1000)


BAD_IMAGES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "empty": (lambda path: path.write_bytes(b""), 7, "bad.qcow2"),
    "not qcow2": (not_qcow2, 7, "bad.qcow2"),
    "truncated tables": (truncated, 7, "bad.qcow2"),
    "marked corrupt": (lambda path: patch(path, 72, struct.pack(">Q", 2)), 7, "corrupt"),
    "an external data file": (lambda path: patch(path, 72, struct.pack(">Q", 4)), 6, "external data file"),
    "unknown features": (lambda path: patch(path, 72, struct.pack(">Q", 1 << 40)), 7, "feature"),
    "version 9": (lambda path: patch(path, 4, struct.pack(">I", 9)), 7, "version"),
    "clusters of 2^60": (lambda path: patch(path, 20, struct.pack(">I", 60)), 7, "cluster"),
    "a huge L1 table": (lambda path: patch(path, 36, struct.pack(">I", 0xFFFFFFF0)), 7, "L1"),
    "a size of 2^63": (lambda path: patch(path, 24, struct.pack(">Q", 1 << 63)), 7, "bad.qcow2"),
    "a backing name past the header": (
        lambda path: patch(path, 8, struct.pack(">QI", 1 << 40, 20)), 7, "backing"),
    "itself as backing file": (lambda path: rebased(path, "bad.qcow2", "qcow2"), 7, "loop"),
    "a backing file that is missing": (lambda path: rebased(path, "gone.qcow2", "qcow2"), 7, "gone.qcow2"),
    "a backing file of another format": (lambda path: rebased(path, "raw.img", "qcow2"), 7, "raw.img"),
    "a backing file in another folder": (lambda path: rebased(path, "/etc/passwd", "raw"), 6, "--base"),
    "a json: name": (lambda path: rebased(path, 'json:{"driver":"null-co"}', "raw"), 6, "json:"),
    "a protocol": (lambda path: rebased(path, "nbd://localhost/x", "raw"), 6, "nbd:"),
    "a FIFO beneath": (on_a_pipe, 7, "pipe"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_images_that_are_not_what_they_should_be(web1: Scene, kind: str) -> None:
    spoil, status, word = BAD_IMAGES[kind]
    web1.image("raw.img", "raw", word="r")
    spoil(web1.image("bad.qcow2", word="x"))
    refused(web1, "add web2 --disk vda=bad.qcow2", status, word)


def test_a_longer_loop_of_backing_files(web1: Scene) -> None:
    web1.image("one.qcow2")
    web1.image("two.qcow2", backing="one.qcow2")
    images.run("qemu-img", "rebase", "-u", "-b", "two.qcow2", "-F", "qcow2", web1.disks / "one.qcow2")
    refused(web1, "add web2 --disk vda=two.qcow2 --adopt", 7, "loop")


def test_a_raw_disk_is_never_probed(web1: Scene) -> None:
    path = web1.image("guest.img", "raw")
    patch(path, 0, (web1.disks / "web1.qcow2").read_bytes()[:512])
    refused(web1, "add web2 --disk vda=guest.img", 2, "format=raw")
    web1("add web2 --disk vda=guest.img,format=raw")
    assert web1.show("web2")["layers"][0]["format"] == "raw"


def bound(scene: Scene, *words: str, status: int) -> str:
    """Run the command line as one whom the files' modes bind, root or not; what it said."""
    less = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    said = subprocess.run(
        [*less, *TOOL, *words],
        cwd=scene.disks,
        env={**os.environ, "SNAPTREE_STATE": str(scene.state)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == status, said
    if status:
        assert said.stderr.startswith("snaptree: ") and "Traceback" not in said.stderr, said
    return said.stdout + said.stderr


def test_images_that_may_not_be_read(scene: Scene) -> None:
    path = scene.image("secret.qcow2")
    path.chmod(0o000)
    assert "secret.qcow2" in bound(scene, "add", "web1", "--disk", "vda=secret.qcow2", status=7)
    path.chmod(0o600)
    bound(scene, "add", "web1", "--disk", "vda=secret.qcow2", status=0)
    path.chmod(0o000)
    before = untouched(scene)
    assert "secret.qcow2" in bound(scene, "snapshot", "web1", "s1", status=6)
    assert untouched(scene) == before


def test_images_that_may_not_be_written_to(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.write(".x")
    web1("snapshot web1 s2")
    web1.write("..y")
    web1("snapshot web1 s3")
    web1.path("main").chmod(0o444)
    before = untouched(web1)

    # Refused before anything is begun: nothing is left to recover that could not be.
    assert "web1.s3.qcow2" in bound(web1, "snapshot", "web1", "inner", "--internal", status=6)
    assert untouched(web1) == before and {"s1", "s2", "s3", "main"} == set(web1.names())

    # Its header cannot be changed: the name goes, and what is beneath stays as it is, with a word.
    said = bound(web1, "delete", "web1", "s2", "--merge", "commit", status=0)
    assert "web1.s3.qcow2" in said and "read-only" in said
    assert untouched(web1) == before
    web1.path("main").chmod(0o600)
    bound(web1, "gc", "web1", status=0)
    assert (web1.shows("s1"), web1.shows("s3"), web1.shows()) == ("b.......", "bxy.....", "bxy.....")
    web1.sound()


def test_an_image_that_cannot_count_to_two_holds_no_internal_snapshot(scene: Scene) -> None:
    scene.image("web1.qcow2", word="b", refcount_bits=1)
    scene("add web1 --disk vda=web1.qcow2")
    refused(scene, "snapshot web1 s1 --internal", 6, "web1.qcow2", "one bit")
    scene("snapshot web1 s1")
    scene.write(".x")
    scene("delete web1 s1")
    assert scene.shows() == "bx......"
    scene.sound()


def test_a_state_folder_that_may_not_be_looked_into_is_not_taken_for_an_empty_one(web1: Scene) -> None:
    web1.state.chmod(0o000)
    try:
        assert str(web1.state) in bound(web1, "list", status=11)
    finally:
        web1.state.chmod(0o700)


def test_an_image_that_another_process_has_open(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.write(".x")
    web1.image("free.qcow2")
    with held(web1.disks / "free.qcow2") as process:
        refused(web1, "add web2 --disk vda=free.qcow2", 5, "free.qcow2", f"qemu-io ({process})")
    with held(web1.disks / "web1.qcow2", read_only=True) as process:
        refused(web1, "delete web1 s1 --merge commit", 5, "web1.qcow2", f"qemu-io ({process})")
        assert "s1" not in web1.names() or web1.shows("s1") == "b......."
    assert web1.shows() == "bx......"


def test_a_frozen_layer_that_was_written_from_outside(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.write(".x")
    web1("branch web1 b1 --from s1")
    images.io(web1.disks / "web1.qcow2", "qcow2", "write -P 9 0 64k")

    for line in ("snapshot web1 s2", "revert web1 s1", "branch web1 b2 --from s1", "switch web1 b1"):
        refused(web1, line, 7, "web1.qcow2", "written to")
    said = web1("verify web1", status=10)
    assert "web1.qcow2 was written to after it was frozen" in said.out
    assert "needed by: b1, main, s1" in said.out


def test_a_layer_that_is_missing(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.write(".x")
    web1("snapshot web1 s2")
    web1.write("..y")
    moved = web1.path("s2").rename(web1.folder / "moved")

    refused(web1, "snapshot web1 s3", 7, "is not there")
    assert "missing" in web1("tree web1").out
    web1("verify web1", status=10)
    web1("revert web1 s1 --discard")
    assert web1.shows() == "b......."
    shutil.move(moved, web1.path("s2"))
    assert web1.shows("s2") == "bx......"


@pytest.mark.root
def test_a_merge_that_would_not_fit_is_refused_with_the_figures(scene: Scene, tmp_path: Path) -> None:
    with mounted(tmp_path, "ext4", 96 * MiB) as place:
        (place / "lost+found").rmdir()
        scene.disks = place
        path = images.create(place / "web1.qcow2", 64 * MiB)
        images.io(path, "qcow2", "write -P 1 0 24M")
        scene("add web1 --disk vda=web1.qcow2")
        scene("snapshot web1 s1")
        images.io(scene.path("main"), "qcow2", "write -P 2 24M 24M")
        with filled(place, 8 * MiB):
            refused(scene, "delete web1 s1", 8, "needs", "has")
            assert "s1" in scene.names()
            scene("delete web1 s1 --merge none")
        scene("gc web1")
        assert scene.chain() == ["web1.qcow2"]
        scene.sound()


@pytest.mark.root
def test_a_full_disk_when_taking_a_snapshot(scene: Scene, tmp_path: Path) -> None:
    with mounted(tmp_path, "ext4", 32 * MiB) as place:
        (place / "lost+found").rmdir()
        scene.disks = place
        scene.image("web1.qcow2", word="b")
        scene("add web1 --disk vda=web1.qcow2")
        filler = place / "filler"
        with filler.open("wb", buffering=0) as file:
            for size in (65536, 4096, 512):
                with contextlib.suppress(OSError):
                    while file.write(b"x" * size):
                        pass
        refused(scene, "snapshot web1 s1", 8, "room")
        filler.unlink()
        assert list(scene.names()) == ["main"]
        scene.sound()


def test_a_state_folder_that_cannot_be_used(web1: Scene) -> None:
    blocked = web1.folder / "blocked"
    blocked.write_text("a file, not a folder")
    said = command("list", state=blocked)
    assert (said.status, said.out) == (11, "") and str(blocked) in said.err
    newer = web1.folder / "newer"
    shutil.copytree(web1.state, newer)
    (database,) = newer.glob("*.sqlite*") if len(list(newer.glob("*.sqlite*"))) == 1 else [min(newer.glob("*.sqlite*"))]
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA user_version = 999")
    connection.close()
    said = command("list", state=newer)
    assert said.status == 11 and "newer" in said.err
    garbage = web1.folder / "garbage"
    garbage.mkdir()
    (garbage / database.name).write_bytes(b"this is not a database at all" * 500)
    said = command("list", state=garbage)
    assert said.status == 11 and "snaptree: " in said.err


def test_two_state_folders_on_one_image(web1: Scene) -> None:
    """The second one sees what the first has made of the image, and neither loses anything."""
    other = web1.folder / "other"
    said = command("add", "web1", "--disk", f"vda={web1.disks / 'web1.qcow2'}", state=other)
    assert said.status == 0
    web1("snapshot web1 s1")
    web1.write(".x")

    said = command("snapshot", "web1", "mine", state=other)
    assert said.status in (0, 7)
    said = command("delete", "web1", "mine", "--merge", "commit", state=other)

    assert web1.shows() == "bx......" and web1.shows("s1") == "b......."


def test_two_operations_exclude_each_other_across_state_folders(web1: Scene) -> None:
    from snaptree.images.locks import MachineLock

    lock = MachineLock()
    lock.acquire([str(web1.disks / "web1.qcow2")])
    try:
        refused(web1, "snapshot web1 s1", 5, "another snaptree operation", "--wait")
        assert web1("tree web1").out, "looking takes no lock"
        assert web1("snapshot web1 s1 --plan").out
    finally:
        lock.release()
    web1("snapshot web1 s1 --wait 5")


def test_symlinks(web1: Scene) -> None:
    web1.image("real.qcow2", word="r")
    link = web1.folder / "link.qcow2"
    link.symlink_to(web1.disks / "real.qcow2")

    web1(f"add web2 --disk vda={link}")
    web1("snapshot web2 s1")

    assert web1.show("web2")["layers"][0]["path"] == str(web1.disks / "real.qcow2")
    assert link.is_symlink()
    refused(web1, f"add web3 --disk vda={link}", 4, "belongs to machine 'web2'")
    web1.write("x", machine="web2")
    trap = web1.disks / "trap.qcow2"
    trap.symlink_to(web1.folder / "victim")
    refused(web1, "snapshot web2 s2 --file vda=trap.qcow2", 4, "exists")
    assert not (web1.folder / "victim").exists()


@pytest.mark.parametrize(
    "stem", ["with space", "co:lon", "com,ma", "quo'te", 'dou"ble', "größe", "nbd:x", "json:{}", "-dash", "50%"]
)
def test_file_names_of_all_kinds(scene: Scene, stem: str) -> None:
    path = scene.disks / f"{stem}.qcow2"
    images.create(scene.disks / "plain.qcow2", 8 * 65536)
    (scene.disks / "plain.qcow2").rename(path)
    assert command("add", "web1", "--disk", f"vda=./{stem}.qcow2", state=scene.state, folder=scene.disks).status == 0
    scene("snapshot web1 s1")
    scene("snapshot web1 inner --internal")
    scene("branch web1 b1 --from s1")
    scene("revert web1 s1")
    scene("delete web1 s1 inner --merge pull")
    scene("delete web1 --branch b1")
    if "main.1" in scene.names():
        scene("delete web1 --branch main.1")

    assert scene.files() == {f"{stem}.qcow2"}
    assert command("verify", "web1", state=scene.state).status == 0
