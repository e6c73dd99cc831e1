"""How fast and how urgently data moves: ``--limit`` and ``--idle``."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.kit import images
from tests.kit.images import MiB
from tests.kit.scene import Scene

from snaptree.cli.parsing import bytes_a_second
from snaptree.errors import UsageError
from snaptree.running.pace import Pace, kept


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("200MiB/s", 200 * MiB),
        ("200M", 200 * MiB),
        ("200MB/s", 200_000_000),
        ("1.5 GiB/s", 1.5 * 1024 * MiB),
        ("4096", 4096),
        ("64k/s", 65536),
        ("1TiB/s", 1 << 40),
    ],
)
def test_rates(text: str, wanted: float) -> None:
    assert bytes_a_second(text) == wanted


@pytest.mark.parametrize(
    "text", ["", "fast", "-1", "0", "0MiB/s", "1e9", "10 furlongs", "MiB/s", "1..5M", "nan", "inf"]
)
def test_what_is_no_rate(text: str, web1: Scene) -> None:
    with pytest.raises(UsageError):
        bytes_a_second(text)
    web1("snapshot web1 s1")
    for line in ("delete web1 s1", "gc web1", "squash web1", "revert web1 s1"):
        said = web1(f"{line} --limit='{text}'", status=2)
        assert "is not a rate" in said.err and "200MiB/s" in said.err
    assert "s1" in web1.names()


@pytest.mark.parametrize("by", ["mover", "qemu"])
def test_a_merge_is_no_faster_than_it_may_be(scene: Scene, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPTREE_MOVER", by)
    path = images.create(scene.disks / "web1.qcow2", 64 * MiB)
    images.io(path, "qcow2", "write -P 1 0 24M")
    scene("add web1 --disk vda=web1.qcow2")
    scene("snapshot web1 s1")
    images.io(scene.path("main"), "qcow2", "write -P 2 0 24M")
    began = time.monotonic()
    scene("delete web1 s1 --limit 16MiB/s --merge commit")
    # QEMU's jobs and the mover send off the first pieces at once.
    assert time.monotonic() - began > 0.5
    images.io(path, "qcow2", "read -P 2 0 24M")
    scene.sound()


def test_everybody_else_goes_first() -> None:
    """The priority holds for programs that are started meanwhile, and for the block only."""
    tell = [
        sys.executable,
        "-c",
        "import ctypes, os; print(ctypes.CDLL(None).syscall({'x86_64': 252, 'aarch64': 31}[os.uname().machine], 1, 0))",
    ]

    def priority() -> int:
        return int(subprocess.run(tell, capture_output=True, text=True, check=True).stdout) >> 13

    if os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("the number of the call is not known here")
    before = priority()
    with kept(Pace(idle=True)):
        assert priority() == 3
    assert priority() == before != 3


def test_idle_merges_as_well(web1: Scene, tmp_path: Path) -> None:
    web1("snapshot web1 s1")
    web1.write(".x")
    web1("delete web1 s1 --idle")
    assert web1.shows() == "bx......"
    web1.sound()
