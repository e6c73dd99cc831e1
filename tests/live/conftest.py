"""Fixtures for tests with a guest that runs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit import guest
from tests.kit.guest import Boot
from tests.kit.space import mounted
from tests.kit.stage import Stage, kill_all


@pytest.fixture(scope="session")
def boot(tmp_path_factory: pytest.TempPathFactory) -> Boot:
    """The guest, built and booted once."""
    guest.kernel()
    return guest.boot(tmp_path_factory.mktemp("boot"))


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short name, as sockets need it."""
    folder = Path(tempfile.mkdtemp(prefix="live"))
    yield folder
    kill_all(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def stage(boot: Boot, place: Path) -> Stage:
    """Two disks and a guest for them; no machine yet."""
    return Stage(place, boot)


@pytest.fixture
def sharing(boot: Boot, place: Path) -> Iterator[Stage]:
    """A stage whose disks are on XFS."""
    with mounted(place, "xfs", 400 << 20) as folder:
        yield Stage(folder, boot)
        kill_all(folder)
