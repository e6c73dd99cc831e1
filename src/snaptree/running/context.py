"""What a step is given to do its work with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from msgspec import Struct, field

from snaptree.errors import SnaptreeError
from snaptree.images.locks import MachineLock
from snaptree.images.mover.limiting import Limiter
from snaptree.running.holding import Holding
from snaptree.running.journal import Journal

if TYPE_CHECKING:
    from snaptree.qemu.running import RunningQemu


class Context(Struct):
    """The surroundings of the step that is being taken.

    ``lock`` is snaptree's own lock on the machine, ``moved`` is told how many bytes of the step's total have moved,
    ``limiter`` says how fast, and whether, they may. ``recovering`` says that the step may have been begun before, by a
    process that was killed. ``qemu`` is the monitor of a machine that runs. ``keys`` are the files with the keys of its
    encrypted layers, by their LUKS ids.

    A step adds to ``said`` what the user is to be told of how it went, and sets ``paused`` to the seconds that the
    guest stood still. ``failed`` is set by a step that did not do what it should, where the operation is brought to
    its end all the same: it is raised then. ``left`` is set when QEMU says nothing any more while something is pending
    in it: a guard ends that by itself, and the operation stays in the journal, as if we had been killed.
    """

    journal: Journal
    holding: Holding
    lock: MachineLock = field(default_factory=MachineLock)
    limiter: Limiter = field(default_factory=Limiter)
    cancelled: threading.Event = field(default_factory=threading.Event)
    moved: Callable[[int, int], None] = lambda done, total: None
    recovering: bool = False
    qemu: RunningQemu | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    paused: float | None = None
    failed: SnaptreeError | None = None
    left: bool = False

    def stopped(self) -> bool:
        """Whether the step is to stop; while its work is held this waits."""
        self.limiter.rest(self.cancelled.is_set)
        return self.cancelled.is_set()

    @property
    def token(self) -> str:
        """A word that names the operation's temporary files."""
        return self.journal.token
