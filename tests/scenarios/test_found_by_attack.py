"""What attacks on snaptree have found: each is a scenario of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.images import KiB, MiB
from tests.kit.scene import Scene, command
from tests.kit.space import held

from snaptree.machines.connection import Connection
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.steps import Step
from snaptree.planning.verbs import RemoveRequest, Request
from snaptree.running import carry
from snaptree.running.context import Context


def killed_at(scene: Scene, request: Request, kind: str, words: str = "") -> None:
    """Carry out a request in a process of its own, which dies when it comes to a step of that kind and summary."""
    child = os.fork()
    if child == 0:
        before = carry.do

        async def do(step: Step, context: Context) -> None:
            if step.kind == kind and words in step.summary:
                os.kill(os.getpid(), signal.SIGKILL)
            await before(step, context)

        carry.do = do
        Connection(str(scene.state)).machine("web1").run(request)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the step did not come"


def test_what_a_detached_disk_stands_on_is_kept(web1: Scene) -> None:
    web1.image("data.qcow2", word="d")
    web1("disk attach web1 vdb=data.qcow2")
    web1("snapshot web1 s1")
    web1("snapshot web1 inner --internal")
    web1.write(".x", "vdb")
    tip = web1.path("main", "vdb")

    said = web1("disk detach web1 vdb")
    assert "stays as the branch 'main-vdb'" in said.out
    web1("delete web1 s1 inner")
    assert web1.shows("main-vdb", "vdb") == "dx......"
    web1("gc web1 --delete")

    assert web1.shows("main-vdb", "vdb") == "dx......"
    assert tip.exists() or web1.path("main-vdb", "vdb").exists()
    web1.sound()


def test_gc_never_removes_a_disk_that_its_user_let_go(web1: Scene) -> None:
    web1.image("other.qcow2", word="o")
    web1("add other --disk vda=other.qcow2")
    web1("snapshot other s1")
    web1.write("..y", machine="other")
    tip = web1.path("main", machine="other")
    web1("remove other")

    web1("gc web1 --delete")

    assert tip.exists() and (web1.disks / "other.qcow2").exists()


def test_an_overlay_that_was_let_go_still_stands_on_its_layers(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.write(".x")
    tip = web1.path("main")
    wanted = images.read(tip)
    web1("remove web1")
    web1("add again --disk vda=web1.qcow2")
    web1("snapshot again s1")
    web1.write("z", machine="again")

    web1("delete again s1")

    assert images.read(tip) == wanted
    web1.left.add(tip)
    web1.sound("again")


def test_a_pull_into_another_folder_leaves_the_chain_right(scene: Scene) -> None:
    scene.image("golden.qcow2", word="gold")
    scene.image("root.qcow2", backing="golden.qcow2", word="....r")
    (scene.disks / "x" / "y").mkdir(parents=True)
    scene("add web1 --disk vda=root.qcow2")
    for way in ("auto", "pull"):
        scene(f"snapshot web1 s1 --file vda=x/y/top-{way}.qcow2")
        scene.write(".....xyz")
        scene(f"delete web1 s1 --merge {way}")
        assert scene.shows() == "gold" + "rxyz"
    scene.sound()


@pytest.mark.root
def test_a_pull_across_file_systems(scene: Scene, tmp_path: Path) -> None:
    from tests.kit.space import mounted

    with mounted(tmp_path, "ext4", 64 << 20) as place:
        scene.image("web1.qcow2", word="b")
        scene("add web1 --disk vda=web1.qcow2")
        scene(f"snapshot web1 s1 --file vda={place}/top.qcow2")
        scene.write(".xyzxyzx")
        scene("delete web1 s1")
        assert scene.shows() == "bxyzxyzx"
        assert scene.chain() == ["web1.qcow2"], "the root keeps its name, whatever is cheaper"


def test_a_machine_added_again_after_a_removal_that_was_killed(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.write(".x")
    tip = web1.path("main")
    killed_at(web1, RemoveRequest(True), "unlink")
    assert web1("list --json").json == [] and tip.exists()

    said = command("add", "web1", "--disk", f"vda={tip}", "--adopt", state=web1.state)

    # The removal is finished first: what it was told to remove is gone, and nothing that was added since ever is.
    assert said.status == 3, said
    assert web1.files() == set()


def test_a_guest_that_wrote_between_a_kill_and_its_recovery_loses_nothing(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1.write(".x")
    tip = web1.path("main")
    killed_at(web1, DeleteRequest(("s1",), "commit"), "record", "merged layers")
    assert web1("path web1").out.strip() == str(tip), "the machine starts from the tip of before"
    time.sleep(0.02)
    web1.fill(tip, "qcow2", "..GUEST")

    web1("recover web1")
    web1("gc web1")

    assert web1.shows() == "bxGUEST."
    web1.sound()


def test_an_internal_snapshot_whose_name_is_the_number_of_another(scene: Scene) -> None:
    path = scene.image("web1.qcow2", word="b")
    images.run("qemu-img", "snapshot", "-c", "2", path)
    scene.fill(path, "qcow2", ".x")
    scene("add web1 --disk vda=web1.qcow2")
    scene("snapshot web1 later --internal")
    scene.write("..y")

    scene("revert web1 2 --discard")
    assert scene.shows() == "b......."
    scene("revert web1 later --discard")
    assert scene.shows() == "bx......"
    scene.sound()


def test_images_with_bitmaps_get_no_internal_snapshots(web1: Scene) -> None:
    web1("snapshot web1 i1 --internal")
    web1.write(".x")
    images.run("qemu-img", "bitmap", "--add", web1.disks / "web1.qcow2", "backup")
    for line in ("snapshot web1 i2 --internal", "revert web1 i1"):
        assert "bitmap" in web1(line, status=6).err
    assert web1.shows("i1") == "b......."
    images.run("qemu-img", "bitmap", "--remove", web1.disks / "web1.qcow2", "backup")
    web1("revert web1 i1")
    assert web1.shows() == "b......."
    web1.sound()


def test_a_hard_link_to_another_machines_image_is_refused(web1: Scene) -> None:
    (web1.disks / "again.qcow2").hardlink_to(web1.disks / "web1.qcow2")
    assert "belongs to machine 'web1'" in web1("add web2 --disk vda=again.qcow2", status=4).err


def test_a_golden_image_that_machines_stand_on_is_no_disk(scene: Scene) -> None:
    scene.image("golden.qcow2", word="gold")
    scene.image("web1.qcow2", backing="golden.qcow2")
    scene("add web1 --disk vda=web1.qcow2")
    assert "machine 'web1' stands on" in scene("add web2 --disk vda=golden.qcow2", status=6).err


def test_adopting_leaves_out_what_another_machine_owns(scene: Scene) -> None:
    scene.image("base.qcow2", word="b")
    scene.image("one.qcow2", backing="base.qcow2", word=".1")
    scene.image("two.qcow2", backing="base.qcow2", word=".2")
    scene("add one --disk vda=one.qcow2")
    said = scene("add two --disk vda=two.qcow2 --adopt", status=6)
    assert "machine 'one' stands on" in said.err


def test_firmware_behind_a_link_is_copied_itself(scene: Scene) -> None:
    scene.image("web1.qcow2", word="b")
    real = scene.folder / "real.fd"
    real.write_text("first")
    (scene.folder / "link.fd").symlink_to(real)
    scene(f"add web1 --disk vda=web1.qcow2 --nvram {scene.folder / 'link.fd'}")
    scene("snapshot web1 s1")
    scene.write(".x")
    real.write_text("second")
    scene("revert web1 s1")
    assert real.read_text() == "first" and (scene.folder / "link.fd").is_symlink()


def test_a_folder_that_may_not_be_changed_is_found_beforehand(scene: Scene) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs to become somebody else")
    scene.image("web1.qcow2", word="b")
    scene("add web1 --disk vda=web1.qcow2")
    scene("snapshot web1 s1")
    scene.write(".x")
    for path in (scene.folder, *scene.folder.rglob("*")):
        os.chown(path, 65534, 65534)
    scene.disks.chmod(0o555)
    script = (
        "import os, sys; os.setgid(65534); os.setuid(65534);"
        "from snaptree.cli.main import run; sys.exit(run(sys.argv[1:]))"
    )
    place = {"SNAPTREE_STATE": str(scene.state), "PATH": os.environ["PATH"]}

    def as_nobody(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", script, *words]
        return subprocess.run(line, env=place, capture_output=True, text=True, check=False)

    for folder in scene.folder.parents:
        if folder.stat().st_mode & 0o005 != 0o005 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    if as_nobody("list").returncode != 0:
        pytest.skip("this Python cannot be run by others")
    for line in ("snapshot web1 s2", "delete web1 s1"):
        done = as_nobody(*line.split())
        assert done.returncode in (0, 6), done
        assert as_nobody("tree", "web1").returncode == 0
        assert Connection(str(scene.state)).machine("web1").unfinished() == ()
    scene.disks.chmod(0o755)
    assert scene.shows() == "bx......"


def test_a_cancelled_merge_ends_at_once(web1: Scene) -> None:
    import threading

    from snaptree.errors import CancelledError

    path = images.create(web1.disks / "large.qcow2", 512 << 20)
    images.io(path, "qcow2", "write -P 1 0 1M")
    web1("disk attach web1 vdb=large.qcow2")
    web1("snapshot web1 s1")
    images.io(web1.path("main", "vdb"), "qcow2", "write -P 2 2M 300M")
    stop = threading.Event()
    moments: list[float] = []

    def watch(progress: object) -> None:
        if getattr(progress, "done", 0) and not stop.is_set():
            moments.append(time.monotonic())
            stop.set()

    with pytest.raises(CancelledError):
        Connection(str(web1.state)).machine("web1").run(
            DeleteRequest(("s1",), "commit"), progress=watch, cancelled=stop
        )
    assert moments and time.monotonic() - moments[0] < 4


def test_a_missing_layers_path_is_not_given_away(web1: Scene) -> None:
    web1("snapshot web1 s1")
    web1("branch web1 twig --from s1")
    away = web1.path("twig").rename(web1.folder / "away")
    missing = web1.path("twig")
    web1("branch web1 another --from s1 --file vda=free.qcow2")
    web1("rename web1 twig old")
    web1("branch web1 twig --from s1")
    assert web1.path("twig") != missing
    away.rename(missing)
    web1.sound()


def test_a_picture_that_cannot_be_written(web1: Scene) -> None:
    assert "nowhere" in web1("tree web1 --svg nowhere/tree.svg", status=9).err


def test_a_running_machine_can_be_renamed_and_set(web1: Scene) -> None:
    """What changes no file needs no machine that is off."""
    web1("snapshot web1 s1")
    with held(web1.path("main")):
        web1("rename web1 s1 before")
        web1("snapshot web1 s2", status=6)
    assert "before" in web1.names()


def test_a_state_folder_with_other_things_in_it_keeps_its_rights(scene: Scene) -> None:
    """Beside the images, say: QEMU's user has to get at them."""
    scene.image("web1.qcow2", word="b")
    scene.disks.chmod(0o755)
    scene.state = scene.disks
    scene("add web1 --disk vda=web1.qcow2")
    assert scene.disks.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o077 for path in scene.disks.glob("state.sqlite*")} == {0}


