"""Doing several things at once, by this thread and helpers that it never has to wait for to begin.

``threading.Thread.start`` waits for the new thread's first word, and for ever when there is no memory for it to say so
(CPython 3.11). Here a helper that does not come to life is not missed: this thread does all the work then.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress


def run_together(tasks: Iterable[Callable[[], None]], helpers: int) -> None:
    """Do all the tasks. After the first that fails no other is begun, and its error is raised when all have ended."""
    work = _Work(tasks)
    for _ in range(helpers):
        with suppress(RuntimeError):  # No more threads can be had.
            _thread.start_new_thread(work.help, ())
    work.help()
    work.join()


class _Work:
    def __init__(self, tasks: Iterable[Callable[[], None]]) -> None:
        self._tasks = iter(tasks)
        self._changed = threading.Condition()
        self._busy = 0
        self._error: BaseException | None = None

    def help(self) -> None:
        """Do one task after another until none is left."""
        while True:
            with self._changed:
                task = next(self._tasks, None) if self._error is None else None
                if task is None:
                    return
                self._busy += 1
            try:
                task()
            except BaseException as error:
                self._error = self._error or error
            finally:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify_all()

    def join(self) -> None:
        """Wait until every task that was begun has ended."""
        with self._changed:
            while self._busy:
                self._changed.wait()
        if self._error is not None:
            raise self._error
