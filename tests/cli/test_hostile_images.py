"""Hostile images through the command line: no crash, no hang, little memory, nothing opened or changed that may not be.

``SNAPTREE_HOSTILE_COMMANDS`` says how many images are tried, ``SNAPTREE_SEED`` which. Commands run in forked children
of this process; some of them again as processes of their own, under ``strace`` where it is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.images import hostile
from tests.kit import images
from tests.kit.images import MiB
from tests.kit.scene import TOOL
from tests.kit.stage import kill_all

from snaptree.cli import branching, looking, machines, snapshots, upkeep
from snaptree.cli.main import run
from snaptree.errors import every_error_class
from snaptree.images import child, durable, gate, measure
from snaptree.running import recovery

LOADED = (branching, looking, machines, snapshots, upkeep, child, durable, gate, measure, recovery)
STATUSES = {0, *(each.status for each in every_error_class())} - {1}
SECONDS, MEMORY = 5, 512 << 20
COUNT = int(os.environ.get("SNAPTREE_HOSTILE_COMMANDS", "40"))
SEED = int(os.environ.get("SNAPTREE_SEED", "0") or "0") or 1
PROGRAMS = {"qemu-img", "qemu-io", "qemu-storage-daemon"}
ADDING = (
    "add web1 --disk vda={path}",
    "add web1 --disk vda={path},format=qcow2",
    "add web1 --disk {path} --adopt",
    "add web1 --disk {path} --base {folder}/base.qcow2",
    "add web1 --disk {path} --plan --json",
    "disk attach other vdb={path}",
    "disk attach other vdb={path} --adopt --plan",
)
READING = (
    "tree {name}",
    "tree {name} --json",
    "show {name}",
    "show {name} --json",
    "verify {name}",
    "verify {name} --json",
    "branches {name}",
    "list",
    "log {name}",
    "path {name}",
    "snapshot {name} new --plan",
    "snapshot {name} new --internal --plan",
    "branch {name} new --plan",
    "remove {name} --delete-files --plan",
    "gc {name}",
    "gc {name} --delete --plan",
    "recover {name}",
    "squash {name} --plan",
    "switch {name} main --plan",
    "disk detach {name} vda --plan",
    "disk detach {name} vda --delete-files --plan",
    "delete {name} --branch main --plan",
    "verify {name} --accept {folder}/hostile.qcow2 --plan",
    "set {name} --base {folder}/base.qcow2 --plan",
)
OF_SNAPSHOTS = (
    "delete {name} s1 --plan",
    "delete {name} s2 --plan --merge commit",
    "delete {name} s1 s2 --plan --merge pull --json",
    "revert {name} s1 --plan",
    "revert {name} s2 --discard --plan",
    "branch {name} new --from s1 --plan",
    "rename {name} s1 other --plan",
    "switch {name} s1 --plan",
    "show {name} s1",
    "show {name} --xml s2",
    "disk attach {name} vdc={folder}/hostile.qcow2 --plan",
)

ACTING = (
    "snapshot other new",
    "snapshot other new --internal",
    "delete other s1",
    "delete other s1 --merge commit",
    "delete other s1 --merge pull",
    "delete other s2 --merge commit",
    "delete other s2 --merge pull",
    "delete other s1 s2 i3",
    "delete other i3",
    "delete other s2 --merge none",
    "revert other s1",
    "revert other s2 --discard",
    "revert other s2 --discard --delete",
    "revert other i3",
    "branch other new",
    "branch other new --from s1",
    "branch other new --from i3",
    "squash other",
    "rename other s1 renamed",
    "rename other i3 renamed",
    "gc other --delete",
    "remove other",
    "remove other --delete-files --yes",
    "disk detach other vda",
    "disk attach other vdb={folder}/hostile.qcow2",
    "verify other --accept {layer}",
    "set other --base {folder}/golden.qcow2",
    "set other --adopt",
    "start other",
)
"""What is carried out, on images that have become hostile."""
MACHINE = "qemu-system-x86_64 -nodefaults -no-user-config -machine q35 -accel tcg -m 16 -display none -S"


@dataclass(frozen=True)
class Told:
    """How a command ended, what it printed and opened, and which programs it started."""

    status: int
    out: bytes
    err: bytes
    opened: tuple[str, ...]
    started: tuple[tuple[str, ...], ...]
    memory: int
    seconds: float


def forked(words: list[str], folder: Path, report: Path) -> Told:
    """Run the command in a forked child and watch it."""
    report.unlink(missing_ok=True)
    began = time.monotonic()
    process = os.fork()
    if process == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS + 2)
            report.write_text(json.dumps(watched(words, folder)))
        except BaseException as error:
            traceback.print_exception(error)
        finally:
            os._exit(0)
    _, status, usage = os.wait4(process, 0)
    seconds = time.monotonic() - began
    assert not os.WIFSIGNALED(status), f"ended by signal {os.WTERMSIG(status)} after {seconds:.1f} s"
    said = json.loads(report.read_text())
    return Told(
        said["status"],
        bytes.fromhex(said["out"]),
        bytes.fromhex(said["err"]),
        tuple(said["opened"]),
        tuple(map(tuple, said["started"])),
        max(usage.ru_maxrss, said["memory"]) << 10,
        seconds,
    )


def watched(words: list[str], folder: Path) -> dict[str, Any]:
    """In the child: the command, with what Python opens and starts."""
    opened: list[str] = []
    started: list[list[str]] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            opened.append(os.path.join(os.getcwd(), os.fsdecode(arguments[0])))
        elif event == "subprocess.Popen":
            started.append([os.fsdecode(each) for each in arguments[1]])

    said, wrong = io.BytesIO(), io.BytesIO()
    out = io.TextIOWrapper(said, encoding="utf-8")
    err = io.TextIOWrapper(wrong, encoding="utf-8", errors="backslashreplace")
    os.chdir(folder)
    sys.addaudithook(hook)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(words)
    out.flush()
    err.flush()
    return {
        "status": status,
        "out": said.getvalue().hex(),
        "err": wrong.getvalue().hex(),
        "opened": opened,
        "started": started,
        "memory": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
    }


def looks(folder: Path) -> dict[str, tuple[object, ...]]:
    """What all files of the folder and beside it look like."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted([*folder.rglob("*"), *(folder.parent / "outside").rglob("*")]):
        status = path.lstat()
        content = ""
        if stat.S_ISREG(status.st_mode) and status.st_size < 64 << 20:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path)] = (status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_uid, content)
    return found


