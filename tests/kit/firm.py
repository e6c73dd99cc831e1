"""A machine whose firmware keeps state: UEFI variables in a flash, and a TPM.

Flash and TPM are QEMU's own devices, written to as a guest's firmware does it, without a guest: by ``-qtest``.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import socket
import struct
import time
from pathlib import Path

import pytest
from tests.kit.still import COMMAND, Still

BIOS_BYTES, FLASH_BYTES = 64 << 10, 64 << 10
HALTS = bytes.fromhex("faf4ebfd")
"""What the processor finds where it begins (``cli; hlt; jmp``): a firmware that did more would use the TPM as well."""
PROGRAM, ERASE, CONFIRM, READ = 0x40, 0x20, 0xD0, 0xFF
"""Commands of a flash (CFI, the Intel set)."""


@dataclasses.dataclass(frozen=True)
class Flash:
    """The flash with the variables of a q35: its file, where its QEMU listens, and how large the firmware is."""

    file: Path
    socket: Path
    bios_bytes: int = BIOS_BYTES

    @property
    def address(self) -> int:
        """Where the machine has it: just below the firmware, whose end is at 4 GiB."""
        return (1 << 32) - self.bios_bytes - FLASH_BYTES

    def words(self, bios: Path) -> list[str]:
        """What gives a machine this flash and firmware, in QEMU's words."""
        first = f"if=pflash,unit=0,format=raw,readonly=on,file={bios}"
        second = f"if=pflash,unit=1,format=raw,file={self.file}"
        listens = f"unix:{self.socket},server=on,wait=off"
        return ["-drive", first, "-drive", second, "-qtest", listens, "-qtest-log", "/dev/null"]

    def make(self) -> None:
        """Make the file, without any variable."""
        self.file.write_bytes(b"\xff" * FLASH_BYTES)

    def bus(self, *orders: str) -> list[int]:
        """Say orders of QEMU's qtest; the numbers that are answered."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(self.socket))
            with connection.makefile("rw") as bus:
                found = []
                for each in orders:
                    bus.write(each + "\n")
                    bus.flush()
                    said = bus.readline().split()
                    assert said[0] == "OK", (each, said)
                    found.append(int(said[1], 0) if len(said) > 1 else 0)
        return found

    def set(self, word: str) -> None:
        """Set the variable, as firmware does: erase the flash's sector, and program it byte by byte."""
        orders = [f"writeb {self.address} {ERASE}", f"writeb {self.address} {CONFIRM}"]
        for at, letter in enumerate(word.encode()):
            orders += [f"writeb {self.address + at} {PROGRAM}", f"writeb {self.address + at} {letter}"]
        self.bus(*orders, f"writeb {self.address} {READ}")
        assert self.variable() == word

    def variable(self) -> str:
        """The variable as the machine reads it."""
        return _word(bytes(self.bus(*(f"readb {self.address + at}" for at in range(16)))))

    def kept(self) -> str:
        """The variable in the file."""
        return _word(self.file.read_bytes()[:16])


class Firm(Still):
    """The machine ``web1`` with one disk and UEFI variables, which runs without a guest that does anything."""

    @property
    def variables(self) -> Path:
        """The file with the variables."""
        return self.folder / "vars.fd"

    def start_command(self) -> str:
        # What kills snaptree is not to kill it.
        return f"env -u LD_PRELOAD {COMMAND} {shlex.join(self.flash.words(self.folder / 'bios'))}"

    def options(self) -> str:
        self.flash.make()
        (self.folder / "bios").write_bytes((bytes(BIOS_BYTES - 16) + HALTS).ljust(BIOS_BYTES, b"\0"))
        return f"--nvram {self.variables}"

    @property
    def socket(self) -> Path:
        """Where its QEMU listens for what a processor would say to its devices."""
        return self.folder / "bus"

    @property
    def flash(self) -> Flash:
        """Its flash."""
        return Flash(self.variables, self.socket)

    def bus(self, *orders: str) -> list[int]:
        """Say orders of QEMU's qtest; the numbers that are answered."""
        return self.flash.bus(*orders)

    def set(self, word: str) -> None:
        """Set the variable."""
        self.flash.set(word)

    def variable(self) -> str:
        """The variable as the machine reads it."""
        return self.flash.variable()

    def kept(self) -> str:
        """The variable in the file that the machine's firmware has."""
        return self.flash.kept()

    def copies(self) -> list[Path]:
        """The copies of firmware state that there are."""
        return sorted(path for path in (self.state / "firmware").rglob("*") if path.is_file())

    def run_state(self) -> str:
        """What the machine does, in QEMU's word."""
        with self.qmp() as qmp:
            return str(qmp("query-status")["status"])

    def go(self) -> None:
        """Let it run."""
        with self.qmp() as qmp:
            qmp("cont")

    def runs(self, seconds: float = 5.0) -> None:
        """Wait until it runs."""
        until = time.monotonic() + seconds
        while self.run_state() != "running":
            assert time.monotonic() < until, self.run_state()
            time.sleep(0.02)


