"""Fixtures for all tests."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit.disks import loop_device
from tests.kit.scene import Scene
from tests.kit.still import Still, standing

MARK = "SNAPTREE_TESTS"


def left_processes() -> list[str]:
    """QEMU's programs that these tests, or processes that they killed, have started and that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if f"{MARK}={os.environ[MARK]}".encode() in (folder / "environ").read_bytes():
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if line.startswith(("qemu", "/usr/bin/qemu")):
                    found.append(f"{folder.name}: {line}")
        except OSError:
            continue
    return found


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """However snaptree was killed, no program of QEMU's that it had started works on."""
    os.environ[MARK] = str(os.getpid())
    yield
    deadline = time.monotonic() + 10
    while (left := left_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


@pytest.fixture(autouse=True)
def mover_as_usual() -> Iterator[None]:
    """Whatever a test says of who is to move data holds for it alone."""
    before = os.environ.pop("SNAPTREE_MOVER", None)
    yield
    os.environ.pop("SNAPTREE_MOVER", None)
    if before is not None:
        os.environ["SNAPTREE_MOVER"] = before


@pytest.fixture
def by_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU's jobs move the data, not the mover."""
    monkeypatch.setenv("SNAPTREE_MOVER", "qemu")


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """An empty folder for images; no machine yet."""
    return Scene(tmp_path)


@pytest.fixture
def device(scene: Scene) -> Iterator[Path]:
    """A block device in the scene that shows ``b.......``; only root can make one."""
    content = scene.image("disk.raw", "raw", word="b")
    scene.left.add(content)
    with loop_device(content) as path:
        yield path


@pytest.fixture
def web1(scene: Scene) -> Scene:
    """The machine ``web1`` with one qcow2 disk that shows ``b.......``."""
    scene.image("web1.qcow2", word="b")
    scene("add web1 --disk vda=web1.qcow2")
    return scene


@pytest.fixture
def still() -> Iterator[Still]:
    """The machine ``web1``, which runs and stands still."""
    with standing() as found:
        yield found
