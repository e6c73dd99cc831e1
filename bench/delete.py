#!/usr/bin/env python3
"""Deleting a middle snapshot: snaptree, qemu-img and virsh on the same chain, alternated, medians and ratios.

The chain is base <- s1 <- s2 <- s3; what lies in the file s1 goes down into base. snaptree is timed as a whole command,
and a bare Python with the same imports beside it, so that the start of the interpreter can be told from the work.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

IMPORTS = (
    "import click, sqlite3, numpy, asyncio, qemu.qmp, snaptree.cli.main, snaptree.cli.snapshots, "
    "snaptree.machines.standalone, snaptree.running.executor, snaptree.running.recovery, snaptree.images.measure"
)
DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64'>hvm</type></os><devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
<source file='{path}'/><target dev='vda'/></disk></devices></domain>"""


def run(*words: str | Path, env: dict[str, str] | None = None) -> None:
    """Run a program to its end, or end."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=env, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words))}: {done.stderr or done.stdout}")


def make_chain(folder: Path, mib: int) -> None:
    """The chain; base and s1 have as much data, in extents of 1.2 to 2 MiB, half of it in the same places."""
    folder.mkdir()
    chance = random.Random(7)
    below: Path | None = None
    for name in ("base", "s1", "s2", "s3"):
        path = folder / f"{name}.qcow2"
        backing = ["-b", below.name, "-F", "qcow2"] if below else []
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, path, f"{4 * mib}M")
        commands: list[str] = []
        left = (mib if name in ("base", "s1") else 8) * 16
        places = list(range(0, 4 * mib * 16 - 32, 32))
        chance.shuffle(places)
        while left > 0:
            length = min(chance.randint(20, 32), left)
            commands += ["-c", f"write -q -P {chance.randint(1, 255)} {places.pop() * 65536} {length * 65536}"]
            left -= length
        run("qemu-io", "-f", "qcow2", *commands, path)
        below = path


class Bench:
    """Runs what is compared, each on a fresh copy of the chain, and keeps the times."""

    def __init__(self, folder: Path, mib: int) -> None:
        self.folder = folder
        self.pristine = folder / "pristine"
        make_chain(self.pristine, mib)
        self.times: dict[str, list[float]] = {}

    def fresh(self) -> Path:
        """A fresh copy of the chain."""
        place = self.folder / "work"
        shutil.rmtree(place, ignore_errors=True)
        run("cp", "-r", "--sparse=always", self.pristine, place)
        run("chmod", "-R", "a+rwX", place)
        return place

    def timed(self, what: str, work: Callable[[], None]) -> None:
        """Time the work, with nothing left to be written from before."""
        os.sync()
        began = time.monotonic()
        work()
        self.times.setdefault(what, []).append(time.monotonic() - began)

    def snaptree(self) -> None:
        """The names s1 to s3 on the chain; s1's file merges when the snapshot on base goes."""
        place = self.fresh()
        env = {**os.environ, "SNAPTREE_STATE": str(place / "state")}
        tool = Path(sys.executable).parent / "snaptree"
        for name in ("s1", "s2", "s3"):
            (place / f"{name}.qcow2").rename(place / f"{name}.kept")
        run(tool, "add", "web1", "--disk", f"vda={place / 'base.qcow2'}", env=env)
        for name in ("s1", "s2", "s3"):
            run(tool, "snapshot", "web1", name, "--file", f"vda={place / name}.qcow2", env=env)
            # The guest's writes: the prepared layer, written into the new tip as it stands.
            with (place / f"{name}.qcow2").open("r+b") as tip:
                tip.truncate(0)
                run("cp", "--sparse=always", place / f"{name}.kept", place / f"{name}.qcow2")
            (place / f"{name}.kept").unlink()
        self.timed(
            "snaptree delete, whole command",
            lambda: run(tool, "delete", "web1", "s1", "--merge", "commit", env=env),
        )
        self.timed("a bare Python with the same imports", lambda: run(sys.executable, "-c", IMPORTS))

    def qemu_img(self) -> None:
        """The same merge by hand."""
        place = self.fresh()

        def work() -> None:
            run("qemu-img", "commit", "-q", "-d", "-f", "qcow2", place / "s1.qcow2")
            run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", place / "s2.qcow2")
            (place / "s1.qcow2").unlink()

        self.timed("qemu-img commit -d, rebase -u", work)

    def virsh(self) -> None:
        """The same snapshots and the same deletion on a domain that is shut off."""
        place = self.fresh()
        name = "snaptree-bench"
        (place / "domain.xml").write_text(DOMAIN.format(name=name, path=place / "base.qcow2"))
        run("virsh", "define", place / "domain.xml")
        try:
            for each in ("s1", "s2", "s3"):
                spec = f"vda,file={place / each}.qcow2"
                words = ["--disk-only", "--reuse-external", "--diskspec", spec]
                run("virsh", "snapshot-create-as", name, each, *words)
            self.timed("virsh snapshot-delete, shut off", lambda: run("virsh", "snapshot-delete", name, "s1"))
        finally:
            subprocess.run(["virsh", "undefine", name, "--snapshots-metadata"], capture_output=True, check=False)


def libvirt_is_there() -> bool:
    """Whether a libvirtd answers."""
    if shutil.which("virsh") is None:
        return False
    return subprocess.run(["virsh", "list"], capture_output=True, check=False).returncode == 0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to work: the file system to measure")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mib", type=int, default=1024, help="MiB of data in the middle layer")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="snaptree-bench-", dir=options.folder))
    folder.chmod(0o755)
    has_libvirt = libvirt_is_there()
    if not has_libvirt:
        print("libvirt is not there: virsh is left out")
    try:
        bench = Bench(folder, options.mib)
        for _ in range(options.runs):
            bench.snaptree()
            bench.qemu_img()
            if has_libvirt:
                bench.virsh()
    finally:
        shutil.rmtree(folder)
    median = {what: statistics.median(times) for what, times in bench.times.items()}
    for what, times in bench.times.items():
        print(f"{what:40} {median[what]:7.3f} s   ({', '.join(f'{each:.2f}' for each in times)})")
    whole, bare = median["snaptree delete, whole command"], median["a bare Python with the same imports"]
    print(f"beyond its start, against qemu-img: {(whole - bare) / median['qemu-img commit -d, rebase -u']:.2f}")
    if has_libvirt:
        print(f"whole command, against virsh:       {whole / median['virsh snapshot-delete, shut off']:.2f}")


if __name__ == "__main__":
    main()
