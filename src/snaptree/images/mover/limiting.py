"""How fast data may move, and whether it may at all: changed by any thread while others move it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_LOOK_SECONDS = 0.1
"""So often whoever waits looks whether it is to stop."""


class Limiter:
    """No more than so many bytes a second, over all threads, and nothing at all while it is held.

    :param speed: bytes a second; 0 for no limit.
    """

    def __init__(self, speed: float = 0.0) -> None:
        self._changed = threading.Condition()
        self._speed = speed
        self._held = False
        self._resting = 0
        self._free_at = 0.0

    @property
    def speed(self) -> float:
        """Bytes a second; 0 for no limit."""
        return self._speed

    @speed.setter
    def speed(self, speed: float) -> None:
        with self._changed:
            self._speed = speed
            # What moved at the old speed is not waited for at the new one.
            self._free_at = 0.0
            self._changed.notify_all()

    @property
    def held(self) -> bool:
        """Whether nothing is to move."""
        return self._held

    @held.setter
    def held(self, held: bool) -> None:
        with self._changed:
            self._held = held
            self._changed.notify_all()

    @property
    def resting(self) -> bool:
        """Whether somebody who moves data rests because it is held."""
        return self._held and self._resting > 0

    def begin_rest(self) -> None:
        """Whoever calls it moves nothing until it has called :meth:`end_rest`."""
        with self._changed:
            self._resting += 1

    def end_rest(self) -> None:
        """The end of a rest that was begun."""
        with self._changed:
            self._resting -= 1

    def rest(self, stopped: Callable[[], bool]) -> None:
        """Wait while it is held, or until it is to stop."""
        if not self._held:
            return
        with self._changed:
            self._resting += 1
            try:
                while self._held and not stopped():
                    self._changed.wait(_LOOK_SECONDS)
            finally:
                self._resting -= 1

    def wait(self, length: int, stopped: Callable[[], bool]) -> None:
        """Wait until so many more bytes may move, or until it is to stop."""
        while not stopped():
            self.rest(stopped)
            with self._changed:
                if self._held:
                    continue
                left = self._free_at - time.monotonic()
                if self._speed <= 0:
                    return
                if left <= 0:
                    self._free_at = time.monotonic() + length / self._speed
                    return
                self._changed.wait(min(left, _LOOK_SECONDS))
