"""Nobody may read what snaptree makes who may not read what it was made of, not even for a moment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.kit import images, rights
from tests.kit.rights import ACL, DEFAULT_ACL, LABEL, acl, attribute, give, may, watched
from tests.kit.scene import SLOT, Scene, within

from snaptree.images import durable
from snaptree.images.rights import copy_rights

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
OWNER, GROUP, NAMED, STRANGER = 1234, 2345, 4321, 9999
PEOPLE = [(user, group) for user in (OWNER, NAMED, STRANGER) for group in (GROUP, STRANGER)]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def owned(path: Path, mode: int) -> None:
    """Give the file away, with a label."""
    os.chown(path, OWNER, GROUP)
    path.chmod(mode)
    give(path, LABEL, b"system_u:object_r:private_t:s0:c1,c2\0")


def machine(scene: Scene, mode: int, like: Callable[[Path], None]) -> list[Path]:
    """A machine with an internal snapshot and firmware state, all of somebody's; its files."""
    image = scene.image("web1.qcow2", word="b")
    nvram, tpm = scene.folder / "fw" / "nvram.fd", scene.folder / "fw" / "tpm"
    tpm.mkdir(parents=True)
    nvram.write_text("first")
    (tpm / "state").write_text("first")
    scene(f"add web1 --disk vda=web1.qcow2 --nvram {nvram} --tpm {tpm}")
    scene("snapshot web1 i1 --internal")
    images.run("qemu-img", "resize", "-q", "-f", "qcow2", image, str(9 * SLOT))
    scene("snapshot web1 i2 --internal")
    for path in (image, nvram, tpm / "state"):
        owned(path, mode)
        like(path)
    owned(tpm, 0o700)
    return [image, nvram, tpm, tpm / "state"]


WORK = (
    "snapshot web1 s1", "branch web1 b1 --from s1", "branch web1 built --from i2", "revert web1 s1", "switch web1 b1",
    "switch web1 main", "snapshot web1 s2", "delete web1 s1 --merge commit", "branch web1 copied --from i1",
    "delete web1 s2 --merge pull",
)  # fmt: skip


def worked(scene: Scene) -> None:
    """Have every kind of file made."""
    for number, line in enumerate(WORK):
        scene(line)
        if number % 3 == 0:
            scene.write("." * (number % 7) + "x")


KINDS: dict[str, tuple[int, Callable[[Path], None]]] = {
    "mode": (0o640, lambda path: None),
    "owner only": (0o600, lambda path: None),
    "read only": (0o440, lambda path: None),
    "ACL": (0o640, lambda path: give(path, ACL, acl(6, 4, 0, 6, {NAMED: 6}))),
    "ACL that keeps the group out": (0o660, lambda path: give(path, ACL, acl(6, 0, 0, 6, {NAMED: 6}))),
}


@needs_root
@pytest.mark.parametrize("open_folder", [False, True], ids=["plain", "default ACL"])
@pytest.mark.parametrize("kind", KINDS)
def test_new_files_have_the_rights_of_the_layer_below(scene: Scene, kind: str, open_folder: bool) -> None:
    """At no moment of any operation may anybody read a new file who may not read what it was made of."""
    mode, like = KINDS[kind]
    if open_folder:
        for folder in (scene.disks, scene.folder):
            give(folder, DEFAULT_ACL, acl(7, 7, 5, 7, {NAMED: 7, STRANGER: 7}))
    files = machine(scene, mode, like)
    image = files[0]
    for path in files:
        if open_folder and attribute(path, ACL) is not None and "ACL" not in kind:
            os.removexattr(path, ACL)
            path.chmod(mode if path.is_file() else 0o700)
    wanted = rights.rights(image)
    # Until it is whole its owner may write to it, whatever the mode will be.
    allowed = {who: may(image, *who) & 6 | (2 if who[0] == OWNER else 0) for who in PEOPLE}
    known = {path.lstat().st_ino for path in scene.folder.rglob("*")}

    def look() -> None:
        for folder, _, names in os.walk(scene.folder):
            for name in names:
                path = Path(folder, name)
                try:
                    if path.lstat().st_ino in known:
                        continue
                    for who in PEOPLE:
                        found = may(path, *who) & 6
                        assert not found & ~allowed[who], f"{path}: {who} may {found}, not {allowed[who]}"
                        if found and who[0] != OWNER:
                            assert attribute(path, LABEL) == wanted.label, f"{path} has not its label"
                except FileNotFoundError:
                    continue

    with umask(0), watched(look) as count:
        worked(scene)
    assert count[0] > 500, "it was looked often"
    look()
    made = [path for path in scene.disks.iterdir() if path.lstat().st_ino not in known]
    assert len(made) >= 3
    copies = [path for path in (scene.state / "firmware").rglob("*") if path.is_file()]
    kept = [path for path in copies if path.lstat().st_ino not in known]
    assert len(kept) >= 2
    for path in (*made, *kept, *files[1:2], files[3]):
        assert rights.rights(path) == wanted, path
    assert rights.rights(files[2]).mode == 0o700


