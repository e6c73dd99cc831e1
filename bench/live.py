"""The same deletions while the machine runs: its guest writes to the disk meanwhile, and tells how long it waited."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.figures import Stall
from bench.rows import BARE, MIB, SNAPTREE
from bench.ways import MACHINE, TOOL, Ways
from tests.kit.guest import Boot, Guest, build, device

IDLE_SECONDS = 3.0
"""So long the guest's waits are watched with nothing going on."""
OWN_MIB = 96
"""What the guest needs for itself."""
_DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
<cmdline>{cmdline}</cmdline></os><features><acpi/></features><on_reboot>destroy</on_reboot><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{path}'/>
<target dev='vda' bus='virtio'/></disk>
<serial type='unix'><source mode='bind' path='{folder}/console'/>
<log file='{folder}/console.log' append='off'/></serial>
<memballoon model='none'/></devices></domain>"""


FILL_SECONDS = 300.0
"""So long it may take to fill its memory."""


@dataclass
class LiveWays(Ways):
    """Tries each way on fresh chains with a guest that runs, and times it."""

    stalls: dict[str, list[Stall]] = field(default_factory=dict)

    @property
    def _folder(self) -> Path:
        """The guest's: its console is there."""
        return self.chain.place / "guest"

    def _boot(self) -> Boot:
        initramfs, fill = self.chain.place / "initramfs", self.chain.row.memory // MIB
        made = initramfs if initramfs.exists() else build(self.chain.place, pace=1)
        return Boot(made, Path("/nonexistent"), memory_mib=OWN_MIB + fill + fill // 8, fill_mib=fill)

    def timed(self, way: str) -> float:
        """Try a way once, while the guest writes; how many seconds it took until all of it was on the device.

        :raise RuntimeError: it failed, or what it left is wrong.
        """
        if way == BARE:
            return super().timed(way)
        with self._guest(way) as guest:
            since = guest.flushed()
            time.sleep(IDLE_SECONDS)
            idle = guest.stall(since)
            self.system.sync()
            since = guest.flushed()
            seconds = self.run(way)
            guest.writes_on()
            self.stalls.setdefault(way, []).append(Stall(idle, guest.stall(since)))
        self.chain.require_merged()
        self._clean(way)
        return seconds

    @contextlib.contextmanager
    def _guest(self, way: str) -> Iterator[Guest]:
        """The guest, which writes, on a fresh chain."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        self._prepare(way)
        alone = way == SNAPTREE and not self.chain.row.domain
        start, stop = self._by_snaptree() if alone else self._by_virsh()
        start()
        guest = Guest(self._folder)
        try:
            guest.wait_for("its first word", lambda lines: any(line.startswith("R ") for line in lines), FILL_SECONDS)
            guest.go()
            yield guest
        finally:
            stop()
            if way == SNAPTREE and not alone:
                # What the machine kept from having its name gets it; snaptree's own machines do so as they stop.
                self._snaptree("gc", MACHINE)

    def _by_snaptree(self) -> tuple[Callable[[], object], Callable[[], object]]:
        boot = self._boot()
        command = [*boot.words(self._folder, saved=False), "-device", device("vda", "{vda}")]
        self._snaptree("set", MACHINE, "--start", shlex.join(command))
        return lambda: self._snaptree("start", MACHINE), lambda: self._snaptree("stop", MACHINE, "--force")

    def _snaptree(self, *words: str) -> None:
        self._python("import sys; from snaptree.cli.main import run; sys.exit(run(sys.argv[1:]))", *words)

    def _by_virsh(self) -> tuple[Callable[[], object], Callable[[], object]]:
        libvirt = self.libvirt
        assert libvirt is not None
        return lambda: libvirt.virsh("start", MACHINE), lambda: libvirt.virsh("destroy", MACHINE)

    def _domain(self) -> str:
        boot = self._boot()
        words = boot.words(self._folder, saved=False)
        told = {key: words[words.index(f"-{key}") + 1] for key in ("kernel", "append")}
        return _DOMAIN.format(
            name=MACHINE,
            memory=boot.memory_mib,
            kernel=told["kernel"],
            initrd=boot.initramfs,
            cmdline=told["append"],
            path=self.chain.work / "vda" / "base.qcow2",
            folder=self._folder,
        )


class MemoryWays(LiveWays):
    """Takes a snapshot with memory instead of deleting one."""

    @property
    def _saved(self) -> Path:
        return self.chain.place / "memory"

    def line(self, way: str) -> str:
        """The line of shell that is timed."""
        if way == SNAPTREE:
            words = [str(TOOL), "snapshot", MACHINE, "now", "--memory", f"--memory-file={self._saved}"]
        else:
            assert self.libvirt is not None
            words = ["virsh", "-q", "-c", self.libvirt.uri, "snapshot-create-as", MACHINE, "now"]
            words += [f"--memspec=file={self._saved},snapshot=external", f"--diskspec=vda,file={self._saved}.qcow2"]
        return shlex.join(words)

    def timed(self, way: str) -> float:
        """Try a way once, while the guest writes; how many seconds it took until all of it was on the device.

        :raise RuntimeError: it failed.
        """
        with self._guest(way) as guest:
            with guest.heard() as idle:
                time.sleep(IDLE_SECONDS)
            self.system.sync()
            with guest.heard() as during:
                seconds = self.run(way)
                guest.writes_on()
            self.stalls.setdefault(way, []).append(Stall(max(idle), max(during)))
        size = self._saved.stat().st_size
        if size < self.chain.row.memory:
            raise RuntimeError(f"{way} has saved {size} bytes of memory, and the guest had filled more")
        self._clean(way)
        for path in self.chain.place.glob("memory*"):
            path.unlink()
        return seconds
