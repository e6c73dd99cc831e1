"""What libvirt 11.3 gets silently wrong (rows C), with the machine off: right, or refused beforehand."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.images import MiB
from tests.kit.scene import Scene
from tests.kit.space import filled, held, mounted

from snaptree.errors import CancelledError, NoSpaceError
from snaptree.machines.connection import Connection
from snaptree.planning.delete import DeleteRequest
from snaptree.running.progress import Progress


def test_c1_no_order_of_going_back_and_deleting_loses_a_file(web1: Scene) -> None:
    for number in "123":
        web1(f"snapshot web1 s{number}")
        web1.write("." * int(number) + number)
    for go, gone in (("s1", "s2"), ("s3", "s1")):
        web1(f"revert web1 {go}")
        web1(f"delete web1 {gone}")

    assert web1.shows("main") == web1.shows("s3") == "b12....."
    assert web1.shows("main.1") == "b123...."
    web1.sound()


def test_c2_going_back_below_an_external_one_leaves_it_right(web1: Scene) -> None:
    web1("snapshot web1 inner --internal")
    web1.write(".x")
    web1("snapshot web1 outer")
    web1.write("..y")

    web1("revert web1 inner")
    web1.write("z")

    assert web1.shows("main") == "z......."
    assert web1.shows("inner") == "b......."
    assert web1.shows("outer") == "bx......"
    assert web1.shows("main.1") == "bxy....."
    web1.sound()


def test_c4_an_image_that_another_machine_stands_on_is_never_rewritten(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.write(".x")
    frozen = web1.disks / "web1.qcow2"
    web1.image("web2.qcow2", backing="web1.qcow2", word="..2")
    before = frozen.read_bytes()
    web1("add web2 --disk vda=web2.qcow2")

    web1("delete web1 s1")

    assert frozen.read_bytes() == before
    assert web1.shows() == "bx......"
    assert web1.shows(machine="web2") == "b.2....."
    assert "machine 'web2' stands on" in web1("gc web1").out
    web1.sound("web1", "web2")


def two_disks(scene: Scene, disks: Path) -> None:
    """A machine whose disks both have 20 MiB above the snapshot ``s1``, and 20 MiB of other places below it."""
    scene.disks = disks
    for disk in ("vda", "vdb"):
        images.create(disks / f"{disk}.qcow2", 64 * MiB)
        images.io(disks / f"{disk}.qcow2", "qcow2", "write -P 1 0 20M")
    scene("add web1 --disk vda=vda.qcow2 --disk vdb=vdb.qcow2")
    scene("snapshot web1 s1")
    for disk in ("vda", "vdb"):
        images.io(scene.path("main", disk), "qcow2", "write -P 2 30M 20M")


@pytest.mark.root
def test_c8_a_full_disk_leaves_all_disks_of_one_time(scene: Scene, tmp_path: Path) -> None:
    with mounted(tmp_path, "ext4", 160 * MiB) as place:
        two_disks(scene, place)
        wanted = {disk: images.read(scene.path("main", disk)) for disk in ("vda", "vdb")}

        def fill(progress: Progress) -> None:
            # The disk fills up just when the merge has begun to move.
            if progress.total and not filler:
                filler.append(filled(place, 6 * MiB))
                filler[0].__enter__()

        filler: list[AbstractContextManager[Path]] = []
        machine = Connection(str(scene.state)).machine("web1")
        with pytest.raises(NoSpaceError) as raised:
            machine.run(DeleteRequest(("s1",), merge="commit"), progress=fill)
        assert "gc web1" in raised.value.hint

        assert "s1" not in scene.names()
        for disk, content in wanted.items():
            assert images.read(scene.path("main", disk)) == content
        (place / "filler").unlink()
        scene("gc web1")
        for disk, content in wanted.items():
            assert scene.chain("main", disk) == [f"{disk}.qcow2"]
            assert images.read(scene.path("main", disk)) == content
        (place / "lost+found").rmdir()
        scene.sound()


@pytest.mark.parametrize("way", ["commit", "pull"])
def test_c9_progress_is_shown_and_cancelling_works(scene: Scene, way: str) -> None:
    two_disks(scene, scene.disks)
    wanted = {disk: images.read(scene.path("main", disk)) for disk in ("vda", "vdb")}
    seen: list[tuple[int, int]] = []
    stop = threading.Event()

    def watch(progress: Progress) -> None:
        if progress.total:
            seen.append((progress.done, progress.total))
            stop.set()

    machine = Connection(str(scene.state)).machine("web1")
    with pytest.raises(CancelledError) as raised:
        machine.run(DeleteRequest(("s1",), merge=way), progress=watch, cancelled=stop)
    assert seen and seen[-1][1] == 40 * MiB
    assert "gc web1" in raised.value.hint

    def shown() -> dict[str, bytes]:
        return {disk: images.read(scene.path("main", disk)) for disk in ("vda", "vdb")}

    assert shown() == wanted
    scene("gc web1")
    assert shown() == wanted
    assert scene.files() == {"vda.qcow2", "vdb.qcow2"}
    scene.sound()


def test_c10_no_machine_is_started_for_it(web1: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    import subprocess

    before = subprocess.Popen.__init__

    def note(self: object, words: list[str], *rest: object, **more: object) -> None:
        started.append(str(words[0]))
        before(self, words, *rest, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess.Popen, "__init__", note)
    web1("snapshot web1 s1")
    web1.write(".x")
    web1("delete web1 s1")

    assert not [name for name in started if "qemu-system" in name]


def test_c11_firmware_state_goes_with_snapshots_and_branches(scene: Scene) -> None:
    scene.image("web1.qcow2", word="a")
    nvram, tpm = scene.folder / "vars.fd", scene.folder / "tpm"
    nvram.write_text("boot: disk")
    nvram.chmod(0o640)
    tpm.mkdir()
    (tpm / "tpm2-00.permall").write_text("sealed: one")
    scene(f"add web1 --disk vda=web1.qcow2 --nvram {nvram} --tpm {tpm}")
    scene("snapshot web1 s1")
    scene("branch web1 other --from s1")
    scene.write(".x")
    nvram.write_text("boot: network")
    (tpm / "tpm2-00.permall").write_text("sealed: two")
    (tpm / "new").write_text("of two")

    scene("revert web1 s1")
    assert nvram.read_text() == "boot: disk"
    assert (tpm / "tpm2-00.permall").read_text() == "sealed: one"
    assert not (tpm / "new").exists()
    assert nvram.stat().st_mode & 0o777 == 0o640
    scene("switch web1 main.1")
    assert (nvram.read_text(), (tpm / "new").read_text()) == ("boot: network", "of two")
    scene("switch web1 other")
    assert nvram.read_text() == "boot: disk"

    scene("delete web1 s1 --with-branches")
    for name in ("main", "main.1"):
        if name in scene.names():
            scene(f"delete web1 --branch {name}")
    assert list(scene.names()) == ["other"]
    assert [path for path in (scene.state / "firmware").rglob("*") if path.is_file()] == []
    scene.sound()


def test_c11_what_only_firmware_has_written_is_kept(web1: Scene) -> None:
    nvram = web1.folder / "vars.fd"
    nvram.write_text("boot: disk")
    web1(f"set web1 --nvram {nvram}")
    web1("snapshot web1 s1")
    web1("revert web1 s1")
    assert set(web1.names()) == {"s1", "main"}
    nvram.write_text("boot: network")

    web1("revert web1 s1")

    assert nvram.read_text() == "boot: disk" and set(web1.names()) == {"s1", "main", "main.1"}
    web1("switch web1 main.1")
    assert nvram.read_text() == "boot: network"
    web1.sound()


def test_c12_going_back_keeps_the_work(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.write(".work")

    web1("revert web1 s1 --keep-as idea")

    assert web1.shows() == "b......."
    assert web1.shows("idea") == "bwork..."
    web1("revert web1 s1")
    assert set(web1.names()) == {"s1", "idea", "main"}, "a tip that was never written to is not parked"
    web1("switch web1 idea")
    assert web1.shows("idea") == "bwork..."
    web1.sound()


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_c13_a_golden_image_under_two_machines_is_never_changed(scene: Scene, image_format: str) -> None:
    golden = scene.image(f"golden.{image_format}", image_format, word="gold")
    golden.chmod(0o444)
    before = golden.read_bytes(), golden.stat().st_mtime_ns
    for machine in ("web1", "web2"):
        scene.image(f"{machine}.qcow2", backing=f"{golden.name}:{image_format}")
        said = scene(f"add {machine} --disk vda={machine}.qcow2")
        assert "golden" in said.out and "foreign" in said.out

    for machine in ("web1", "web2"):
        scene.write(f"....{machine[3]}", machine=machine)
        scene(f"snapshot {machine} s1")
        scene.write(".....x", machine=machine)
        scene(f"branch {machine} other --from s1")
        scene(f"revert {machine} s1 --discard")
        scene(f"delete {machine} s1 --with-branches --merge pull")
        scene(f"squash {machine} --merge pull", status=6)
    assert scene.shows(machine="web1") == "gold1..."
    assert scene.shows(machine="web2") == "gold2..."
    for machine in ("web1", "web2"):
        scene(f"remove {machine} --delete-files --yes")

    assert (golden.read_bytes(), golden.stat().st_mtime_ns) == before
    assert scene.files() == {golden.name}


def test_c13_a_merge_stops_above_the_golden_image(scene: Scene) -> None:
    scene.image("golden.qcow2", word="gold")
    scene.image("web1.qcow2", backing="golden.qcow2", word="....1")
    scene("add web1 --disk vda=web1.qcow2")
    scene("snapshot web1 s1")
    scene.write(".....2")

    scene("delete web1 s1")

    assert scene.chain() == ["web1.qcow2", "golden.qcow2"]
    assert scene.shows() == "gold12.."
    scene.sound()


def test_a_machine_whose_image_is_open_is_left_alone(web1: Scene) -> None:
    web1("snapshot web1 s1")
    before = web1.files()
    with held(web1.path("main")) as process:
        said = web1("snapshot web1 s2", status=6)
        assert "running" in said.err
        said = web1("delete web1 s1", status=6)
    assert process and web1.files() == before
    web1.sound()
