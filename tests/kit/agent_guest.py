"""A guest with a file system on its disk and the real qemu-guest-agent, which scripts/setup has unpacked."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from tests.kit import guest, images
from tests.kit.guest import Boot, Guest
from tests.kit.records import DISK_BYTES
from tests.kit.scene import point_in, standing_on
from tests.kit.stage import Stage

AGENT = guest.ROOT / "build" / "agent"
MODULES = ("virtio_pci", "virtio_blk", "virtio_console")
CHANNEL = (
    "-device virtio-serial-pci -chardev socket,id=ga,path={path},server=on,wait=off "
    "-device virtserialport,chardev=ga,name=org.qemu.guest_agent.0"
)
"""What gives a machine a channel for its guest's agent."""


def agent_files() -> dict[str, bytes]:
    """The agent with the libraries that it needs, by their names in the guest."""
    program = AGENT / "usr" / "sbin" / "qemu-ga"
    if not program.exists():
        if (guest.ROOT / "build" / "kernel").exists():
            raise AssertionError("there is no agent for the guest: run scripts/setup test")
        pytest.skip("there is no agent for the guest here")
    told = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "not found" not in told, f"libraries of the agent's are missing: {told}"
    libraries = re.findall(r"(/\S+) \(0x", told)
    return {path.lstrip("/"): Path(path).read_bytes() for path in libraries} | {
        "usr/sbin/qemu-ga": program.read_bytes()
    }


def boot(folder: Path) -> Boot:
    """Build the guest."""
    guest.kernel()
    files = {"init": guest.init("agent_init.sh"), **agent_files()}
    made = guest.packed(guest.initramfs(files, guest.drivers(MODULES)), folder / "initramfs")
    return Boot(made, folder / "no-memory")


def formatted(path: Path) -> None:
    """Make a qcow2 image with an empty ext4 file system."""
    plain = path.with_suffix(".plain")
    with plain.open("wb") as file:
        file.truncate(DISK_BYTES)
    images.run("mkfs.ext4", "-q", "-F", plain)
    images.run("qemu-img", "convert", "-O", "qcow2", plain, path)
    plain.unlink()


def written_lines(found: Guest) -> int:
    """The last line that the guest says it has written; it need not be on its disk."""
    said = [line.split() for line in found.lines() if re.fullmatch(r"W \d+", line)]
    return int(said[-1][1])


class AgentStage(Stage):
    """The machine ``web1`` with an ext4 file system on ``vda``; its guest has an agent that answers at ``channel``."""

    @property
    def channel(self) -> Path:
        return self.folder / "agent"

    def make(self, *, raw: bool = True) -> None:
        super().make(raw=raw)
        formatted(self.disks / "vda.qcow2")

    def start(self, *, raw: bool = True) -> Guest:
        words = self.boot.words(self.folder, saved=False)
        self.add("--start", f"{shlex.join(words)} {CHANNEL.format(path=self.channel)}", raw=raw)
        self("start web1")
        self.guest.wait_for("W", lambda lines: any(line.startswith("W ") for line in lines), 120.0)
        return self.guest

    def written_lines(self) -> int:
        """As :func:`written_lines`."""
        return written_lines(self.guest)

    def goes_on(self, more: int = 5) -> None:
        """The guest writes: its file system is not frozen."""
        wanted = self.written_lines() + more
        self.guest.wait_for(f"W {wanted}", lambda _: self.written_lines() >= wanted)
        assert not [line for line in self.guest.lines() if line.startswith("E ")]

    def lines_in(self, name: str) -> int:
        """How many lines the file system has at the name's point; it is clean, and needs no journal to be played."""
        needs, count = self.looked_at(name)
        assert not needs, "its journal is to be played"
        return count

    def looked_at(self, name: str) -> tuple[bool, int]:
        """Whether the file system at the name's point needs its journal to be played, and how many lines it has."""
        shown = self.show()
        point = point_in(shown, name, "vda")
        chain = standing_on(point["path"], shown)
        plain = self.folder / "plain"
        plain.write_bytes(images.read_unlocked(chain, point["internal"]))
        needs = "needs_recovery" in images.run("dumpe2fs", "-h", plain)
        if not needs:
            images.run("e2fsck", "-f", "-n", plain)
        text = images.run("debugfs", "-R", "cat /log", plain)
        plain.unlink()
        lines = text.split("\n")[:-1]
        assert lines == [f"line {number}" for number in range(1, len(lines) + 1)]
        return needs, len(lines)
