"""A small Linux guest that writes records to its disks all the while, built from Debian's kernel and busybox.

It boots once; what it was then (memory and devices) is kept in a file from which every test starts.
"""

from __future__ import annotations

import contextlib
import functools
import lzma
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kit import images
from tests.kit.qmp import Qmp
from tests.kit.records import DISK_BYTES

ROOT = Path(__file__).parents[2]
KERNEL = ROOT / "build" / "kernel"
MODULES = ("virtio_pci", "virtio_blk", "evdev", "button")
DISKS = ("vda", "vdb")
SECONDS = 60.0
"""So long anything may take that the guest is asked for; it is emulated, and the machine may be busy."""
PACE = 4
"""By default the guest rests so many milliseconds after each record: without, one keeps a processor busy."""
LISTEN_SECONDS = 0.0005
"""So often it is looked whether something was heard from the guest."""


@functools.cache
def knows(major: int, minor: int) -> bool:
    """Whether QEMU is of this version, or a later one."""
    said = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", said)
    assert found is not None, said
    return (int(found[1]), int(found[2])) >= (major, minor)


def saved_to(memory: Path | str) -> str:
    """Where QEMU is told to save memory: it writes files itself from 8.2 on."""
    return f"file:{memory}" if knows(8, 2) else f"exec:cat > {shlex.quote(str(memory))}"


def loaded_from(memory: Path | str) -> str:
    """Where QEMU is told to load memory from."""
    return f"file:{memory}" if knows(8, 2) else f"exec:cat {shlex.quote(str(memory))}"


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _entry(name: str, data: bytes, mode: int, number: int, device: tuple[int, int] = (0, 0)) -> bytes:
    """One file of a cpio archive in the ``newc`` form (the kernel's ``initramfs-buffer-format``)."""
    encoded = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
    return _padded(b"070701" + b"".join(b"%08X" % each for each in fields) + encoded) + _padded(data)


def drivers(names: Sequence[str] = MODULES) -> dict[str, bytes]:
    """The drivers that the guest needs, each after those that it needs itself; none that are part of the kernel."""
    found: dict[str, bytes] = {}

    def take(name: str) -> None:
        path = next(iter(KERNEL.glob(f"lib/modules/*/kernel/**/{name}.ko*")), None)
        if path is None or f"{name}.ko" in found:
            return
        content = path.read_bytes()
        content = lzma.decompress(content) if path.suffix == ".xz" else content
        needs = re.search(rb"\0depends=([^\0]*)\0", content)
        for each in needs[1].decode().split(",") if needs is not None else ():
            take(each)
        found[f"{name}.ko"] = content

    for name in names:
        take(name)
    return found


def initramfs(files: Mapping[str, bytes], modules: Mapping[str, bytes]) -> bytes:
    """A guest's first file system: busybox, the drivers, and these files by their names."""
    busybox = shutil.which("busybox")
    assert busybox is not None, "busybox is not installed: run scripts/setup test"
    files = {**files, "bin/busybox": Path(busybox).read_bytes()}
    files |= {f"modules/{name}": content for name, content in modules.items()}
    files["modules/order"] = "".join(f"{name}\n" for name in modules).encode()
    folders = sorted({"dev"} | {str(folder) for name in files for folder in Path(name).parents} - {"."})
    parts = [_entry(name, b"", 0o040755, number) for number, name in enumerate(folders, 1)]
    parts.append(_entry("dev/console", b"", 0o020600, 100, (5, 1)))
    parts += [_entry(name, data, 0o100755, number) for number, (name, data) in enumerate(files.items(), 101)]
    return b"".join(parts) + _entry("TRAILER!!!", b"", 0, 0)


def init(name: str) -> bytes:
    """The first program of a guest."""
    return Path(__file__).with_name(name).read_bytes()


def build(folder: Path, *, pace: int = PACE) -> Path:
    """Build the guest's initramfs in the folder.

    :param pace: so many milliseconds it rests after each record.
    """
    writer = folder / "writer"
    words = ["gcc", "-static", "-O2", "-Wall", "-Werror", f"-DPACE={pace}", "-o", str(writer)]
    subprocess.run([*words, str(Path(__file__).with_name("writer.c"))], check=True)
    target = folder / "initramfs"
    files = {"init": init("guest_init.sh"), "writer": writer.read_bytes()}
    return packed(initramfs(files, drivers()), target)


def packed(content: bytes, target: Path) -> Path:
    """Write an initramfs as the kernel takes it."""
    target.write_bytes(zlib.compress(content, 1, 31))
    return target