@pytest.mark.parametrize("by", ["mover", "qemu"])
@pytest.mark.parametrize("way", ["commit", "pull"])
def test_zeroes_that_version_2_writes_out_are_foretold(
    scene: Scene, way: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAPTREE_MOVER", by)
    images.create(scene.disks / "web1.qcow2", 2 * MiB)
    images.io(scene.disks / "web1.qcow2", "qcow2", "write -P 1 0 1M")
    below = (scene.disks / "web1.qcow2", "qcow2")
    top = images.create(scene.disks / "top.qcow2", 6 * MiB, backing=below, compat="0.10")
    images.io(top, "qcow2", "write -P 3 3M 64k")
    scene("add web1 --disk vda=top.qcow2 --adopt")
    target = top if way == "pull" else scene.disks / "web1.qcow2"
    before = images.own_data(target)

    plan = scene(f"squash web1 --merge {way} --plan --json").json
    scene(f"squash web1 --merge {way}")

    grown = images.own_data(scene.disks / "web1.qcow2") - before
    # QEMU's jobs need the zeroes in the top; with nothing beneath the mover needs none.
    zeroes = 4 * MiB - 64 * KiB if by == "qemu" else 0
    assert grown == zeroes + (MiB if way == "pull" else 64 * KiB)
    assert plan["bytes_to_copy"] == grown
    assert plan["peak_extra_bytes"] >= grown
    scene.sound()
