"""Whether a machine runs: found out from its monitor and from QEMU's locks on its images, never assumed."""

from __future__ import annotations

import hashlib
import os

from msgspec import Struct

from snaptree.errors import RefusedError, SnaptreeError
from snaptree.images.locks import probe, who_has_open
from snaptree.model.live import OFF, Live
from snaptree.model.machine import MachineConfig
from snaptree.model.tree import Tree
from snaptree.qemu.dialling import dial
from snaptree.store.database import Database

LOOK_SECONDS, WORK_SECONDS = 1.0, 5.0
"""So long a monitor may take to greet a command that only looks, and one that changes something."""


class Power(Struct, frozen=True):
    """What a machine does: ``off``, ``running``, ``paused`` or ``unknown``.

    ``live`` is set when its monitor has told us all about it; without that ``why`` says what is in the way.
    """

    state: str
    live: Live | None = None
    why: str = ""
    hint: str = ""

    def require_known(self, name: str) -> None:
        """Refuse to touch a machine that may run and whose monitor tells us nothing.

        :raise RefusedError: says what is in the way.
        """
        if self.state != OFF and self.live is None:
            raise RefusedError(f"machine {name} may be running: {self.why}", self.hint)


def monitor_of(database: Database, config: MachineConfig) -> str:
    """Where the machine's monitor listens: the user's socket, or the one that ``start`` makes.

    One that the user starts, but snaptree can as well, has the latter when snaptree has.
    """
    own = own_monitor(database, config.name)
    if config.qmp is None or (config.start is not None and _listens(own)):
        return own
    return config.qmp


def _listens(monitor: str) -> bool:
    """Whether there is somebody at a socket of ours, whatever he says."""
    try:
        found = dial(monitor)
    except SnaptreeError:
        return True
    if found is not None:
        found.close()
    return found is not None


def own_monitor(database: Database, name: str) -> str:
    """Where the monitor of a machine listens that snaptree has started. A name may be longer than a file's."""
    word = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]
    return os.path.join(database.folder, "qemu", f"{word}.sock")


def silent(database: Database, config: MachineConfig, tree: Tree) -> bool:
    """Whether the machine is off for certain: nobody writes to its tips, and nobody listens on its monitor."""
    if written_by(tree):
        return False
    return not _listens(monitor_of(database, config))


def written_by(tree: Tree) -> str:
    """Who has a tip of the active branch open for writing; empty when nobody has."""
    for point in tree.active_branch.tips.values():
        path = tree.layers[point.layer].path
        try:
            conflict = probe(path)
        except (OSError, SnaptreeError):
            continue
        if conflict is not None and conflict.writing:
            return ", ".join(who_has_open((path,)).get(path, ())) or "another process"
    return ""