def allowed(path: str, folder: Path, state: Path) -> bool:
    """Whether snaptree may open the file: the machine's folder, its own state, Python, and what the system tells."""
    place = os.path.normpath(path)
    inside = os.path.dirname(place) == str(folder) or place == str(folder) or f"{place}/".startswith(f"{state}/")
    system = place.endswith((".py", ".pyc", ".so")) or re.match(r"/proc/\d+/(stat|io|comm)$|/etc/localtime$", place)
    return inside or bool(system) or place.startswith(("/usr/share/zoneinfo/", "/dev/null"))


def filenames(graph: Any) -> list[str]:
    """The files of a graph; every qcow2 node says what is beneath it, so that QEMU follows no header."""
    if graph["driver"] == "qcow2":
        assert "backing" in graph, graph
        return filenames(graph["file"]) + (filenames(graph["backing"]) if graph["backing"] else [])
    if graph["driver"] == "raw":
        return filenames(graph["file"])
    assert graph["driver"] == "file", graph
    return [graph["filename"]]


def judge(told: Told, folder: Path, state: Path, *, carries_out: bool = False) -> None:
    """What must hold of every command, whatever the image."""
    out, err = told.out.decode(), told.err.decode()
    assert told.status in STATUSES, f"status {told.status}: {err}"
    assert "Traceback" not in err and "unforeseen" not in err, err
    # What is carried out says first what it will cost.
    said = err.splitlines() if carries_out else err.splitlines()[:1]
    assert told.status in ((0, 10, 13) if carries_out else (0, 10)) or any(
        each.startswith(("snaptree: ", "Usage")) for each in said
    ), err
    for text in (out, err):
        controls = [each for each in text if (ord(each) < 32 and each not in "\n\t") or 127 <= ord(each) < 160]
        assert controls == [] and "\u202e" not in text, f"raw controls: {text!r}"
    assert told.seconds < SECONDS, f"it took {told.seconds:.1f} s"
    assert told.memory < MEMORY, f"it took {told.memory >> 20} MiB"
    assert [each for each in told.opened if not allowed(each, folder, state)] == []
    for program, *words in told.started:
        assert os.path.basename(program) in (PROGRAMS | {"qemu-system-x86_64"} if carries_out else PROGRAMS), program
        for word in words:
            if word.startswith("json:"):
                assert all(os.path.dirname(each) == str(folder) for each in filenames(json.loads(word[5:]))), word
            elif carries_out:
                places = re.findall(r"(?<![\w.])/[^,\"' ]+", word)
                assert [each for each in places if not allowed(each, folder, state)] == [], word
            else:
                assert "/" not in word, word