def kernel() -> Path:
    """The kernel that scripts/setup has unpacked."""
    found = sorted(KERNEL.glob("boot/vmlinuz-*"))
    if not found and shutil.which("dpkg") and "ID=debian" in Path("/etc/os-release").read_text():
        raise AssertionError("there is no kernel for the guest: run scripts/setup test")
    if not found:
        import pytest

        pytest.skip("there is no kernel for the guest here")
    return found[-1]


@dataclass(frozen=True)
class Boot:
    """One boot of the guest: what it was made from, and what it was when it was ready to write."""

    initramfs: Path
    memory: Path
    before: str = ""
    """What stands before QEMU in the command, such as ``env -u LD_PRELOAD``: what kills snaptree is not to kill it."""
    append: bool = False
    """Whether the console's log goes on where the one before has ended, when the guest goes over to another QEMU."""
    memory_mib: int = 96
    reboots: bool = False
    """Whether QEMU lives on when the guest reboots."""
    fill_mib: int = 0
    """So much of its memory it fills before it begins."""
    more: tuple[str, ...] = ()
    """What else the machine has, in QEMU's words. It is not what was saved, and has to be booted."""

    def words(self, folder: Path, *, saved: bool = True) -> list[str]:
        """QEMU's command line without disks, monitor and display; the console is in the folder."""
        console = f"socket,id=console,path={folder}/console,server=on,wait=off,logfile={folder}/console.log"
        console += ",logappend=on" if self.append else ""
        words = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-machine", "q35", "-accel", "tcg"]
        words += ["-m", str(self.memory_mib), "-display", "none", "-kernel", str(kernel())]
        words += [] if self.reboots else ["-no-reboot"]
        append = "console=ttyS0 quiet panic=1 no_timer_check" + (f" fill={self.fill_mib}" if self.fill_mib else "")
        words += ["-initrd", str(self.initramfs), "-append", append]
        words += ["-chardev", console, "-serial", "chardev:console", *self.more]
        return [*words, "-incoming", loaded_from(self.memory)] if saved and not self.more else words

    def command(self, folder: Path, *, saved: bool = True) -> str:
        """The command as ``snaptree add --start`` takes it, the disks where the saved boot has them."""
        words = self.words(folder, saved=saved)
        for disk in DISKS:
            words += ["-device", device(disk, f"{{{disk}}}")]
        return f"{self.before} {shlex.join(words)}".strip()


def device(disk: str, node: str) -> str:
    """The guest's device for a disk, always at the same place."""
    return f"virtio-blk-pci,drive={node},id={disk},addr=0x{4 + DISKS.index(disk)}"


