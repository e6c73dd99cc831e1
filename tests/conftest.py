"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.kit.scene import Scene


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """An empty folder for images; no machine yet."""
    return Scene(tmp_path)


@pytest.fixture
def web1(scene: Scene) -> Scene:
    """The machine ``web1`` with one qcow2 disk that shows ``b.......``."""
    scene.image("web1.qcow2", word="b")
    scene("add web1 --disk vda=web1.qcow2")
    return scene
