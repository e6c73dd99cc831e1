"""A snapshot with memory, steered from another terminal: it moves all of the guest's memory, and takes as long."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tests.kit.still import Still

SLOW = """
import asyncio, sys
from snaptree.qemu import memory

until_done = memory.until_done

async def slowly(*words):
    await asyncio.to_thread(sys.stdin.read)
    await until_done(*words)

memory.until_done = slowly
from snaptree.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


def test_memory_that_is_being_saved_is_not_paused_nor_slowed_down(still: Still) -> None:
    with still.qmp() as qmp:
        qmp("cont")
    words = [sys.executable, "-c", SLOW, "snapshot", "web1", "m", "--memory"]
    place = {**os.environ, "SNAPTREE_STATE": str(still.state)}
    process = subprocess.Popen(words, env=place, cwd=still.disks, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 30
    while not any("memory" in each["doing"] for each in still("operations web1 --json").json):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    assert "memory that is being saved cannot be paused" in still("pause web1", status=6).err
    assert "memory that is being saved cannot be slowed down" in still("limit web1 1MiB/s", status=6).err
    (told,) = still("operations web1 --json").json
    assert not told["pausable"] and told["limit"] is None and told["state"] == "running"
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    still.sound()
