"""What is compared: each way prepares a run, and is then one line of shell."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bench.chains import Chain, remove
from bench.figures import Space
from bench.rows import BARE, COMMIT, COMMIT_WAY, DD, MIB, OURS, PULL_WAY, REBASE, REBASE_NONE, SNAPTREE, VIRSH
from bench.systems import System, run
from tests.kit.libvirtd import Libvirtd

MACHINE = "bench"
LIMIT = 3600.0
"""Seconds after which something is wrong."""
TOOL = Path(sys.executable).parent / "snaptree"
_FLAGS = {SNAPTREE: "", COMMIT_WAY: " --merge commit", PULL_WAY: " --merge pull"}
_RUN_ALL = """
import json, os, sys
from snaptree.cli.main import run
for words, moves in json.loads(sys.argv[1]):
    if status := run(words):
        sys.exit(status)
    for source, target in moves:
        os.replace(source, target)
"""
_MODULES = """
import sys
before = set(sys.modules)
from snaptree.cli.main import run
status = run(sys.argv[1:])
found = [name for name, module in sys.modules.items() if getattr(module, "__spec__", None) is not None]
print("modules:", *(name for name in found if name not in before and name != "__main__"))
sys.exit(status)
"""
_DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64'>hvm</type></os><devices>{disks}</devices></domain>"""
_DISK = """<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
<source file='{path}'/><target dev='{target}'/></disk>"""