@dataclass
class Guest:
    """A guest that runs, known by its folder: its console is there.

    ``process`` is set where the test has started QEMU itself.
    """

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    def lines(self) -> list[str]:
        """What it has said so far, without the part of a line."""
        try:
            text = (self.folder / "console.log").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        return [line.strip() for line in text.split("\n")[:-1]]

    def wait_for(self, what: str, holds: Callable[[list[str]], bool], seconds: float = SECONDS) -> list[str]:
        """Wait until what it has said holds."""
        until = time.monotonic() + seconds
        while not holds(lines := self.lines()):
            if self.process is not None and self.process.poll() is not None:
                raise AssertionError(f"QEMU has ended with {self.process.returncode}: {lines[-5:]}")
            assert time.monotonic() < until, f"{what} did not come within {seconds:.0f} s: {lines[-5:]}"
            time.sleep(0.02)
        return lines

    def tell(self, *orders: str) -> None:
        """Give it orders on its console."""
        until = time.monotonic() + SECONDS
        with socket.socket(socket.AF_UNIX) as console:
            console.settimeout(SECONDS)
            while console.connect_ex(str(self.folder / "console")):
                assert time.monotonic() < until, "QEMU has no console"
                time.sleep(0.02)
            for order in orders:
                console.sendall(order.encode() + b"\n")
            # QEMU drops what it has not yet given to the guest when the console is closed.
            time.sleep(0.1)

    def flushed(self) -> int:
        """The number up to which it has told that all records are flushed."""
        found = [int(match[1]) for line in self.lines() if (match := re.fullmatch(r"(?:F|D) (\d+)( \d+)?", line))]
        return found[-1] if found else 0

    def _told(self) -> int:
        """How often it has told what is flushed."""
        return sum(line.startswith("F ") for line in self.lines())

    def went_over(self) -> None:
        """It goes on in another QEMU: wait until it has said so. The first line may be joined to one of before."""
        lines = len(self.lines())
        self.wait_for("the guest that has gone over", lambda now: len(now) > lines + 3)

    def stall(self, since: int = 0) -> float:
        """The longest that one record took, in seconds, after the record of that number."""
        rows = [line.split() for line in self.lines() if line.startswith("F ")]
        return max((int(row[2]) for row in rows if int(row[1]) > since), default=0) / 1e6

    @contextlib.contextmanager
    def heard(self) -> Iterator[list[float]]:
        """How many seconds lay between its words each time, by our clock: its own stands still while it does."""
        found: list[float] = []
        ended = threading.Event()
        log = self.folder / "console.log"

        def listen() -> None:
            size, last = os.stat(log).st_size, time.monotonic()
            while not ended.wait(LISTEN_SECONDS):
                if (now := os.stat(log).st_size) != size:
                    found.append(time.monotonic() - last)
                    size, last = now, time.monotonic()

        listener = threading.Thread(target=listen)
        listener.start()
        try:
            yield found
        finally:
            ended.set()
            listener.join()

    def errors(self) -> list[str]:
        """The I/O errors that it has seen, and what the kernel complained of."""
        return [line for line in self.lines() if line.startswith("E ") or "error" in line.lower()]

    def go(self, at: int = 0) -> None:
        """Let it write.

        :param at: the last record that is on its disks, where it has been started anew.
        """
        # What it was told before it was started anew may stand in the same log.
        before = self._told()
        # What it is told while it is loaded is lost.
        until = time.monotonic() + SECONDS
        while self._told() <= before:
            assert time.monotonic() < until, f"it does not begin: {self.lines()[-5:]}"
            self.tell(f"from {at}." if at else "go")
        self.writes_on()

    def writes_on(self, more: int = 16) -> int:
        """Wait until it has flushed so many more records; the last of them. It has seen no I/O error."""
        wanted = self.flushed() + more
        self.wait_for(f"record {wanted}", lambda _: self.flushed() >= wanted)
        assert self.errors() == []
        return self.flushed()

    def hold(self) -> int:
        """Let it wait; the last record that it has written."""
        count = sum(line.startswith("H ") for line in self.lines())
        self.tell("hold")
        lines = self.wait_for("H", lambda lines: sum(line.startswith("H ") for line in lines) > count)
        return int(next(line for line in reversed(lines) if line.startswith("H ")).split()[1])

    def register(self, *, extend: bool = False) -> str:
        """What its TPM's register has come to, extended first if so wished."""
        count = sum(line.startswith("T ") for line in self.lines())
        self.tell("extend" if extend else "register")
        lines = self.wait_for("T", lambda lines: sum(line.startswith("T ") for line in lines) > count)
        return next(line for line in reversed(lines) if line.startswith("T ")).split()[1]


def end(process: subprocess.Popen[bytes]) -> None:
    """End a QEMU that the test has started."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    process.wait(30)


def with_disks(words: Sequence[str], folder: Path, image_format: str = "qcow2") -> list[str]:
    """The command line with new, empty disks in the folder."""
    found = list(words)
    for disk in DISKS:
        path = images.create(folder / f"{disk}.{image_format}", DISK_BYTES, image_format)
        found += ["-blockdev", f"driver={image_format},node-name=n-{disk},file.driver=file,file.filename={path}"]
        found += ["-device", device(disk, f"n-{disk}")]
    return found


def launch(words: Sequence[str], folder: Path, within: Path | None = None) -> Guest:
    """Start QEMU, and give the guest that runs in it.

    :param within: QEMU's working folder.
    """
    folder.mkdir(exist_ok=True)
    if not any("logappend=on" in word for word in words):
        # What the one before has said is not for this one's.
        (folder / "console.log").unlink(missing_ok=True)
    with (folder / "qemu.log").open("wb") as log:
        process = subprocess.Popen(list(words), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=within)
    return Guest(folder, process)


def boot(folder: Path) -> Boot:
    """Build the guest, boot it on empty disks, and keep what it is when it is ready."""
    made = Boot(build(folder), folder / "memory")
    # Paths of sockets are short.
    with tempfile.TemporaryDirectory(prefix="boot") as short:
        place = Path(short)
        words = with_disks(made.words(place, saved=False), place)
        guest = launch([*words, "-qmp", f"unix:{place}/qmp,server=on,wait=off"], place)
        assert guest.process is not None
        try:
            guest.wait_for("R", lambda lines: "R 2" in lines)
            with Qmp(place / "qmp") as qmp:
                qmp("migrate-set-parameters", max_bandwidth=10 << 30)
                qmp("migrate", uri=saved_to(made.memory))
                until = time.monotonic() + SECONDS
                while (status := qmp("query-migrate")["status"]) != "completed":
                    assert status != "failed" and time.monotonic() < until, status
                    time.sleep(0.01)
        finally:
            end(guest.process)
    return made
