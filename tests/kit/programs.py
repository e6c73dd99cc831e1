"""Stand-ins for QEMU's programs."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path


@contextlib.contextmanager
def stand_in(folder: Path, scripts: Mapping[str, str], **told: str) -> Iterator[None]:
    """Put programs first in PATH for the block, and these values into the environment."""
    place = folder / "programs"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name, script in scripts.items():
        (place / name).write_text(script, encoding="utf-8")
        (place / name).chmod(0o755)
    before = dict(os.environ)
    os.environ.update(told, PATH=f"{place}:{os.environ['PATH']}")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