@needs_root
def test_where_an_acl_cannot_be_copied_nobody_gets_its_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without ACLs: the mode's group bits were the mask, and would let the whole group in."""
    like, new = tmp_path / "like", tmp_path / "new"
    like.touch()
    owned(like, 0o660)
    give(like, ACL, acl(6, 0, 0, 6, {NAMED: 6}))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    durable.make_file(str(new), [(0, b"secret")], 6, str(like), lambda path, device, inode: None, "t")
    assert [may(new, *who) & 6 for who in ((OWNER, GROUP), (STRANGER, GROUP), (NAMED, STRANGER))] == [6, 0, 0]


@needs_root
def test_who_may_not_give_files_away_lets_nobody_in(scene: Scene) -> None:
    """Without the right to change the owner a new file is ours alone."""
    scene.image("web1.qcow2", word="b")
    scene("add web1 --disk vda=web1.qcow2")
    like = scene.disks / "web1.qcow2"
    os.chown(like, OWNER, GROUP)
    like.chmod(0o666)
    give(like, ACL, acl(6, 6, 6, 6, {NAMED: 6}))
    scene.disks.chmod(0o777)
    for folder in scene.disks.parents[:-1]:
        folder.chmod(folder.stat().st_mode | 0o011)
    new = scene.disks / "new.qcow2"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(STRANGER)
            os.setuid(STRANGER)
            os.umask(0)
            descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            with watched(lambda: None if not may(new, NAMED, STRANGER + 1) & 6 else os._exit(2)):
                copy_rights(descriptor, str(like))
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [may(new, *who) & 6 for who in ((STRANGER, STRANGER), (OWNER, GROUP), (NAMED, GROUP))] == [6, 0, 0]


def test_firmware_state_that_was_closed_since_stays_closed(scene: Scene) -> None:
    """Going back puts a copy of an open file over one that has been closed: the copy is never open beside it."""
    nvram = scene.folder / "nvram.fd"
    nvram.write_text("first")
    nvram.chmod(0o644)
    scene.image("web1.qcow2", word="b")
    scene(f"add web1 --disk vda=web1.qcow2 --nvram {nvram}")
    scene("snapshot web1 s1")
    scene.write(".x")
    nvram.write_text("second")
    nvram.chmod(0o600)

    def look() -> None:
        for path in scene.folder.glob("*nvram.fd"):
            assert not may(path, STRANGER, STRANGER), path

    with umask(0), watched(look):
        scene("revert web1 s1")
    look()
    assert nvram.read_text() == "first"


