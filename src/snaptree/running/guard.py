"""A process that ends what a killed snaptree has left pending in QEMU.

While an active commit is pending the guest's requests wait. Should snaptree be killed then, its guard, which has the
monitor's socket too, lets the guest go on: into the layer below when the journal says that it is to, where it was
otherwise. Which it is it writes into the journal first: the files cannot tell.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

from snaptree.errors import ToolError
from snaptree.images.child import kill
from snaptree.store import operations
from snaptree.store.database import Database

PIVOT, STAY = "pivot", "stay"
"""What a step notes of an active commit: the guest goes over, or stays where it was."""
READY_SECONDS, ANSWER_SECONDS = 20.0, 10.0


class StandBy:
    """A process that shares a socket, for the length of a ``with`` block: should we die in it, it does what is left.

    :param module: what it runs, with the numbers of the socket and of its line to us, and the words, as arguments. It
        says a byte when it is ready, and has nothing to do when it hears one.
    :param descriptor: the socket.
    :param purpose: what it is there for, for messages.
    """

    def __init__(self, module: str, descriptor: int, words: Sequence[str], purpose: str) -> None:
        self._module, self._descriptor, self._words, self._purpose = module, descriptor, words, purpose

    def __enter__(self) -> StandBy:
        ours, theirs = socket.socketpair()
        words = [sys.executable, "-m", self._module, str(self._descriptor), str(theirs.fileno())]
        with theirs:
            # The standard streams are not inherited: whoever reads ours would wait for its end.
            self._process = subprocess.Popen(
                [*words, *self._words],
                pass_fds=(self._descriptor, theirs.fileno()),
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
        # It is told that all is well, and has nothing to do.
        with suppress(OSError):
            self._ours.send(b"!")
        self._ours.close()
        self._process.wait(READY_SECONDS)


class Guard(StandBy):
    """Stands by while an active commit is pending.

    :param monitor: the file descriptor of the monitor's socket.
    :param path: the file that the note is about.
    """

    def __init__(self, database: Database, operation: int, step: int, path: str, job: str, monitor: int) -> None:
        words = [database.folder, str(operation), str(step), path, job]
        super().__init__("snaptree.running.guard", monitor, words, "the guest's going over")


def _serve(monitor: int, watched: int, folder: str, operation: int, step: int, path: str, job: str) -> None:
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
    command = "job-finalize" if value == PIVOT else "job-cancel"
    said = {"execute": command, "arguments": {"id": job}, "id": "snaptree-guard"}
    with socket.socket(fileno=monitor) as qemu:
        qemu.settimeout(ANSWER_SECONDS)
        qemu.sendall(json.dumps(said).encode() + b"\n")
        answer = b""
        while b"snaptree-guard" not in answer and (more := qemu.recv(65536)):
            answer += more


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), *sys.argv[6:8])