class Trusted(Firm):
    """The same with a TPM, of an emulator that is started with QEMU and ends with it."""

    INDEX, OWNER, PCR = 0x01500000, 0x40000001, 16

    @property
    def tpm(self) -> Path:
        """The folder with the TPM's state."""
        return self.folder / "tpm"

    def options(self) -> str:
        if shutil.which("swtpm") is None:
            pytest.skip("swtpm is not installed")
        self.tpm.mkdir()
        return f"{super().options()} --tpm {self.tpm}"

    def start_command(self) -> str:
        emulator = f"swtpm socket --tpm2 --tpmstate dir={self.tpm} --daemon --terminate"
        emulator += f" --ctrl type=unixio,path={self.folder}/swtpm"
        words = f"{super().start_command()} -chardev socket,id=swtpm,path={self.folder}/swtpm"
        words += " -tpmdev emulator,id=tpm,chardev=swtpm -device tpm-crb,tpmdev=tpm"
        script = shlex.quote(f'{emulator} && exec "$@"')
        return f"sh -c {script} sh {words}"

    def command_of(self, code: int, body: bytes, *, handles: bytes = b"", authorised: bool = True) -> bytes:
        """Have the TPM carry out a command, by the registers of its command buffer; the answer without its head.

        Commands are those of the TPM 2.0 library specification, part 3; the buffer is of the PC client's.
        """
        session = struct.pack(">IIHBH", 9, 0x40000009, 0, 1, 0) if authorised else b""
        parts = handles + session + body
        said = struct.pack(">HII", 0x8002 if authorised else 0x8001, 10 + len(parts), code) + parts
        base = 0xFED40000
        self.bus(f"writel {base + 0x08} 1", f"writel {base + 0x40} 1")
        self.bus(*(f"writeb {base + 0x80 + at} {byte}" for at, byte in enumerate(said)), f"writel {base + 0x4C} 1")
        until = time.monotonic() + 30
        while self.bus(f"readl {base + 0x4C}") != [0]:
            assert time.monotonic() < until, "the TPM does not answer"
            time.sleep(0.01)
        answer = bytes(self.bus(*(f"readb {base + 0x80 + at}" for at in range(96))))
        _, size, status = struct.unpack_from(">HII", answer)
        assert status == 0, f"the TPM says {status:#x} to {code:#x}"
        return answer[10:size]

    def begin(self) -> None:
        """Start the TPM, as firmware does, and make a place in it that keeps eight bytes."""
        self.command_of(0x144, b"\0\0", authorised=False)
        place = struct.pack(">IHIHH", self.INDEX, 0x000B, 0x02020002, 0, 8)
        self.command_of(0x12A, struct.pack(">HH", 0, len(place)) + place, handles=struct.pack(">I", self.OWNER))

    def seal(self, word: str) -> None:
        """Keep a word in the TPM, and extend a register that lasts until it is started anew."""
        both = struct.pack(">II", self.OWNER, self.INDEX)
        self.command_of(0x137, struct.pack(">H8sH", 8, word.encode(), 0), handles=both)
        digest = struct.pack(">IH32s", 1, 0x000B, word.encode())
        self.command_of(0x182, digest, handles=struct.pack(">I", self.PCR))

    def sealed(self) -> str:
        """The word that the TPM keeps."""
        both = struct.pack(">II", self.OWNER, self.INDEX)
        answer = self.command_of(0x14E, struct.pack(">HH", 8, 0), handles=both)
        return answer[6:14].rstrip(b"\0").decode()

    def register(self) -> bytes:
        """What the register has been extended to."""
        answer = self.command_of(0x17E, struct.pack(">IHB3s", 1, 0x000B, 3, b"\0\0\1"), authorised=False)
        return answer[-32:]


def _word(content: bytes) -> str:
    return content.partition(b"\xff")[0].decode()
