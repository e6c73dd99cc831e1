"""Something that happens just as snaptree says a command to QEMU."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from snaptree.qemu.running import RunningQemu
from snaptree.qemu.session import QmpSession


def at_command(
    patched: pytest.MonkeyPatch, which: int | str, work: Callable[[], object], *, after: bool = False
) -> Callable[[], bool]:
    """Do this once, just before or just after a command, the n-th or the first of a name.

    :return: whether it has come to that.
    """
    execute, counted = QmpSession.execute, itertools.count(1)
    done: list[str] = []

    async def executed(self: QmpSession, command: str, **arguments: Any) -> Any:
        mine = not done and which in (next(counted), command)
        if mine and not after:
            done.append(command)
            work()
        answer = await execute(self, command, **arguments)
        if mine and after:
            done.append(command)
            work()
        return answer

    patched.setattr(QmpSession, "execute", executed)
    return lambda: bool(done)


def answering(patched: pytest.MonkeyPatch, which: int, value: object) -> Callable[[], str]:
    """Have the answer to the n-th command be this one; the command is carried out.

    :return: which command it was, if it has come to that.
    """
    execute, counted = QmpSession.execute, itertools.count(1)
    done: list[str] = []

    async def executed(self: QmpSession, command: str, **arguments: Any) -> Any:
        number = next(counted)
        answer = await execute(self, command, **arguments)
        if number != which:
            return answer
        done.append(command)
        return value

    patched.setattr(QmpSession, "execute", executed)
    return lambda: "".join(done)


def hanging_up(patched: pytest.MonkeyPatch) -> Callable[[], None]:
    """What ends snaptree's sessions with monitors, while QEMU lives on."""
    attach, sessions = RunningQemu.attach, list[RunningQemu]()

    async def attached(path: str, *words: Any) -> RunningQemu | None:
        qemu = await attach(path, *words)
        sessions.extend([qemu] if qemu is not None else [])
        return qemu

    def work() -> None:
        for each in sessions:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(each.descriptor)) as connection:
                connection.shutdown(socket.SHUT_RDWR)

    patched.setattr(RunningQemu, "attach", attached)
    return work
