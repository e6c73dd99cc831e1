"""Asks operations that run in other processes how they are, and tells them what to do."""

from __future__ import annotations

import json
import time
from typing import Any

from msgspec import Struct

from snaptree.errors import RefusedError, SnaptreeError, ToolError, UsageError, every_error_class
from snaptree.qemu.dialling import peer_of
from snaptree.running import sockets
from snaptree.running.listening import VERSION

ANSWER_SECONDS = 5.0
LONGEST = 4 << 20
"""No answer is longer, in bytes."""


class Heard(Struct, frozen=True):
    """What one process has answered: ``told`` is as ``Control.tell`` has it, empty where it did not answer in time."""

    name: str
    process: int
    told: dict[str, Any]


def everyone(state: str) -> tuple[Heard, ...]:
    """All operations that run, or wait for their turn, from this state folder.

    One that answers something that makes no sense counts as one that does not answer.
    """
    found: list[Heard] = []
    for name in sockets.names(state):
        try:
            heard = call(state, name)
        except SnaptreeError:
            heard = Heard(name, 0, {})
        found += [heard] if heard is not None else []
    return tuple(found)


def call(state: str, name: str, ask: str = "show", limit: float = 0.0) -> Heard | None:
    """Ask one; ``None`` when it has ended.

    :raise SnaptreeError: what it refuses, as it says.
    """
    until = time.monotonic() + ANSWER_SECONDS
    try:
        connection = sockets.connect(state, name, ANSWER_SECONDS)
    except TimeoutError:
        return Heard(name, 0, {})
    if connection is None:
        return None
    with connection:
        process = peer_of(connection).process
        said = bytearray()
        try:
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(json.dumps({"snaptree": VERSION, "ask": ask, "limit": limit}).encode() + b"\n")
            while not said.endswith(b"\n"):
                connection.settimeout(max(0.01, until - time.monotonic()))
                data = connection.recv(65536)
                if not data:
                    return None
                said += data
                if len(said) > LONGEST:
                    raise ToolError(f"process {process} answers without end", "is it a snaptree?")
        except TimeoutError:
            return Heard(name, process, {})
        except OSError:
            return None
    return Heard(name, process, _told(bytes(said), process))


def _told(line: bytes, process: int) -> dict[str, Any]:
    try:
        answer = json.loads(line)
        if answer["snaptree"] != VERSION:
            raise ToolError(f"process {process} is another version of snaptree", "use the same one for both")
        if "error" in answer:
            raise _error(answer["error"])
        told = answer["operation"]
        if not isinstance(told, dict) or not isinstance(told.get("machine"), str):
            raise TypeError
        return told
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ToolError(f"process {process} gave no answer that makes sense", "is it a snaptree?") from error


def _error(fields: dict[str, Any]) -> SnaptreeError:
    classes = {each.code: each for each in every_error_class()}
    found = classes.get(str(fields["code"]), RefusedError)
    return (found if found is not UsageError else ToolError)(str(fields["message"]), str(fields["hint"]))