class Folder:
    """A folder with the machine ``other``, and hostile images."""

    def __init__(self, place: Path, *more: str) -> None:
        """Make it; the machine gets what is told besides."""
        self.place = place
        self.disks, self.state = place / "disks", place / "state"
        self.disks.mkdir(parents=True)
        self.sound = hostile.sound_images(self.disks)
        hostile.surroundings(self.disks, self.sound[0])
        self.path = self.disks / "hostile.qcow2"
        images.create(self.disks / "golden.qcow2", MiB)
        images.create(self.disks / "other.qcow2", MiB, backing=(self.disks / "golden.qcow2", "qcow2"))
        os.environ["SNAPTREE_STATE"] = str(self.state)
        first = ("add other --disk other.qcow2", "snapshot other s1", "snapshot other s2")
        for number, line in enumerate((*first, *more)):
            told = forked(shlex.split(line), self.disks, place / "report")
            assert told.status == 0, told
            if number < 2:
                images.io(self.disks / ("other.qcow2", "other.s1.qcow2")[number], "qcow2", f"write -P {number} 0 128k")
        self.kept = place / "kept"
        shutil.copytree(self.state, self.kept)
        self.layers = [*sorted(self.disks.glob("other*.qcow2")), self.disks / "golden.qcow2"]
        self.statuses: Counter[int] = Counter()
        self.slowest, self.largest = 0.0, 0

    def command(self, line: str, name: str, *, carries_out: bool = False) -> Told:
        """Run a command and judge it.

        :param carries_out: it may change the machine's own files.
        """
        words = line.format(path=self.path, folder=self.disks, name=name).split()
        before = looks(self.disks)
        try:
            told = forked(words, self.disks, self.place / "report")
            judge(told, self.disks, self.state, carries_out=carries_out)
            after = looks(self.disks)
            if carries_out:
                before, after = (not_its_own(each, self.disks) for each in (before, after))
            assert after == before
        except BaseException as error:
            error.add_note(" ".join(words))
            raise
        self.statuses[told.status] += 1
        self.slowest, self.largest = max(self.slowest, told.seconds), max(self.largest, told.memory)
        return told

    def add(self, chance: random.Random) -> None:
        """A hostile image is given to a machine; when it is taken, the machine is looked at."""
        self.path.write_bytes(hostile.make(chance.choice(self.sound), chance))
        if chance.random() < 0.1 and self.path.stat().st_size > 1000:
            os.truncate(self.path, chance.choice([1 << 30, 1 << 38, 1 << 40, 1 << 43]))
        line = chance.choice(ADDING)
        told = self.command(line, "web1")
        if told.status == 0 and "--plan" not in line:
            for each in chance.sample(READING, 4):
                self.command(each, "web1" if line.startswith("add") else "other")
            shutil.rmtree(self.state)
            shutil.copytree(self.kept, self.state)

    def replace(self, chance: random.Random) -> None:
        """A good layer is replaced by a hostile one, then the machine is looked at."""
        layer = chance.choice(self.layers)
        good, status = layer.read_bytes(), layer.stat()
        kept = layer.with_suffix(".kept")
        layer.rename(kept)
        try:
            kind = chance.random()
            if kind < 0.06:
                chance.choice([os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/passwd", path)])(layer)
            else:
                layer.write_bytes(hostile.make(good, chance))
            if kind > 0.5:
                os.utime(layer, ns=(status.st_atime_ns, status.st_mtime_ns))
            for each in chance.sample((*READING, *OF_SNAPSHOTS), 3):
                self.command(each, "other")
        finally:
            layer.rmdir() if layer.is_dir() and not layer.is_symlink() else layer.unlink()
            kept.rename(layer)

    def act(self, chance: random.Random) -> int:
        """A layer becomes hostile where it is, and looks as before but for what it holds; something is carried out.

        Its status is given.
        """
        layer = chance.choice(self.layers)
        looked = layer.stat()
        layer.write_bytes(hostile.make(layer.read_bytes(), chance))
        os.utime(layer, ns=(looked.st_atime_ns, looked.st_mtime_ns))
        line = chance.choice(ACTING).replace("{layer}", str(layer))
        try:
            status = self.command(line, "other", carries_out=True).status
            for each in ("recover other", "gc other", "verify other", "stop other --force"):
                self.command(each, "other", carries_out=True)
        finally:
            kill_all(self.state)
        return status


def not_its_own(found: dict[str, tuple[object, ...]], folder: Path) -> dict[str, tuple[object, ...]]:
    """What is not of the machine ``other``; its base is nobody's to change."""
    return {
        path: look
        for path, look in found.items()
        if not re.fullmatch(rf"{folder}/(\.snaptree-.*|other(\..*)?\.qcow2|other(\..*)?)", path)
    }


@pytest.mark.timeout(max(300, COUNT * 3))
def test_hostile_images_through_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPTREE_STATE", "")
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    place = memory / f"snaptree-hostile-{os.getpid()}"
    try:
        folder = Folder(place)
        for number in range(COUNT):
            chance = random.Random(f"{SEED} {number}")
            try:
                (folder.add if number % 2 else folder.replace)(chance)
            except BaseException as error:
                error.add_note(f"SNAPTREE_SEED={SEED}, image {number}")
                raise
        tried = sum(folder.statuses.values())
        print(f"{COUNT} images, {tried} commands: {dict(sorted(folder.statuses.items()))}; the slowest took "
              f"{folder.slowest:.2f} s, the largest {folder.largest >> 20} MiB")  # fmt: skip
        assert len(folder.statuses) > 2 and 0 in folder.statuses
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.timeout(max(300, COUNT * 3))
def test_what_is_carried_out_on_hostile_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the machine is known, and its layers have become hostile; what is not its own stays as it is."""
    monkeypatch.setenv("SNAPTREE_STATE", "")
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    place = memory / f"snaptree-acted-{os.getpid()}"
    statuses: Counter[int] = Counter()
    for number in range(COUNT // 3):
        chance = random.Random(f"{SEED} act {number}")
        try:
            folder = Folder(place, "snapshot other i3 --internal", f"set other --start {shlex.quote(MACHINE)}")
            statuses[folder.act(chance)] += 1
        except BaseException as error:
            error.add_note(f"SNAPTREE_SEED={SEED}, image {number}")
            raise
        finally:
            shutil.rmtree(place, ignore_errors=True)
    print(dict(statuses))
    assert len(statuses) > 2 and 0 in statuses


def test_a_check_that_would_take_all_memory_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPTREE_STATE", str(tmp_path / "state"))
    disks = tmp_path / "disks"
    disks.mkdir()
    os.truncate(images.create(disks / "hostile.qcow2", MiB, cluster_size=512), 500 << 30)
    assert forked(["add", "web1", "--disk", "hostile.qcow2"], disks, tmp_path / "report").status == 0
    told = forked(["verify", "web1"], disks, tmp_path / "report")
    judge(told, disks, tmp_path / "state")
    assert told.status == 0 and b"was not checked" in told.out


# ---- a sample as processes of their own ----------------------------------------------------------------------------

SYSTEM = ("/usr/", "/lib/", "/lib64/", "/etc/ld.so", "/etc/localtime", "/proc/", "/sys/", "/dev/null", "/dev/urandom",
          sys.base_prefix, *filter(None, sys.path))  # fmt: skip


def traced(words: list[str], folder: Folder, report: Path) -> tuple[subprocess.CompletedProcess[bytes], list[str]]:
    """Run a command and all programs that it starts under strace; what they have opened."""
    line = [
        "strace",
        "-f",
        "-qqy",
        "-s",
        "4096",
        "-e",
        "trace=open,openat,openat2",
        "-e",
        "signal=none",
        "-o",
        str(report),
    ]
    place = {**os.environ, "SNAPTREE_STATE": str(folder.state), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*line, *TOOL, *words], cwd=folder.disks, env=place, capture_output=True, check=False)
    # By "-y" each descriptor is followed by what it has open, that of the folder too from which a name is looked up.
    call = r'open(?:at2?)?\((?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)".*\) = \d+'
    opened = re.findall(call, report.read_text())
    assert any(name.endswith("hostile.qcow2") or "other" in name for _, name in opened), "it was not traced"
    return done, [os.path.normpath(folder.disks / place / name) for place, name in opened]


def named(sound: bytes, name: bytes, form: bytes) -> bytes:
    """The image with another backing file in its header."""
    data = bytearray(sound)
    extension = struct.pack(">II", hostile.EXTENSIONS[1], len(form)) + form + bytes(-len(form) % 8)
    start = int.from_bytes(data[100:104], "big")
    data[start : start + len(extension) + 8 + len(name)] = extension + bytes(8) + name
    data[8:20] = struct.pack(">QI", start + len(extension) + 8, len(name))
    return bytes(data)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_what_is_really_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPTREE_STATE", "")
    folder = Folder(tmp_path / "place")
    names = [(b"/etc/passwd", b"raw"), (b"outside/secret.qcow2", b"qcow2"), (b"link.qcow2", b"raw"), (b"pipe", b"raw"),
             (b'json:{"driver":"file","filename":"/etc/passwd"}', b"raw"), (b"/dev/zero", b"raw")]  # fmt: skip
    tip = folder.disks / "other.s2.qcow2"
    good = tip.read_bytes() if tip.exists() else folder.layers[0].read_bytes()
    layer = tip if tip.exists() else folder.layers[0]
    for number, (name, form) in enumerate(names):
        folder.path.write_bytes(named(folder.sound[0], name, form))
        layer.write_bytes(named(good, name, form))
        for line in ("add web1 --disk hostile.qcow2", ("verify other", "snapshot other new --plan")[number % 2]):
            before = looks(folder.disks)
            done, opened = traced(line.split(), folder, tmp_path / "strace")
            assert done.returncode in STATUSES - {0}, f"{line}, {name!r}: {done.stdout!r} {done.stderr!r}"
            outside = [
                each
                for each in opened
                if not allowed(each, folder.disks, folder.state) and not each.startswith(SYSTEM) and each != "/"
            ]
            assert outside == [], f"{line}, {name!r}"
            assert looks(folder.disks) == before
