"""Nothing is read or written through a symbolic link that has come into the place of a file or a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.kit.rights import picture
from tests.kit.scene import Scene

from snaptree.errors import RefusedError, SnaptreeError
from snaptree.images import durable
from snaptree.machines.connection import Connection
from snaptree.planning.create import BranchRequest, SnapshotRequest
from snaptree.planning.delete import DeleteRequest
from snaptree.planning.plan import Plan
from snaptree.planning.revert import RevertRequest
from snaptree.planning.steps import BuildFromPoint, CopyFirmware, MakeOverlay, Step
from snaptree.planning.verbs import Request
from snaptree.running import carry
from snaptree.running.context import Context


@contextmanager
def before_step(kind: type[Step], act: Callable[[Step, Context], None]) -> Iterator[list[Step]]:
    """Do something each time when a step of that kind is about to be taken; the steps that came."""
    real, came = carry.do, list[Step]()

    async def do(step: Step, context: Context) -> None:
        if isinstance(step, kind):
            came.append(step)
            act(step, context)
        await real(step, context)

    carry.do = do
    try:
        yield came
    finally:
        carry.do = real


def target_of(step: Step) -> str:
    assert isinstance(step, MakeOverlay | BuildFromPoint | CopyFirmware)
    return step.target if isinstance(step, CopyFirmware) else step.path


@pytest.mark.parametrize("hidden", [False, True], ids=["name", "temporary"])
@pytest.mark.parametrize("dangling", [False, True], ids=["victim", "dangling"])
@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (MakeOverlay, "snapshot web1 s2"),
        (BuildFromPoint, "branch web1 b1 --from i1"),
        (CopyFirmware, "snapshot web1 s2"),
        (CopyFirmware, "revert web1 s1"),
    ],
    ids=["overlay", "build", "copy", "restore"],
)
def test_nothing_is_written_through_a_link_at_the_place_of_a_new_file(
    scene: Scene, kind: type[Step], line: str, dangling: bool, hidden: bool
) -> None:
    """A link that lies where a file is to be made is refused or gives way; what it leads to is not touched."""
    elsewhere = scene.folder / "elsewhere"
    elsewhere.mkdir()
    victim = elsewhere / "victim"
    if not dangling:
        victim.write_text("kept")
    nvram = scene.folder / "nvram.fd"
    nvram.write_text("first")
    scene.image("web1.qcow2", word="b")
    scene(f"add web1 --disk vda=web1.qcow2 --nvram {nvram}")
    scene("snapshot web1 i1 --internal")
    scene("snapshot web1 s1")
    scene.write(".x")
    nvram.write_text("second")
    before = picture(elsewhere)

    def act(step: Step, context: Context) -> None:
        target = target_of(step)
        place = Path(durable.temporary_path(target, context.token) if hidden else target)
        place.parent.mkdir(exist_ok=True, mode=0o700)
        place.unlink(missing_ok=True)
        place.symlink_to(victim)

    with before_step(kind, act) as came:
        try:
            scene(line)
        except AssertionError as error:
            assert "snaptree: " in str(error) and "unforeseen" not in str(error)
    assert came and picture(elsewhere) == before
    for path in scene.disks.iterdir():
        if path.is_symlink():
            path.unlink()
    if nvram.is_symlink():
        nvram.unlink()
        nvram.write_text("second")
    scene("recover web1")
    assert scene.shows() in ("bx......", "b.......") and scene.shows("s1") == "b......."
    assert picture(elsewhere) == before


def swapped(path: Path, elsewhere: Path) -> None:
    """Move a file or a folder away, and put a link to another in its place."""
    path.rename(path.with_name(path.name + ".away"))
    path.symlink_to(elsewhere)


def three(scene: Scene) -> None:
    """A machine with three layers and an internal snapshot."""
    scene.image("web1.qcow2", word="b")
    scene("add web1 --disk vda=web1.qcow2")
    scene("snapshot web1 i1 --internal")
    for number in "12":
        scene(f"snapshot web1 s{number}")
        scene.write("." * int(number) + number)


REQUESTS: dict[str, Request] = {
    "snapshot": SnapshotRequest("s3"),
    "internal": SnapshotRequest("i2", internal=True),
    "branch": BranchRequest("b1", "i1"),
    "revert": RevertRequest("s1"),
    "commit": DeleteRequest(("s1",), "commit"),
    "pull": DeleteRequest(("s2",), "pull"),
}


@pytest.mark.parametrize("which", ["folder", "web1.qcow2", "web1.s1.qcow2", "web1.s2.qcow2"])
@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("when", ["before", "between"])
def test_nothing_is_changed_through_a_link_in_the_place_of_a_layer(
    scene: Scene, request_: str, which: str, when: str
) -> None:
    """A layer or its folder that was replaced by a link to another one, before the plan or after: nothing happens."""
    three(scene)
    elsewhere = scene.folder / "elsewhere"
    shutil.copytree(scene.disks, elsewhere)
    place = scene.disks if which == "folder" else scene.disks / which
    before = picture(elsewhere), picture(scene.disks)

    def swap(_: Plan | None = None) -> bool:
        swapped(place, elsewhere if which == "folder" else elsewhere / which)
        return True

    if when == "before":
        swap()
    done = True
    try:
        Connection(str(scene.state)).machine("web1").run(
            REQUESTS[request_], confirm=swap if when == "between" else None
        )
    except SnaptreeError as error:
        done = False
        assert error.message and error.hint
    assert picture(elsewhere) == before[0]
    place.unlink()
    place.with_name(place.name + ".away").rename(place)
    if not done:
        assert picture(scene.disks) == before[1]
        scene("verify web1")


def test_a_chosen_folder_that_becomes_a_link_is_not_followed(scene: Scene) -> None:
    """The folder of ``--file`` is the one that was there when the plan was made."""
    three(scene)
    chosen, elsewhere = scene.folder / "chosen", scene.folder / "elsewhere"
    chosen.mkdir()
    elsewhere.mkdir()

    def swap(_: Plan) -> bool:
        swapped(chosen, elsewhere)
        return True

    with pytest.raises(SnaptreeError, match="chosen"):
        Connection(str(scene.state)).machine("web1").run(
            SnapshotRequest("s3", files={"vda": str(chosen / "new.qcow2")}), confirm=swap
        )
    assert list(elsewhere.iterdir()) == [] and "s3" not in scene.names()


def test_a_folder_that_became_a_link_is_not_followed(web1: Scene) -> None:
    """The folder of a machine that has one layer only, which no frozen one tells from another."""
    elsewhere = web1.folder / "elsewhere"
    shutil.copytree(web1.disks, elsewhere)
    before = picture(elsewhere)
    swapped(web1.disks, elsewhere)

    for line in ("snapshot web1 s1", "snapshot web1 s1 --internal", "branch web1 b1"):
        assert "symbolic link" in web1(line, status=7).err
    assert "symbolic link" in web1("verify web1", status=10).out
    assert picture(elsewhere) == before

    web1.disks.unlink()
    web1.disks.with_name("disks.away").rename(web1.disks)
    web1("snapshot web1 s1")
    machine = Connection(str(web1.state)).machine("web1")
    link = web1.folder / "link"
    link.symlink_to(elsewhere)
    with pytest.raises(RefusedError, match="symbolic link"):
        machine.run(SnapshotRequest("s2", files={"vda": str(link / "new.qcow2")}))
    web1.write(".x")
    web1("snapshot web1 s2 --file vda=../link/new.qcow2")
    assert web1.path("main") == elsewhere / "new.qcow2", "links are followed when they are named"


@pytest.mark.parametrize("line", ["snapshot web1 s2", "revert web1 s1", "branch web1 b1"])
def test_firmware_state_that_became_a_link_is_refused(scene: Scene, line: str) -> None:
    """A copy of the link would keep nothing, and what it leads to is nobody's to copy or to replace."""
    nvram, secret = scene.folder / "nvram.fd", scene.folder / "secret"
    nvram.write_text("first")
    secret.write_text("secret")
    scene.image("web1.qcow2", word="b")
    scene(f"add web1 --disk vda=web1.qcow2 --nvram {nvram}")
    scene("snapshot web1 s1")
    scene.write(".x")
    swapped(nvram, secret)
    before = scene.files()

    said = scene(line, status=6)

    assert str(nvram) in said.err and "symbolic link" in said.err
    assert secret.read_text() == "secret" and nvram.is_symlink() and scene.files() == before
    copies = [path for path in (scene.state / "firmware").rglob("*") if path.is_file()]
    assert [path.read_text() for path in copies] == ["first"]
    nvram.unlink()
    nvram.with_name("nvram.fd.away").rename(nvram)
    scene(line)
