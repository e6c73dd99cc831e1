"""Stand-ins for QEMU's programs, and snaptree in processes that are killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
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


def dies(work: Callable[[], object], arrange: Callable[[Callable[[], None]], None]) -> bool:
    """Do the work in a process of its own that may be killed on the way; whether it was.

    :param arrange: is given what kills, and puts it where it is to be called.
    """
    child = os.fork()
    if child == 0:
        try:
            arrange(lambda: os.kill(os.getpid(), signal.SIGKILL))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), "it failed"
    return status != 0


def killed(work: Callable[[], object], arrange: Callable[[Callable[[], None]], None]) -> None:
    """Do the work in a process of its own that is killed on the way, as :func:`dies`."""
    assert dies(work, arrange), "it was not killed"
