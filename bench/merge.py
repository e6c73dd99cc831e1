"""Deleting snapshots: snaptree against qemu-img, virsh and dd on the same chains, alternated, medians.

Every way is a line of shell, timed from its start until the file system has written everything to its device. The file
systems are the bench's own, on loop devices; so is libvirtd. Needs root; ./scripts/bench does all set-up.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import os
import platform
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from bench.chains import Chain
from bench.figures import Figures, Results, report
from bench.live import LiveWays, MemoryWays
from bench.rows import MIB, OURS, ROWS, VIRSH, Row
from bench.systems import Unavailable, mounted, run
from bench.ways import Ways
from tests.kit.libvirtd import Libvirtd, LibvirtUnavailable, libvirtd

from bench import picture

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "merge-speed.svg"


def say(text: str) -> None:
    """Tell how far it has come."""
    print(text, file=sys.stderr, flush=True)


def measure(row: Row, folder: Path, options: argparse.Namespace) -> Figures:
    """Measure one row, on a file system of its own."""
    figures = Figures()
    # Two copies of the chain (the lowest layer is a quarter larger than the delta), what a merge adds, and some air.
    size = int(6.3 * row.delta) * row.disks + 2 * row.memory + 512 * MIB
    with contextlib.ExitStack() as stack:
        system = stack.enter_context(mounted(folder, row.system, size, direct=options.loop == "direct"))
        libvirt: Libvirtd | None = None
        try:
            libvirt = stack.enter_context(libvirtd(keep=system.place))
        except LibvirtUnavailable as error:
            figures.left_out[VIRSH] = str(error)
        chain = Chain(row, system.place)
        chain.make()
        sharing = "blocks can be shared" if system.shares() else "blocks can't be shared"
        say(f"{row.name}: {chain.moved // MIB} MiB to move on each of {row.disks} disks; {sharing}")
        kind = MemoryWays if row.memory else LiveWays if row.running else Ways
        ways = kind(system, chain, libvirt, options.check)
        stack.callback(ways.undefine)
        for number in range(options.runs):
            for way in row.ways():
                if way in figures.left_out:
                    continue
                if row.domain and libvirt is None:
                    raise Unavailable(figures.left_out[VIRSH])
                try:
                    seconds = ways.timed(way)
                except RuntimeError as error:
                    if way in OURS:
                        raise
                    figures.left_out[way] = str(error).strip().splitlines()[-1]
                    figures.times.pop(way, None)
                    continue
                figures.times.setdefault(way, []).append(seconds)
            told = ", ".join(f"{way} {times[-1]:.3f}" for way, times in figures.times.items())
            say(f"  run {number + 1} of {options.runs}: {told}")
        figures.space = ways.space
        if isinstance(ways, LiveWays):
            figures.stalls = ways.stalls
    return figures


def host() -> dict[str, str]:
    """What it was measured on."""
    found = {"Linux": platform.release(), "processors": str(os.cpu_count()), "Python": platform.python_version()}
    found["QEMU"] = run("qemu-img", "--version").split()[2]
    if shutil.which("virsh"):
        found["libvirt"] = run("virsh", "--version").strip()
    return found


def chosen(options: argparse.Namespace) -> list[Row]:
    """The rows that are asked for."""
    patterns: list[str] = options.only
    return [
        row.divided(options.size_divisor)
        for row in ROWS
        if not patterns or any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns)
    ]


def stop(number: int, _: object) -> None:
    """End as by Ctrl-C, with everything cleaned up."""
    raise SystemExit(128 + number)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--folder", type=Path, default=tempfile.gettempdir(), help="where the file systems' disks are")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="rows, as in 'ext4: *'; repeat")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size-divisor", type=int, default=1, metavar="N", help="so many times less data, for a try")
    parser.add_argument("--check", action="store_true", help="compare every byte of what each run leaves")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures; rows that are in it already stay")
    parser.add_argument("--svg", type=Path, metavar="FILE", help=f"draw there; by default {PICTURE.name} if complete")
    parser.add_argument("--loop", choices=["direct", "buffered"], default="direct", help="how loop devices do I/O")
    parser.add_argument("--list", action="store_true", help="print the names of the rows, and what is compared in each")
    options = parser.parse_args()
    rows = chosen(options)
    if options.list:
        for row in rows:
            print(f"{row.name:36} {', '.join(row.ways())}")
        return
    results = Results(options.size_divisor, host())
    if options.json and options.json.exists():
        results = Results.load(options.json)
        if results.divisor != options.size_divisor:
            parser.error(f"{options.json} has figures of sizes divided by {results.divisor}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    folder = Path(tempfile.mkdtemp(prefix="snaptree-bench-", dir=options.folder))
    folder.chmod(0o755)
    try:
        for row in rows:
            try:
                figures = measure(row, folder, options)
            except Unavailable as error:
                figures = Figures(left_out={"everything": str(error)})
            results.rows.pop(row.name, None)
            results.rows[row.name] = figures
            if options.json:
                results.save(options.json)
    except RuntimeError as error:
        raise SystemExit(f"bench: {error}") from error
    finally:
        shutil.rmtree(folder)
    print(report(results))
    drawn = options.svg or (PICTURE if picture.complete(results) else None)
    if drawn:
        drawn.write_text(picture.draw(results))
        say(f"drawn: {drawn}")


if __name__ == "__main__":
    main()
