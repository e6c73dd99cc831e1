"""Doing several things at once."""

from __future__ import annotations

import _thread
import threading
import time
from functools import partial

import pytest

from snaptree.images.workers import run_together


def test_all_is_done_and_helpers_help() -> None:
    done: list[int] = []
    by: set[int] = set()
    both = threading.Barrier(2)

    def task(number: int) -> None:
        if number < 2:
            both.wait(5)
        done.append(number)
        by.add(threading.get_ident())

    run_together((partial(task, number) for number in range(50)), 1)
    assert sorted(done) == list(range(50)) and len(by) == 2


def test_the_first_failure_ends_it_when_all_that_was_begun_has_ended() -> None:
    done: list[str] = []
    begun = threading.Event()

    def slow() -> None:
        begun.set()
        time.sleep(0.2)
        done.append("slow")

    def fails() -> None:
        begun.wait(5)
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        run_together([slow, fails, *[partial(done.append, "more")] * 20], 1)
    assert done == ["slow"]


def test_helpers_that_never_come_are_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread can be had, or it dies before its first word."""
    done: list[int] = []

    def none(function: object, arguments: object) -> int:
        raise RuntimeError("can't start new thread")

    for start in (none, lambda function, arguments: 0):
        done.clear()
        monkeypatch.setattr(_thread, "start_new_thread", start)
        run_together((partial(done.append, number) for number in range(5)), 3)
        assert done == list(range(5))
