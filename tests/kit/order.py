"""In which order things are done: what is brought to disk, and what is said of it."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import pytest


class Order:
    """What is done, in its order: the path of each file that is synced, and the word for each call that is watched."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self._patched = patched
        fsync = os.fsync

        def syncing(descriptor: int) -> None:
            fsync(descriptor)
            self.events.append(os.readlink(f"/proc/self/fd/{descriptor}"))

        patched.setattr(os, "fsync", syncing)

    def watch(self, owner: type | ModuleType, name: str, word: str) -> None:
        """Note the word before each call of the method, or of the module's function."""
        called = getattr(owner, name)

        def calling(*words: Any, **more: Any) -> Any:
            self.events.append(word)
            return called(*words, **more)

        self._patched.setattr(owner, name, calling)

    def before_last(self, event: str, since: str | None = None) -> list[str]:
        """What came before the last ``event``; of that, with ``since``, only what came after the last of these."""
        end = len(self.events) - 1 - self.events[::-1].index(event)
        start = max((at for at, each in enumerate(self.events[:end]) if each == since), default=0)
        return self.events[start:end]