def traced(scene: Scene, line: str) -> str:
    """Run a command of its own under ``strace``; the calls that make files or change their rights."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log = scene.folder / "strace.log"
    script = "import sys; from snaptree.cli.main import run; sys.exit(run(sys.argv[1:]))"
    calls = "trace=open,openat,openat2,creat,mkdir,mkdirat,mknod,mknodat,chmod,fchmod,fchmodat"
    words = ["strace", "-f", "-s", "4096", "-o", str(log), "-e", calls, sys.executable, "-B", "-c", script]
    with within(scene.state, scene.disks):
        done = subprocess.run([*words, *line.split()], capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    said = log.read_text(errors="replace")
    log.unlink()
    return said


@pytest.mark.parametrize(
    "line",
    [
        "snapshot web1 s2 --file vda=chosen.qcow2",
        "branch web1 built --from i1",
        "delete web1 s1 --merge commit",
        "delete web1 s1 --merge pull",
    ],
)
def test_no_program_makes_a_file_that_others_may_open(scene: Scene, line: str) -> None:
    """Whole commands, QEMU's programs too: every file is made for us alone, new, and not through a link."""
    nvram = scene.folder / "nvram.fd"
    nvram.write_text("secret")
    nvram.chmod(0o600)
    scene.image("web1.qcow2", word="b").chmod(0o600)
    scene(f"add web1 --disk vda=web1.qcow2 --nvram {nvram}")
    scene("snapshot web1 i1 --internal")
    scene("snapshot web1 s1")
    scene.write(".x")

    there = {str(path) for path in scene.folder.rglob("*")}
    with umask(0):
        said = traced(scene, line)

    made = 0
    for call in said.splitlines():
        if str(scene.folder) not in call or there & set(re.findall(r'"([^"]*)"', call)):
            continue
        modes = [int(each, 8) for each in re.findall(r", (0[0-7]{2,3})\)", call)]
        assert all(not mode & 0o077 for mode in modes), call
        if "O_CREAT" in call and str(scene.state) not in call:
            assert "O_EXCL" in call and "O_NOFOLLOW" in call and modes, call
            made += 1
    assert made == (1 if line.startswith(("snapshot", "branch")) else 0)


# ---- the state folder ---------------------------------------------------------------------------------------------


def open_to_others(folder: Path) -> list[str]:
    found = [folder, *folder.rglob("*")] if folder.exists() else []
    return [f"{path} {path.lstat().st_mode:o}" for path in found if path.lstat().st_mode & 0o077]


def test_the_state_is_private_at_every_moment(tmp_path: Path) -> None:
    """State folder 0700, its files 0600, with a umask of 0 too, and so the folders above it that had to be made."""
    scene = Scene(tmp_path)
    scene.state = tmp_path / "home" / "local" / "state"
    scene.image("web1.qcow2", word="b").chmod(0o600)
    nvram = tmp_path / "nvram.fd"
    nvram.write_text("secret")
    nvram.chmod(0o600)

    def look() -> None:
        assert open_to_others(tmp_path / "home") == []

    with umask(0), watched(look):
        scene(f"add web1 --disk vda=web1.qcow2 --nvram {nvram}")
        for line in ("snapshot web1 s1", "branch web1 b1 --from s1", "switch web1 b1", "delete web1 s1", "gc web1"):
            scene(line)
    look()
    assert {"state.sqlite", "firmware"} <= {path.name for path in scene.state.iterdir()}


def test_a_state_folder_that_was_open_becomes_private(web1: Scene) -> None:
    """A folder that was there before, or was opened since, is closed by the first command that uses it."""
    for path in (web1.state, *web1.state.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    web1("snapshot web1 s1")
    assert open_to_others(web1.state) == []
    early = web1.folder / "early"
    early.mkdir(mode=0o755)
    web1.state = early
    web1.image("other.qcow2", word="o")
    web1("add other --disk vda=other.qcow2")
    assert open_to_others(early) == []


@pytest.mark.parametrize(("private", "way"), [("s1", "pull"), ("main", "commit")])
def test_a_merge_opens_nothing_that_was_private(private: str, way: str, web1: Scene) -> None:
    """What only the owner may read does not go into a file that others may read, unless one says so."""
    web1("snapshot web1 s1")
    web1.write(".c")
    for name in ("s1", "main"):
        web1.path(name).chmod(0o600 if name == private else 0o644)
    said = web1(f"delete web1 s1 --merge {way} --plan")
    assert "users who may not read" in said.out + said.err
    web1("delete web1 s1")
    assert web1.files() == {"web1.qcow2"}
    assert web1.path("main").stat().st_mode & 0o777 == 0o600
    assert web1.shows() == "bc......"
