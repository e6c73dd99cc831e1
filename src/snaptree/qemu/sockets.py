"""The sockets by which a QEMU is reached: a second one that is started with the same command takes their names away."""

from __future__ import annotations

import os
from contextlib import suppress

_LISTENS = 0x10000
"""``__SO_ACCEPTCON`` among the flags in ``/proc/net/unix``."""


def listening(pid: int) -> tuple[str, ...]:
    """The paths of the sockets on which a process listens; none where we may not know."""
    mine: set[str] = set()
    with suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                mine.add(os.readlink(f"/proc/{pid}/fd/{number}"))
    found: list[str] = []
    with suppress(OSError), open(f"/proc/{pid}/net/unix", encoding="utf-8", errors="surrogateescape") as file:
        folder = os.readlink(f"/proc/{pid}/cwd")
        for line in file:
            words = line.rstrip("\n").split(maxsplit=7)
            if len(words) == 8 and f"socket:[{words[6]}]" in mine and int(words[3], 16) & _LISTENS:
                path = os.path.join(folder, words[7])
                # Our own monitor was bound by another name.
                if not path.startswith(("/proc/", "@")) and os.path.exists(path):
                    found.append(path)
    return tuple(sorted(found))
