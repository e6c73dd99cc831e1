"""Hears, while an operation runs, what other terminals ask of it.

One line of JSON asks, one line answers, and the connection is closed::

    {"snaptree": 1, "ask": "show"}             show, cancel, pause, resume; limit, with "limit": bytes a second
    {"snaptree": 1, "operation": {...}}        as Control.tell has it
    {"snaptree": 1, "error": {"code", "message", "hint"}}

Whoever says nothing, or no end of it, is not waited for; nobody keeps the operation from its work.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import selectors
import socket
import time
from collections.abc import Iterator
from typing import Any

from msgspec import Struct, field

from snaptree.errors import RefusedError, SnaptreeError, UsageError
from snaptree.model.names import visible
from snaptree.qemu.dialling import peer_of
from snaptree.running import sockets
from snaptree.running.control import Control, answered

VERSION = 1
ASKED = ("show", "cancel", "pause", "resume", "limit")
LONGEST = 4096
"""No question is longer, in bytes."""
PATIENCE = 5.0
"""So long somebody may take to ask, and to take the answer, in seconds."""
AT_ONCE = 32
"""So many are heard at once; the others wait until one of these has been answered, or has had its time."""
MOST_LIMIT = 1 << 60


class _Asker(Struct):
    connection: socket.socket
    until: float
    said: bytearray = field(default_factory=bytearray)
    answer: memoryview | None = None


@contextlib.contextmanager
def heard(state: str, control: Control) -> Iterator[None]:
    """Let other terminals ask in the block. Where there can be no socket the operation runs all the same.

    :param state: the state folder; it is there.
    """
    try:
        listening = sockets.Listening(state)
    except (OSError, RefusedError):
        yield
        return
    server = _Server(listening.socket, control)
    try:
        server.start()
        yield
    finally:
        listening.remove()
        server.stop()


class _Server:
    """Answers, in a thread of its own."""

    def __init__(self, listening: socket.socket, control: Control) -> None:
        self._listening, self._control = listening, control
        self._askers: dict[socket.socket, _Asker] = {}
        self._selector = selectors.DefaultSelector()
        self._ours, self._theirs = socket.socketpair()

    def start(self) -> None:
        """Begin; without memory for a thread nobody is heard."""
        try:
            # Not threading.Thread, whose start waits for the new thread's first word: see images/workers.py.
            _thread.start_new_thread(self._serve, ())
        except RuntimeError:
            self._end()

    def stop(self) -> None:
        """Hear nobody any more; the thread is not waited for."""
        self._ours.close()

    def _serve(self) -> None:
        try:
            self._selector.register(self._theirs, selectors.EVENT_READ)
            self._selector.register(self._listening, selectors.EVENT_READ)
            while self._turn():
                pass
        except (OSError, MemoryError, ValueError):
            # Nobody is heard any more; whoever is connected sees the end of the connection.
            pass
        finally:
            self._end()

    def _end(self) -> None:
        for each in self._askers.values():
            each.connection.close()
        self._selector.close()
        self._listening.close()
        self._theirs.close()

    def _turn(self) -> bool:
        """Do what is to be done now; whether there is a next turn."""
        now = time.monotonic()
        wait = min((each.until - now for each in self._askers.values()), default=None)
        ready = self._selector.select(max(0.0, wait) if wait is not None else None)
        for key, _ in ready:
            if key.fileobj is self._theirs:
                return False
            if key.fileobj is self._listening:
                self._accept()
            else:
                assert isinstance(key.fileobj, socket.socket)
                self._attend(self._askers[key.fileobj])
        for each in [each for each in self._askers.values() if each.until <= time.monotonic()]:
            self._drop(each)
        return True

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:
            # It went away again; out of descriptors, it is tried anew in the next turn.
            time.sleep(0.01)
            return
        connection.setblocking(False)
        if not peer_of(connection).trusted:
            connection.close()
            return
        self._askers[connection] = _Asker(connection, time.monotonic() + PATIENCE)
        self._selector.register(connection, selectors.EVENT_READ)
        if len(self._askers) == AT_ONCE:
            self._selector.unregister(self._listening)

    def _drop(self, asker: _Asker) -> None:
        self._selector.unregister(asker.connection)
        asker.connection.close()
        if len(self._askers) == AT_ONCE:
            self._selector.register(self._listening, selectors.EVENT_READ)
        del self._askers[asker.connection]

    def _attend(self, asker: _Asker) -> None:
        """Take what somebody says, or go on with the answer."""
        try:
            if asker.answer is None:
                data = asker.connection.recv(LONGEST)
                asker.said += data
                line, end, _ = bytes(asker.said).partition(b"\n")
                if not end and data and len(asker.said) <= LONGEST:
                    return
                if not end and not asker.said:
                    self._drop(asker)
                    return
                who = f"process {peer_of(asker.connection).process}"
                asker.answer = memoryview(json.dumps(answer(self._control, line, who)).encode() + b"\n")
                self._selector.modify(asker.connection, selectors.EVENT_WRITE)
            asker.answer = asker.answer[asker.connection.send(asker.answer) :]
            if not asker.answer:
                self._drop(asker)
        except BlockingIOError:
            return
        except OSError:
            self._drop(asker)


def answer(control: Control, line: bytes, who: str) -> dict[str, Any]:
    """What is answered to one line; it is done then."""
    try:
        ask, limit = _read(line)
        if ask != "show":
            answered(control, ask, limit, who)
        return {"snaptree": VERSION, "operation": control.tell()}
    except SnaptreeError as error:
        fields = {"code": error.code, "message": error.message, "hint": error.hint}
        return {"snaptree": VERSION, "error": fields}


def _read(line: bytes) -> tuple[str, float]:
    """What a line asks for.

    :raise UsageError: it makes no sense, or is of another version of snaptree.
    """
    try:
        said = json.loads(line) if len(line) <= LONGEST else None
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or "snaptree" not in said:
        raise UsageError("this is not a question of snaptree's", "use 'snaptree operations'")
    if said["snaptree"] != VERSION:
        version = visible(str(said["snaptree"])[:20])
        raise UsageError(f"version {version} is asked for, this is version {VERSION}", "use the same snaptree for both")
    ask, limit = said.get("ask"), said.get("limit", 0)
    if not isinstance(ask, str) or ask not in ASKED:
        raise UsageError(f"nobody knows what {visible(repr(ask)[:40])} is", f"ask for one of {', '.join(ASKED)}")
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit <= MOST_LIMIT:
        raise UsageError("the limit is not a number of bytes a second", "0 lifts it")
    return ask, float(limit)
