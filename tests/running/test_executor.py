"""What stops an operation does so before anything is touched."""

from __future__ import annotations

from pathlib import Path

from tests.kit.scene import Scene
from tests.kit.space import held

BUSY, MISSING = 5, 3


def test_a_file_that_a_later_merge_needs_is_open(web1: Scene) -> None:
    """The name stays, though it could go by itself."""
    web1("snapshot web1 s1")
    web1.write(".x")
    web1("snapshot web1 s2")
    before = web1.names()
    with held(web1.path("s1"), read_only=True):
        web1("delete web1 s1", status=BUSY)
    assert web1.names() == before
    web1("delete web1 s1")


def test_firmware_state_that_a_later_step_needs_is_gone(scene: Scene) -> None:
    """Nothing has been made by then that would have to be taken back."""
    scene.image("web1.qcow2", word="b")
    nvram = Path(scene.folder / "nvram.fd")
    nvram.write_text("first")
    scene(f"add web1 --disk vda=web1.qcow2 --nvram {nvram}")
    nvram.unlink()
    said = scene("snapshot web1 s1", status=MISSING)
    assert "nvram" in said.err
    assert scene("log web1 --json").json[-1]["operation"] != "snapshot"
