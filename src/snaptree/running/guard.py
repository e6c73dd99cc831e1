"""A process that ends what a killed snaptree has left pending in QEMU.

While an active commit is pending the guest's requests wait; while memory is saved, or another QEMU is to take over, the
guest itself does. Should snaptree be killed then, its guard, which has the monitors' sockets too, lets the guest go on:
one way when the journal says that the step has happened, the other way otherwise. Which it is it writes into the
journal first: what has happened cannot be told afterwards.
"""

from __future__ import annotations

import _thread
import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from msgspec import Struct

from snaptree.errors import ToolError
from snaptree.images.child import kill
from snaptree.model.memory import FINISHING
from snaptree.running.journal import Journal
from snaptree.store import operations
from snaptree.store.database import Database

PIVOT, STAY = "pivot", "stay"
"""What a step notes of what it does: it has happened (the guest goes over, say), or all stays where it was."""
READY_SECONDS, CANCEL_SECONDS = 20.0, 5.0
ANSWER_SECONDS = 1800.0
"""So long QEMU may say nothing, as while it waits for a disk that stands still, before it is given up."""
_MIGRATING = ("setup", "active", "device", "pre-switchover", "cancelling")


class Orders(Struct, frozen=True):
    """What is said to one monitor (its socket's file descriptor): commands, each ``(name, arguments)``."""

    monitor: int
    commands: Sequence[tuple[str, dict[str, Any]]] = ()


class StandBy:
    """A process that shares a socket, for the length of a ``with`` block: should we die in it, it does what is left.

    :param module: what it runs, with the number of its line to us and the words as arguments. It says a byte when it is
        ready, and has nothing to do when it hears one.
    :param descriptors: the sockets that it shares.
    :param purpose: what it is there for, for messages.
    """

    left = False
    """Set in the block, when we can do no more: at its end the process does what is left, as if we had been killed."""

    def __init__(self, module: str, descriptors: Collection[int], words: Sequence[str], purpose: str) -> None:
        self._module, self._descriptors, self._words, self._purpose = module, descriptors, words, purpose

    def __enter__(self) -> Self:
        ours, theirs = socket.socketpair()
        with theirs:
            # The standard streams are not inherited: whoever reads ours would wait for its end.
            self._process = subprocess.Popen(
                # -P: whoever may write to the folder that we are in has no say in what it runs.
                [sys.executable, "-P", "-m", self._module, str(theirs.fileno()), *self._words],
                pass_fds=(*self._descriptors, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._ours = ours
        ready, _, _ = select.select([ours], [], [], READY_SECONDS)
        if not ready or not ours.recv(1):
            kill(self._process, "the guard")
            ours.close()
            raise ToolError(f"the process that is to guard {self._purpose} does not start", "try it again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.left:
            # It closes its end when it has decided what is to be done; how long that takes is up to QEMU.
            self._ours.shutdown(socket.SHUT_WR)
            select.select([self._ours], [], [], READY_SECONDS)
            self._ours.close()
            _thread.start_new_thread(self._process.wait, ())
            return
        # It is told that all is well, and has nothing to do.
        with suppress(OSError):
            self._ours.send(b"!")
        self._ours.close()
        self._process.wait(READY_SECONDS)


class Guard(StandBy):
    """Stands by while something is pending in QEMU.

    :param path: the file that the note is about which the step that is being taken makes.
    :param go: what is said when the note is that it has happened.
    :param stay: what is said otherwise.
    """

    needed = False
    """Whether something is pending in QEMU, as whoever makes it so, and sets it right, says."""

    def __init__(self, journal: Journal, path: str, *, go: Orders, stay: Orders) -> None:
        orders = json.dumps({note: [each.monitor, each.commands] for note, each in ((PIVOT, go), (STAY, stay))})
        words = [orders, journal.database.folder, str(journal.operation), str(journal.step), path]
        super().__init__("snaptree.running.guard", {go.monitor, stay.monitor}, words, "the guest while it waits")


class _Monitor:
    """A monitor whose session somebody else has begun."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.settimeout(ANSWER_SECONDS)
        self._heard = b""
        self._said = 0

    def say(self, command: str, arguments: dict[str, Any]) -> Any:
        """Say a command; the answer, ``None`` when it was refused."""
        self._said += 1
        name = f"snaptree-guard-{self._said}"
        said = json.dumps({"execute": command, "arguments": arguments, "id": name})
        self._socket.sendall(said.encode() + b"\n")
        while True:
            line, end, self._heard = self._heard.partition(b"\n")
            if not end:
                self._heard = line
                if not (more := self._socket.recv(65536)):
                    raise OSError("QEMU went away")
                self._heard += more
                continue
            with suppress(ValueError):
                answer = json.loads(line)
                if answer.get("id") == name:
                    return answer.get("return")

    def carry_out(self, command: str, arguments: dict[str, Any]) -> None:
        """Say a command, and wait for what it begins."""
        self.say(command, arguments)
        deadline = time.monotonic() + CANCEL_SECONDS
        while command == "migrate_cancel" and time.monotonic() < deadline:
            state, guest = self.say("query-migrate", {}), self.say("query-status", {})
            over = not isinstance(state, dict) or state.get("status") not in _MIGRATING
            if over and not (isinstance(guest, dict) and guest.get("status") == FINISHING):
                return
            time.sleep(0.005)


def _serve(watched: int, orders: str, folder: str, operation: int, step: int, path: str) -> None:
    with socket.socket(fileno=watched) as parent:
        parent.send(b"r")
        if parent.recv(1):
            return
        database = Database(folder)
        noted = operations.note_of(database, operation, step, path)
        value = noted if noted is not None else STAY
        with database.transaction() as connection:
            # Once more, so that it is on disk before QEMU acts on it.
            operations.put_note(connection, operation, step, path, value)
    descriptor, commands = json.loads(orders)[value]
    monitor = _Monitor(descriptor)
    for command, arguments in commands:
        monitor.carry_out(command, arguments)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
