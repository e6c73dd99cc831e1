"""What starting up takes: most of a small merge."""

from __future__ import annotations

import subprocess
import sys

MERGE = """
import snaptree.cli.main, snaptree.cli.snapshots, snaptree.machines.standalone, snaptree.running.executor
import snaptree.running.carry
import sys
print(*sys.modules)
"""


DOMAIN = """
import snaptree.cli.main, snaptree.cli.snapshots, snaptree.machines.libvirt, snaptree.running.executor
import snaptree.running.carry.by_libvirt, snaptree.running.carry.domain_jobs, snaptree.running.carry.domain_swap
import sys
print(*sys.modules)
"""


def test_with_a_domain_nothing_is_loaded_that_talks_to_qemu() -> None:
    loaded = subprocess.run([sys.executable, "-c", DOMAIN], capture_output=True, text=True, check=True).stdout.split()
    assert "snaptree.store.libvirt.calls" in loaded
    assert not {"asyncio", "qemu.qmp", "ssl", "logging"} & set(loaded)


def test_with_the_machine_off_nothing_is_loaded_that_waits_for_qemu() -> None:
    loaded = subprocess.run([sys.executable, "-c", MERGE], capture_output=True, text=True, check=True).stdout.split()
    assert "snaptree.running.carry.moving" in loaded and "numpy" in loaded
    assert not {"asyncio", "qemu.qmp", "ssl", "logging"} & set(loaded)