@dataclass
class Ways:
    """Tries each way on fresh chains and times it."""

    system: System
    chain: Chain
    libvirt: Libvirtd | None
    check: bool = False
    modules: list[str] = field(default_factory=list)
    space: list[Space] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """For snaptree: its state is on the file system that is measured; where libvirt is, where it is to ask that."""
        found = {**os.environ, "SNAPTREE_STATE": str(self.chain.place / "state")}
        if self.chain.row.domain and self.libvirt is not None:
            found["LIBVIRT_DEFAULT_URI"] = self.libvirt.uri
        return found

    def line(self, way: str) -> str:
        """The line of shell that is timed."""
        chain, q = self.chain, shlex.quote
        folders = [q(str(chain.work / target)) for target in chain.targets]
        goes = " ".join(f"{name}.qcow2" for name in chain.merged)
        last, kept = f"{chain.merged[-1]}.qcow2", f"{chain.kept}.qcow2"
        names = [f"n{number}" for number in range(1, chain.row.merged)]
        if way in OURS:
            return f"{q(str(TOOL))} delete {MACHINE} {' '.join(names)}{_FLAGS[way]}"
        if way == BARE:
            return f"{q(sys.executable)} -c {q('import ' + ', '.join(self.modules))}"
        if way == VIRSH:
            assert self.libvirt is not None
            call = f"virsh -q -c {q(self.libvirt.uri)} snapshot-delete {MACHINE}"
            return " && ".join(f"{call} {name}" for name in names)
        if way == DD:
            words = f"bs=1M count={chain.moved // MIB} conv=fdatasync status=none"
            return _at_once(
                f"dd if={q(str(chain.pristine / target / 'base.qcow2'))} of={q(str(chain.place / target))}.dd {words}"
                for target in chain.targets
            )
        base = "-b base.qcow2 -F qcow2"
        if way == COMMIT:
            deep = "" if len(chain.merged) == 1 else "-b base.qcow2 "
            work = (
                f"qemu-img commit -q -d -f qcow2 {deep}{last} && qemu-img rebase -u -f qcow2 {base} {kept} && rm {goes}"
            )
        else:
            cache = "-t none " if way == REBASE_NONE else ""
            work = f"qemu-img rebase {cache}-f qcow2 {base} {kept} && rm {goes}"
        return _at_once(f"cd {folder} && {work}" for folder in folders)

    def timed(self, way: str) -> float:
        """Try a way once; how many seconds it took until all of it was on the device.

        :raise RuntimeError: it failed, or what it left is wrong.
        """
        self._prepare(way)
        before = self.system.used() if way in OURS else 0
        state = self._state_size()
        os.sync()
        time.sleep(0.2)
        seconds = self.run(way)
        if way not in (BARE, DD):
            self.chain.require_merged()
        if way == SNAPTREE:
            grown = self.system.used() - before
            self.space.append(Space(grown, self._metadata() + max(0, self._state_size() - state)))
        if self.check and way not in (BARE, DD):
            try:
                self.chain.compare(kept_point=way not in (REBASE, REBASE_NONE))
            except RuntimeError as error:
                raise RuntimeError(f"{way} has left something wrong: {error}") from error
        self._clean(way)
        return seconds

    def run(self, way: str) -> float:
        """Run the line of shell; how many seconds it took until all of it was on the device.

        :raise RuntimeError: it failed.
        """
        line, began = self.line(way), time.monotonic()
        done = subprocess.run(
            ["/bin/sh", "-c", line],
            env=self.environment if way in OURS else None,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
        )
        self.system.sync()
        seconds = time.monotonic() - began
        if done.returncode != 0:
            raise RuntimeError(f"{line}: {(done.stderr or done.stdout).strip()}")
        return seconds

    def _prepare(self, way: str) -> None:
        if way == BARE:
            if not self.modules:
                self._find_modules()
        elif way == DD:
            self.chain.drop()
        else:
            self.chain.drop()
            # What was removed has to be gone: XFS gives its room back later.
            self.system.used()
            self.chain.restore()
            if way in OURS and not self.chain.row.domain:
                self._remember()
            elif way == VIRSH or way in OURS:
                remove(self.chain.place / "state")
                self._define()

    def _clean(self, way: str) -> None:
        if way == DD:
            for target in self.chain.targets:
                (self.chain.place / f"{target}.dd").unlink()
        elif way == VIRSH or self.chain.row.domain:
            self.undefine()

    def undefine(self) -> None:
        """Forget the domain, if there is one."""
        if self.libvirt is not None:
            with contextlib.suppress(subprocess.CalledProcessError):
                self.libvirt.virsh("undefine", MACHINE, "--snapshots-metadata")

    def _remember(self) -> None:
        """Have snaptree take the snapshots; the guest's writes are the prepared layers, put in its new tips' place."""
        chain = self.chain
        remove(chain.place / "state")
        places = [chain.work / target for target in chain.targets]
        for place in places:
            for name in chain.overlays:
                (place / f"{name}.qcow2").rename(place / f"{name}.kept")
        disks = [f"--disk={target}={chain.work / target / 'base.qcow2'}" for target in chain.targets]
        work: list[tuple[list[str], list[tuple[str, str]]]] = [(["add", MACHINE, *disks], [])]
        for number, name in enumerate(chain.overlays, 1):
            files = [f"--file={target}={chain.work / target / name}.qcow2" for target in chain.targets]
            moves = [(f"{place / name}.kept", f"{place / name}.qcow2") for place in places]
            work.append((["snapshot", MACHINE, f"n{number}", *files], moves))
        self._python(_RUN_ALL, json.dumps(work))

    def _find_modules(self) -> None:
        """What ``snaptree delete`` imports here, found out by a run that isn't timed."""
        self._prepare(SNAPTREE)
        printed = self._python(_MODULES, *shlex.split(self.line(SNAPTREE))[1:])
        self.modules = printed.splitlines()[-1].split()[1:]

    def _python(self, script: str, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, *words], env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"snaptree: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def _define(self) -> None:
        """The same snapshots on a domain that is shut off."""
        assert self.libvirt is not None
        self.undefine()
        chain = self.chain
        domain = chain.place / "domain.xml"
        domain.write_text(self._domain())
        self.libvirt.virsh("define", domain)
        for number, name in enumerate(chain.overlays, 1):
            files = [f"--diskspec={target},file={chain.work / target / name}.qcow2" for target in chain.targets]
            words = [MACHINE, f"n{number}", "--disk-only", "--reuse-external", *files]
            self.libvirt.virsh("snapshot-create-as", *words)

    def _domain(self) -> str:
        """The domain's definition."""
        disks = "".join(
            _DISK.format(path=self.chain.work / target / "base.qcow2", target=target) for target in self.chain.targets
        )
        return _DOMAIN.format(name=MACHINE, disks=disks)

    def _metadata(self) -> int:
        """The tables in the merged images, and what a file system itself may need to know of them."""
        found = 0
        for target in self.chain.targets:
            image = self.chain.work / target / "base.qcow2"
            told = json.loads(run("qemu-img", "check", "--output=json", "-f", "qcow2", image))
            found += told["image-end-offset"] - told.get("allocated-clusters", 0) * 65536
        return found + MIB

    def _state_size(self) -> int:
        folder = self.chain.place / "state"
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0


def _at_once(lines: Iterable[str]) -> str:
    """Several lines of shell at the same time; it fails where one does."""
    first, *others = lines
    return " && ".join([f"({first}) & one=$!; ({other}) && wait $one" for other in others]) or first
