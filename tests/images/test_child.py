"""No program of QEMU's outlives the snaptree that has started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.kit.programs import alive, stand_in

from snaptree.images.child import ends_with_us, run_program

DAEMON = """
import asyncio, sys
from snaptree.qemu.daemon import StorageDaemon

async def main():
    async with StorageDaemon() as daemon:
        print(daemon.pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""
TOOL = """
import threading, time
from snaptree.images.child import run_program

words = ["qemu-img", "bench", "-w", "-c", "100000000", "-f", "raw", {path!r}]
threading.Thread(target=run_program, args=(words,)).start()
time.sleep(60)
"""


def children_of(process: int) -> list[int]:
    """The processes that this one has started."""
    return [
        int(each)
        for task in Path(f"/proc/{process}/task").iterdir()
        for each in (task / "children").read_text().split()
    ]


def gone(process: int, seconds: float = 5.0) -> bool:
    """Whether it ends within the time; if not, it is killed."""
    until = time.monotonic() + seconds
    while alive(process) and time.monotonic() < until:
        time.sleep(0.01)
    lives = alive(process)
    if lives:
        os.kill(process, signal.SIGKILL)
    return not lives


def test_the_storage_daemon_dies_with_us() -> None:
    with subprocess.Popen([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        daemon = int(process.stdout.readline())
        assert alive(daemon)
        process.kill()
    assert gone(daemon)


def test_a_tool_dies_with_us(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    with subprocess.Popen([sys.executable, "-c", TOOL.format(path=str(path))]) as process:
        until = time.monotonic() + 20
        while not (found := children_of(process.pid)):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert gone(found[0])


def test_one_whose_parent_was_quicker_to_die_ends_at_once() -> None:
    """Killed between the fork and the promise, the parent cannot send the signal any more."""
    promise = ends_with_us()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        if os.fork() == 0:
            promise()
            os._exit(7)
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_complaints_without_number_are_no_fault(tmp_path: Path) -> None:
    """qemu-img check has a line for each leaked cluster; what it says first and last is kept."""
    script = "#!/bin/sh\necho first >&2; yes leaked | head -c 30000000 >&2; echo last >&2; echo answer; exit 3\n"
    with stand_in(tmp_path, {"qemu-img": script}):
        ended = run_program(["qemu-img"])
    assert (ended.status, ended.out) == (3, "answer\n")
    assert ended.err.startswith("first") and ended.err.endswith("last\n") and len(ended.err) < 1 << 20
