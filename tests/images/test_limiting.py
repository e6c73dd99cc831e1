"""How fast data moves and whether it does, changed while threads wait."""

from __future__ import annotations

import threading
import time

from snaptree.images.mover.limiting import Limiter


def never() -> bool:
    return False


def moved(limiter: Limiter, pieces: int, done: list[float]) -> threading.Thread:
    """A thread that moves pieces of 1000 bytes; when each was let go."""

    def work() -> None:
        for _ in range(pieces):
            limiter.wait(1000, never)
            done.append(time.monotonic())

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_all_threads_share_the_limit() -> None:
    limiter, done = Limiter(20_000.0), list[float]()
    began = time.monotonic()
    for thread in [moved(limiter, 5, done) for _ in range(4)]:
        thread.join(20)
    # The first piece goes at once.
    assert len(done) == 20 and time.monotonic() - began >= 0.9


def test_nothing_moves_while_it_is_held() -> None:
    limiter, done = Limiter(), list[float]()
    limiter.held = True
    threads = [moved(limiter, 3, done) for _ in range(3)]
    until = time.monotonic() + 10
    while not limiter.resting:
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.3)
    assert done == []
    limiter.held = False
    for thread in threads:
        thread.join(10)
    assert len(done) == 9 and not limiter.resting


def test_a_new_limit_holds_for_those_who_wait() -> None:
    limiter, done = Limiter(1.0), list[float]()
    thread = moved(limiter, 3, done)
    time.sleep(0.3)
    assert len(done) == 1, "the next is let go in a thousand seconds"
    limiter.speed = 0.0
    thread.join(10)
    assert len(done) == 3


def test_whoever_is_to_stop_does_not_wait() -> None:
    limiter = Limiter(1.0)
    limiter.wait(1000, never)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    began = time.monotonic()
    limiter.wait(1000, stop.is_set)
    limiter.held = True
    limiter.rest(stop.is_set)
    assert time.monotonic() - began < 5
