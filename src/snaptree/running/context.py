"""What a step is given to do its work with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from snaptree.running.holding import Holding
from snaptree.running.journal import Journal


@dataclass
class Context:
    """The surroundings of the step that is being taken.

    ``moved`` is told how many bytes of the step's total have moved. ``recovering`` says that the step may have been
    begun before, by a process that was killed.
    """

    journal: Journal
    holding: Holding
    cancelled: threading.Event = field(default_factory=threading.Event)
    moved: Callable[[int, int], None] = lambda done, total: None
    recovering: bool = False

    @property
    def token(self) -> str:
        """A word that names the operation's temporary files."""
        return self.journal.token
