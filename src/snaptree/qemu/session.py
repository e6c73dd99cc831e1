"""A QMP session: commands with deadlines, and waits that end when the peer goes away."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError, Runstate
from qemu.qmp.qmp_client import NegotiationError

from snaptree.errors import NoSpaceError, SnaptreeError, ToolError

GREETING_SECONDS = 10.0
COMMAND_SECONDS = 60.0


class _Client(QMPClient):
    """qemu.qmp's client, which words each message for its log whether that is kept or not: some 1 ms for each answer of
    a small machine's, 1 s of the 10 s that a test with a guest took.
    """

    def _cb_outbound(self, msg: Message) -> Message:
        return super()._cb_outbound(msg) if self.logger.isEnabledFor(logging.DEBUG) else msg

    def _cb_inbound(self, msg: Message) -> Message:
        return super()._cb_inbound(msg) if self.logger.isEnabledFor(logging.DEBUG) else msg


class QmpSession:
    """A monitor that has greeted us.

    :param name: who is at the other end, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._client = _Client(name)
        self.failed: dict[str, str] = {}
        """Why block jobs have failed that ended in this session, by their names: some are forgotten by then."""
        # Nobody reads what it would gather of the events that come.
        self._client.events.event_filter = self._hear

    async def connect(self, address: str | socket.socket, seconds: float = GREETING_SECONDS) -> None:
        """Connect, and wait for the greeting.

        A monitor serves one client: a second one is connected and hears nothing, hence the deadline.

        :raise ToolError: nothing greets us.
        """
        try:
            await asyncio.wait_for(self._client.connect(address), seconds)
        except (TimeoutError, ConnectError, QMPError, OSError) as error:
            raise ToolError(
                f"{self.name} does not answer on its monitor: {error or 'no greeting'}", "is another client connected?"
            ) from error

    async def execute(self, command: str, *, seconds: float | None = None, **arguments: Any) -> Any:
        """Carry out one command.

        :param seconds: how long to wait for the answer; ``COMMAND_SECONDS`` without it.
        :param arguments: the command's arguments; an underscore stands for a dash.
        :raise ToolError: it was refused, or the peer went away, or did not answer in time.
        :raise NoSpaceError: it ran out of room.
        """
        seconds = COMMAND_SECONDS if seconds is None else seconds
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            return await asyncio.wait_for(self._client.execute(command, named or None), seconds)
        except TimeoutError as error:
            raise ToolError(f"{self.name} did not answer {command} within {seconds:.0f} s") from error
        except ExecuteError as error:
            raise explain(f"{self.name} refused {command}", str(error)) from error
        except (ExecInterruptedError, QMPError, OSError) as error:
            raise ToolError(f"{self.name} went away during {command}") from error

    @property
    def connected(self) -> bool:
        """Whether the session lasts, be it that nothing is answered."""
        return self._client.runstate is Runstate.RUNNING

    def _hear(self, event: Message) -> bool:
        """Look at an event as it comes; whether it is to be kept, which none is."""
        if event.get("event") == "BLOCK_JOB_COMPLETED":
            told = event.get("data")
            if isinstance(told, dict) and "error" in told:
                self.failed[str(told.get("device"))] = str(told["error"])
        return False

    async def close(self) -> None:
        """Close the connection; one that is broken already is no error."""
        try:
            await asyncio.wait_for(self._client.disconnect(), 2.0)
        except (Exception, asyncio.CancelledError):
            return


def not_negotiated(error: ToolError) -> bool:
    """Whether somebody greeted us and then said something else than that the session has begun."""
    cause = error.__cause__
    return isinstance(cause, ConnectError) and isinstance(cause.exc, NegotiationError)


@contextmanager
def sense(name: str, what: str, answer: object) -> Iterator[None]:
    """Read an answer in the block.

    :param name: who gave it, ``what`` is what was asked for; both for the message.
    :raise ToolError: it is not of the shape that it is read as.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__} {error}"
        raise ToolError(f"{name} gave no {what} to make sense of ({why}): {str(answer)[:200]}") from error


async def properties(qmp: QmpSession, path: str) -> list[tuple[str, str]]:
    """The properties of an object of QEMU's, each with its type.

    :raise ToolError: there is no such object, or the answer makes no sense.
    """
    answer = await qmp.execute("qom-list", path=path)
    with sense(qmp.name, f"properties of {path}", answer):
        return [(str(each["name"]), str(each["type"])) for each in answer]


def explain(doing: str, reason: str) -> SnaptreeError:
    """The error of ours that says what QEMU's words mean."""
    if "No space left" in reason or "Disk quota exceeded" in reason:
        return NoSpaceError(f"{doing}: {reason}", "free some room on that file system")
    return ToolError(f"{doing}: {reason}")
