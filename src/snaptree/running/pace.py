"""How fast data may move, and how urgently its disk accesses are to be served."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

from msgspec import Struct


class Pace(Struct, frozen=True):
    """``limit`` is in bytes a second, 0 for none; ``idle`` lets everybody else's disk accesses go first."""

    limit: float = 0.0
    idle: bool = False


FREELY = Pace()
"""Without limit."""

_CALLS = {"x86_64": (251, 252), "aarch64": (30, 31), "ppc64le": (273, 274), "s390x": (282, 283), "riscv64": (30, 31)}
"""``ioprio_set(2)`` and ``ioprio_get(2)``, for which the C library has no names."""
_WHO_PROCESS, _IDLE = 1, 3 << 13


@contextlib.contextmanager
def kept(pace: Pace) -> Iterator[None]:
    """Let this thread, and threads and programs that it starts in the block, have the pace's priority.

    Where the kernel or its I/O scheduler knows no priorities nothing changes.
    """
    calls = _CALLS.get(os.uname().machine)
    if not pace.idle or calls is None:
        yield
        return
    system = ctypes.CDLL(None)
    before = system.syscall(calls[1], _WHO_PROCESS, 0)
    system.syscall(calls[0], _WHO_PROCESS, 0, _IDLE)
    try:
        yield
    finally:
        system.syscall(calls[0], _WHO_PROCESS, 0, max(before, 0))
